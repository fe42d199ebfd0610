#!/usr/bin/env bash
# Digits on this machine, one rank for each GPU, or two on the CPU. Needs no MPI. Options go to `disttrain train digits`:
#   bash launch/single_node.sh --epochs 5
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh

visible=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, || true)}
gpus=$(tr , '\n' <<<"$visible" | grep -c .) || gpus=0
if [ "$gpus" -gt 0 ]; then use_environment "[gpu]"; else use_environment ""; fi

# Ranks find each other by torchrun's variables; TensorFlow's own collectives reduce (NCCL between GPUs).
# For a program of yours write `-- python train.py …` here.
ranks=$((gpus > 0 ? gpus : 2))
disttrain run -np "$ranks" --launcher local -- disttrain train digits --out runs/single_node "$@"
