#!/usr/bin/env bash
# A JobSet of TPU slices on GKE, through xpk; jax reads the rest from variables set by GKE.
#
#   CLUSTER=my-cluster TPU_TYPE=v5litepod-64 SLICES=2 experiments/launch/gke_xpk.sh switch-c4 \
#     --config=configs/switch_c4.py --workdir=gs://my-bucket/runs/switch_c4
#
# Needs xpk, gcloud and kubectl, and a cluster (xpk cluster create) whose service account may write to the bucket, or
# with storage mounted at the folder (xpk storage attach). xpk copies this folder into the image. Restarts if another
# process died (3), or if this one was killed (137: out of memory or evicted without notice, 143: preempted).
set -euo pipefail
: "${CLUSTER:?name of the cluster}" "${TPU_TYPE:?e.g. v5litepod-64}"
name=$1
shift

xpk workload create --workload="$name" --cluster="$CLUSTER" --tpu-type="$TPU_TYPE" --num-slices="${SLICES:-1}" \
  --base-docker-image="${IMAGE:-python:3.12}" --script-dir=. --max-restarts=10 --restart-on-exit-codes=3,137,143 \
  --command="pip install -q -e '.[data,gcs]' 'jax[tpu]' && exec python -m ${COMMAND:-moejax.train} ${*@Q}"
echo "Next: xpk workload list --cluster=$CLUSTER, and the log of the first process in the Cloud console."
