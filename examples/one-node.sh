#!/usr/bin/env bash
# The recipe on all GPUs of one node. A process that dies takes the others with it; all start again from the newest checkpoint,
# three times at most.
#
#     CONFIG=train-config.yaml GPUS=8 bash one-node.sh
set -euo pipefail

: "${CONFIG:=train-config.yaml}" "${GPUS:=8}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 # seconds that torchrun waits for its processes to save when it is told to end

exec torchrun --standalone --nproc-per-node "$GPUS" --max-restarts 3 --no-python fast-llm train gpt --config "$CONFIG"
