#!/usr/bin/env bash
# Sets up what the tests need and runs them. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh

make_environment "[test]"
# Hosts that are network namespaces with an sshd each, and a Slurm on them.
install_system_packages iproute2 openssh-server slurm-wlm munge libpmix-dev
say "checking style"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
say "building Horovod for this TensorFlow (about five minutes the first time, no time when the wheel is in the cache)"
.venv/bin/disttrain build-horovod
say "running the tests"
.venv/bin/python -m pytest -n 2 "$@"
