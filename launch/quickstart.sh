#!/usr/bin/env bash
# From a fresh clone to a trained network: digits over two replicas, every gradient in plain sight.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh

make_environment ""
say "training on real images of digits: 2 replicas, 2 micro-batches each"
.venv/bin/disttrain train digits --backend mirrored --replicas 2 --accumulate 2 --out runs/digits
say "done. The model, which plain Keras loads: runs/digits/digits.keras. What happened: runs/digits/summary.json"
say "next: .venv/bin/disttrain why        (why the gradient has to be explicit)"
