#!/usr/bin/env bash
# Runs a command in a SLURM job that is queued again where the time limit stopped it:
#
#   exec experiments/launch/requeue.sh srun python -m moejax.train ...
#
# Before the limit SLURM sends SIGUSR1 to this script alone (--signal=B:USR1@120). The command gets a SIGTERM, saves, and
# ends with code 143; then the job is queued again. Preempted jobs are queued again by SLURM itself (--requeue), and what
# scancel ends stays ended.
set -euo pipefail
limit='' signalled=''
trap 'limit=1 signalled=1; kill -TERM "$!" || true' USR1
# SLURM sends SIGTERM to the command too, which would stop without saving at a second one.
trap 'signalled=1' TERM

"$@" &
while
  signalled='' code=0
  wait "$!" || code=$?
  [[ $signalled ]]  # ended the waiting, not the command
do :; done
if [[ $limit && $code == 143 ]]; then
  # Of one task of an array, SLURM_JOB_ID may be the number of the whole array.
  task=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  scontrol requeue "${task:-$SLURM_JOB_ID}"
fi
exit "$code"
