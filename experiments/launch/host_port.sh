#!/usr/bin/env bash
# N processes of one run, which connect at a given address. Here all are on this machine, with two simulated devices
# each:
#
#   experiments/launch/host_port.sh 2 --config=configs/vmoe_digits.py --workdir=runs/two_processes
#
# On your own machines, start the same command once on each: with the address of the first instead of localhost, with
# its --process_id, counted from 0, and without the two variables.
set -euo pipefail
processes=$1
shift
port=${PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')}
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=${DEVICES:-2}

pids=()
for ((id = 0; id < processes; id++)); do
  python -m moejax.train --coordinator="localhost:$port" --num_processes="$processes" --process_id="$id" "$@" &
  pids+=($!)
  echo "Process $id of $processes has PID $!."
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM

# The first process that fails determines the exit code; the others, which would wait for it, are terminated.
code=0
while ((${#pids[@]})); do
  sleep 0.2
  for id in "${!pids[@]}"; do
    kill -0 "${pids[id]}" 2>/dev/null && continue
    ended=0
    wait "${pids[id]}" || ended=$?
    unset "pids[$id]"
    ((ended == 0)) || { ((code)) || code=$ended; kill -TERM "${pids[@]}" 2>/dev/null || true; }
  done
done
exit "$code"
