#!/usr/bin/env bash
# Trains as several processes: on one machine over Gloo (CPU) or NCCL (GPUs), each with its share
# of the devices.
#
#     examples/multi_process.sh 2 --mesh 8 --steps 20
#
# On several machines start one process on each, with the address of the first:
#
#     python examples/train_deepseek_v3.py --coordinator=HOST0:1234 --num_processes=2 --process_id=0
#     python examples/train_deepseek_v3.py --coordinator=HOST0:1234 --num_processes=2 --process_id=1
#
# or under Slurm or another cluster that jax.distributed knows: srun python ... --distributed.
set -euo pipefail

processes=${1:?"how many processes? usage: examples/multi_process.sh N [flags of train_deepseek_v3.py]"}
shift
folder=$(dirname "$0")
python=${PYTHON:-$folder/../.venv/bin/python} # made by `make setup`
[[ -n ${PYTHON:-} || -x $python ]] || python=python
port=${PORT:-$((20000 + RANDOM % 20000))}

pids=()
for ((id = 0; id < processes; id++)); do
  "$python" "$folder/train_deepseek_v3.py" --coordinator="localhost:$port" \
    --num_processes="$processes" --process_id="$id" "$@" &
  pids+=($!)
done
# Ctrl-C reaches every process of the group; wait until all have saved.
trap '' INT
status=0
for pid in "${pids[@]}"; do
  wait "$pid" || status=$?
done
exit "$status"
