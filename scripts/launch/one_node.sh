#!/usr/bin/env bash
# All GPUs of this machine:
#
#     bash scripts/launch/one_node.sh zero1 experiment=stage1
#
# The first word is a file of configs/accelerate (ddp, zero1, zero2, zero3, fsdp2), the rest goes to instructsam.train.
# GPUS=4 takes four GPUs, PYTHON another interpreter. Ctrl-C, SIGTERM or SIGUSR1: a checkpoint, then the end; Ctrl-C once
# more: the end at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/launch/forward.sh

engine=${1:?which engine? a file of configs/accelerate, such as zero1}
shift
python=${PYTHON:-python}
gpus=${GPUS:-$("$python" -c 'import torch; print(torch.cuda.device_count())')}
if [ "$gpus" = 0 ]; then
  echo "error: no GPU here; on a CPU: python -m instructsam.train $*" >&2
  exit 2
fi
run_training --config_file "configs/accelerate/$engine.yaml" --num_processes "$gpus" -m instructsam.train "$@"
