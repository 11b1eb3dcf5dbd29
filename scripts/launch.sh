#!/usr/bin/env bash
# One machine, 8 GPUs: scripts/launch.sh CONFIG [key=value ...]
# GPUS=4 takes another number. The global batch grows with it: see docs/multi-gpu.md.
# LAUNCH_FILE=configs/accelerate/fsdp2.yaml shards the student over them.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PATH="$root/.venv/bin:$PATH"

exec accelerate launch --config_file "${LAUNCH_FILE:-$root/configs/accelerate/ddp-8.yaml}" --num_processes "${GPUS:-8}" \
    -m glmd run "$@"
