#!/usr/bin/env bash
# Digits over MPI: two ranks on this machine, or on hosts that ssh reaches, with this folder and environment at the same path
# on each. Options go to `disttrain train digits`:
#   bash launch/mpirun.sh --epochs 5
#   HOSTS=h1:2,h2:2 bash launch/mpirun.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh

use_environment "[mpi]"
where=(-np 2)
if [ -n "${HOSTS:-}" ]; then where=(-H "$HOSTS"); fi

# The engine is Horovod where it is built, else mpi4py. For a program of yours write `-- python train.py …` here;
# `disttrain run --dry-run …` shows mpirun's own command line.
disttrain run "${where[@]}" --launcher mpirun -- disttrain train digits --out runs/mpirun "$@"
