"""Trains the exactness matrix as one rank of several, and leaves the weights for the test to judge."""

import numpy as np
import tensorflow as tf
from _report import BACKEND, arrays, report  # first: it writes down the process's id
from problem import SPLITS, Training, batches, cases_of_processes, clipping

import disttrain as dt
from disttrain.gradients import sparse

sparse.SMALL = 0
comm = dt.init(BACKEND)


def my_share(sizes, index):
    """This rank's part of batch `index`; the small and the empty share go round."""
    bounds = np.cumsum([0, *np.roll(sizes, index)])
    mine = slice(bounds[comm.rank], bounds[comm.rank + 1])
    return tuple(tf.constant(x[mine]) for x in batches(sum(sizes))[index])


seen = {}
for accumulate, clip, optimizer in cases_of_processes(comm.size):
    # XLA for some, the tape and the update; the others are plain graphs, which are made much faster.
    jit = (accumulate, clip) in ((1, "norm"), (2, "none"))
    training = Training(comm, optimizer, accumulate=accumulate, after_reduce=clipping(clip), jit=jit)
    training.step._jit._fused = jit
    for split, sizes in SPLITS[comm.size].items():
        run = training.run(lambda index, sizes=sizes: comm.per_replica([my_share(sizes, index)]))
        for name, weights in zip(("before", "first", "last"), run, strict=True):
            for i, w in enumerate(weights):
                seen[f"{accumulate} {clip} {optimizer} {split} {name} {i}"] = w
arrays(**seen)
report(size=comm.size, rank=comm.rank, backend=comm.name)
comm.close()
