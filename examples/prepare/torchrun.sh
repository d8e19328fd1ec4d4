#!/usr/bin/env bash
# Prepare a corpus on several nodes that share a file system. Run this on each node:
#
#     CONFIG=prepare-config.yaml NODES=4 HEAD=node0 bash torchrun.sh
#
# Each node takes units of work until none is left. torchrun ends all nodes if one fails; run it again to continue.
set -euo pipefail

: "${CONFIG:=prepare-config.yaml}" "${NODES:=2}" "${HEAD:=localhost}" "${PORT:=29500}" "${WORKERS:=$(nproc)}"

exec torchrun --nnodes "$NODES" --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" \
  --no-python fast-llm prepare gpt_memmap --config "$CONFIG" tokenize_workers="$WORKERS"
