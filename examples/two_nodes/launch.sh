#!/bin/sh
# Two nodes on this machine, to try what a cluster does: one torchrun for each, which meet at one address.
# Arguments go to train.py: sh launch.sh --tiny --strategy fsdp2. PORT=... names another port.
set -eu
folder=$(cd "$(dirname "$0")" && pwd)
port=${PORT:-29500}

node() {
    rank=$1
    shift
    "${PYTHON:-python}" -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --node-rank "$rank" \
        --master-addr 127.0.0.1 --master-port "$port" "$folder/train.py" "$@"
}

node 1 "$@" &
second=$!
trap 'kill "$second" 2>/dev/null || true' EXIT
node 0 "$@"
wait "$second"
