"""Small tools that all tests share."""

import itertools

import numpy as np
import tensorflow as tf


def weights(model):
    """Copies of all trainable weights, in order."""
    return [v.numpy() for v in model.trainable_variables]


def relative_error(new, old, reference_new):
    """||dw - dw_ref|| / ||dw_ref|| over all variables together, in float64."""

    def flat(arrays):
        return np.concatenate([np.ravel(a).astype(np.float64) for a in arrays])

    wanted = flat(reference_new) - flat(old)
    return np.linalg.norm(flat(new) - flat(old) - wanted) / np.linalg.norm(wanted)


def copies(variable):
    """The variable's value on each replica."""
    value = variable if isinstance(variable, tf.Variable | tf.distribute.DistributedValues) else variable.value
    if isinstance(value, tf.distribute.DistributedValues):
        return [copy.numpy() for copy in value.values]
    return [value.numpy()]


def assert_replicas_equal(comm, variables):
    """Every replica holds the same bits."""
    for variable in variables:
        first, *others = copies(variable)
        assert len(others) == comm.size - 1
        for other in others:
            assert first.tobytes() == other.tobytes()


def snapshot(*variables):
    """The bytes of variables on all replicas, to be compared later."""
    return [copy.tobytes() for v in variables for copy in copies(v)]


def share(comm, batch, sizes):
    """A batch (a tuple of arrays) as one share of each size for each replica."""
    assert sum(sizes) == len(batch[0])
    assert len(sizes) == comm.size
    bounds = np.cumsum([0, *sizes])
    pieces = [tuple(tf.convert_to_tensor(x[a:b]) for x in batch) for a, b in itertools.pairwise(bounds)]
    return comm.per_replica(pieces)
