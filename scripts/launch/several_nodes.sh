#!/usr/bin/env bash
# All GPUs of several machines, without a scheduler; to be started on each of them with its own NODE_RANK (0, 1, ...):
#
#     NODES=2 NODE_RANK=0 MASTER=10.0.0.1 bash scripts/launch/several_nodes.sh zero1 experiment=stage1
#
# MASTER is the address of node 0. Code, data, weights and output_dir at the same paths on each node, output_dir on a
# disk that they share. GPUS (a node, default 8), PORT (29500) and PYTHON may be given.
#
# export NCCL_SOCKET_IFNAME=eth0    # where the nodes do not find each other: the interface they share (ip addr)
# export NCCL_IB_DISABLE=1          # where InfiniBand is there but not usable
# export NCCL_DEBUG=INFO            # what NCCL chose
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/launch/forward.sh

engine=${1:?which engine? a file of configs/accelerate, such as zero1}
shift
: "${NODES:?how many machines?}" "${NODE_RANK:?which of them is this, counted from 0?}" "${MASTER:?address of node 0?}"
run_training --config_file "configs/accelerate/$engine.yaml" --num_machines "$NODES" \
  --machine_rank "$NODE_RANK" --num_processes $((NODES * ${GPUS:-8})) \
  --main_process_ip "$MASTER" --main_process_port "${PORT:-29500}" -m instructsam.train "$@"
