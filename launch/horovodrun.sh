#!/usr/bin/env bash
# Digits with Horovod over Gloo: two ranks on this machine, or on hosts that ssh reaches, with this folder and environment at
# the same path on each. Options go to `disttrain train digits`:
#   bash launch/horovodrun.sh --epochs 5
#   HOSTS=h1:2,h2:2 bash launch/horovodrun.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh

use_environment "[horovod]"
disttrain build-horovod # minutes the first time; then it says that it is there
where=(-np 2)
if [ -n "${HOSTS:-}" ]; then where=(-H "$HOSTS"); fi

# For a program of yours write `-- python train.py …` here; `disttrain run --dry-run …` shows horovodrun's own command line.
disttrain run "${where[@]}" --launcher horovodrun -- disttrain train digits --out runs/horovodrun "$@"
