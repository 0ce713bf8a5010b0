#!/usr/bin/env bash
# The same command on every machine of a Cloud TPU slice; jax reads the rest from its metadata.
#
#   TPU=my-slice ZONE=my-zone experiments/launch/cloud_tpu.sh \
#     --config=configs/switch_c4.py --workdir=gs://my-bucket/runs/switch_c4
#
# Needs gcloud, a slice
#   gcloud compute tpus tpu-vm create "$TPU" --zone="$ZONE" \
#     --accelerator-type=v5litepod-64 --version=v2-alpha-tpuv5-lite
# and a --workdir that all its machines share: a bucket that their service account may write to, or Filestore.
set -euo pipefail
: "${TPU:?name of the slice}" "${ZONE:?its zone}"
folder=$(basename "$PWD")
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT

tar --create --gzip --exclude=.git --exclude=.venv --exclude=runs --file="$archive" --directory=.. "$folder"
gcloud compute tpus tpu-vm scp "$archive" "$TPU":moejax.tar.gz --zone="$ZONE" --worker=all
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="
  set -e
  tar --extract --gzip --file=moejax.tar.gz && cd $folder
  [ -d .venv ] || { python3 -m venv .venv && .venv/bin/pip install -q -e '.[data,gcs]' 'jax[tpu]'; }
  .venv/bin/python -m moejax.train ${*@Q}"
