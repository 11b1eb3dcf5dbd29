#!/usr/bin/env bash
# Several machines, the same command on each: scripts/launch_multinode.sh CONFIG [key=value ...]
#   by hand:  NUM_MACHINES=2 MACHINE_RANK=0 MAIN_IP=10.0.0.1 scripts/launch_multinode.sh CONFIG
#   Slurm:    srun --kill-on-bad-exit=1 --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 scripts/launch_multinode.sh CONFIG
# GPUS is the number on each machine. output_dir must be on storage that every machine sees.
# A machine whose process refuses or dies ends the others within seconds: they hear it by the run's own connections, and
# under Slurm by --kill-on-bad-exit. The launchers meet by c10d on MAIN_IP, whichever machine comes first.
# LAUNCH_FILE=configs/accelerate/fsdp2.yaml shards the student over all of them.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PATH="$root/.venv/bin:$PATH"

machines=${NUM_MACHINES:-${SLURM_NNODES:?set NUM_MACHINES}}
rank=${MACHINE_RANK:-${SLURM_NODEID:?set MACHINE_RANK}}
if [ -z "${MAIN_IP:-}" ]; then
    MAIN_IP=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?set MAIN_IP}" | head -n 1)
fi

exec accelerate launch --config_file "${LAUNCH_FILE:-$root/configs/accelerate/multi-node.yaml}" \
    --num_machines "$machines" --num_processes "$((machines * ${GPUS:-8}))" --machine_rank "$rank" \
    --main_process_ip "$MAIN_IP" --main_process_port "${MAIN_PORT:-29500}" --rdzv_backend c10d \
    -m glmd run "$@"
