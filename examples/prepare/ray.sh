#!/usr/bin/env bash
# Prepare a corpus on a Ray cluster whose nodes share a file system. Start Ray once:
#
#     ray start --head --port 6379           # on the first node
#     ray start --address node0:6379         # on each other node
#
# Then run this on any node. Without RAY_ADDRESS, it uses the CPUs of this machine.
#
#     RAY_ADDRESS=node0:6379 CONFIG=prepare-config.yaml bash ray.sh
#
# Work of workers and nodes that die is done by others; nodes may join. If this command dies, run it again to continue.
set -euo pipefail

: "${CONFIG:=prepare-config.yaml}"

exec fast-llm prepare gpt_memmap --config "$CONFIG" distributed.engine=ray
