"""The all-reduce of a whole gradient, engine by engine, against MPI alone.

Every engine runs in the same processes and takes turns with a bare `MPI_Allreduce` of the same bytes, in place in one flat
buffer: nothing to pack, no TensorFlow. So the ratio is what packing, hand-over and scheduling cost.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from disttrain.bench.launch import run_ranks

GRADIENTS, MEGABYTES = 160, 100
_WARM_UP = 3


def compare_allreduce(engines: list[str], ranks: int, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Runs the comparison in `ranks` processes under mpirun.

    Returns:
      For each engine: engine, ms (median over rounds of the slowest rank), raw_ms, ratio (median of the rounds' ratios).

    Raises:
      BackendError: there is no mpirun, or a rank failed.
    """
    result = folder / "allreduce-ranks.json"
    run_ranks(ranks, "disttrain.bench.allreduce", [str(result), str(rounds), *engines])
    return json.loads(result.read_text())


def gradient_shapes() -> list[tuple[int, ...]]:
    """80 kernels and 80 biases, together 100 MB of float32."""
    per_kernel = MEGABYTES * 10**6 // 4 // (GRADIENTS // 2)
    width = 512
    return [shape for _ in range(GRADIENTS // 2) for shape in ((per_kernel // width - 1, width), (width,))]


def _main(result: str, rounds: str, *engines: str) -> None:
    import tensorflow as tf
    from mpi4py import MPI

    import disttrain as dt

    world = MPI.COMM_WORLD
    gradients = [tf.random.stateless_normal(shape, [i, world.rank]) for i, shape in enumerate(gradient_shapes())]
    flat = np.ones(sum(int(tf.size(g)) for g in gradients), np.float32)
    calls: dict[str, Callable[[], Any]] = {}
    for engine in engines:
        comm = dt.init(engine)
        reduce = tf.function(comm.all_reduce, autograph=False)
        calls[engine] = lambda reduce=reduce: reduce(gradients)[0].numpy()
    naive = _naive(world)
    calls["naive mpi4py"] = lambda: naive(gradients)[0].numpy()

    def seconds(call: Callable[[], Any]) -> float:
        world.Barrier()
        start = time.perf_counter()
        call()
        return world.allreduce(time.perf_counter() - start, MPI.MAX)

    def raw() -> float:
        return seconds(lambda: world.Allreduce(MPI.IN_PLACE, flat))

    rows = []
    for engine, call in calls.items():
        for _ in range(_WARM_UP):
            raw(), seconds(call)
        pairs = [(raw(), seconds(call)) for _ in range(int(rounds))]
        raws, ours = zip(*pairs, strict=True)
        ratio = statistics.median(b / a for a, b in pairs)
        rows.append(
            {
                "engine": engine,
                "ranks": world.size,
                "ms": 1e3 * statistics.median(ours),
                "raw_ms": 1e3 * statistics.median(raws),
                "ratio": ratio,
            }
        )
    if world.rank == 0:
        Path(result).write_text(json.dumps(rows))


def _naive(world) -> Callable[[list], list]:
    """What one writes first: everything into one tensor, through numpy, and back."""
    import tensorflow as tf

    def reduce(x: np.ndarray) -> np.ndarray:
        out = np.empty_like(x)
        world.Allreduce(x, out)
        return out

    @tf.function(autograph=False)
    def call(gradients):
        flat = tf.concat([tf.reshape(g, [-1]) for g in gradients], 0)
        flat = tf.ensure_shape(tf.numpy_function(reduce, [flat], tf.float32), flat.shape)
        parts = tf.split(flat, [g.shape.num_elements() for g in gradients])
        return [tf.reshape(p, g.shape) for p, g in zip(parts, gradients, strict=True)]

    return call


if __name__ == "__main__":
    _main(*sys.argv[1:])
