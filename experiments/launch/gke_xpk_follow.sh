#!/usr/bin/env bash
# Evaluates the checkpoints of a run as another workload writes them, on a slice of its own, to the last.
#
#   CLUSTER=my-cluster TPU_TYPE=v5litepod-4 experiments/launch/gke_xpk_follow.sh switch-c4-follow \
#     --workdir=gs://my-bucket/runs/switch_c4 --config.mesh.expert=1
#
# Needs what gke_xpk.sh needs. Give the keys of config.mesh that the run set for more devices than there are here.
set -euo pipefail
COMMAND='moejax.evaluate --follow' exec "${BASH_SOURCE%/*}/gke_xpk.sh" "$@"
