"""Horovod as it imports here with this TensorFlow, and what it was built with."""

import json
import os
import sys

os.environ["KERAS_BACKEND"] = "tensorflow"  # another one is a row of its own

import horovod
import horovod.tensorflow as hvd

with open("/proc/self/maps") as maps:
    libraries = {line.split()[-1] for line in maps if "/libmpi.so" in line}
found = {
    "version": horovod.__version__,
    "features": {"MPI": hvd.mpi_built(), "Gloo": hvd.gloo_built(), "NCCL": bool(hvd.nccl_built())},
    "library": min(libraries, default=None),
}
sys.stdout.write(json.dumps(found) + "\n")
