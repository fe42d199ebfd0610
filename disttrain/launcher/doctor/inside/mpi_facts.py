"""The MPI library that mpi4py finds here."""

import json
import sys

import mpi4py
from mpi4py import MPI

with open("/proc/self/maps") as maps:
    libraries = {line.split()[-1] for line in maps if "/libmpi.so" in line}
found = {
    "version": mpi4py.__version__,
    "implementation": MPI.Get_library_version().split("\n")[0].split(",")[0].strip("\0 "),
    "thread_level": MPI.Query_thread(),
    "library": min(libraries, default=None),
}
sys.stdout.write(json.dumps(found) + "\n")
