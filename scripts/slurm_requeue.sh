#!/usr/bin/env bash
# One machine of a Slurm cluster, requeued until the run is complete. In the checkout:
#     sbatch scripts/slurm_requeue.sh CONFIG [key=value ...]
# Three minutes before the time limit Slurm sends SIGTERM: glmd finishes its step and saves, and the job is requeued.
#SBATCH --job-name=glmd
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=8
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?start with sbatch}" || exit 2 # Slurm runs a copy of this file elsewhere

asked=
trap 'asked=yes; kill -TERM "$child" 2>/dev/null' TERM

GPUS=${SLURM_GPUS_ON_NODE:-8} scripts/launch.sh "$@" &
child=$!
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    code=$?
done
# A launcher does not pass on the exit codes of its ranks; what was asked for is known here.
if [ -n "$asked" ] && [ "$code" -ne 0 ]; then
    scontrol requeue "${SLURM_JOB_ID:?}"
    exit 0
fi
exit "$code"
