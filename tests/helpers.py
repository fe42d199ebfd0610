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
    """Every replica holds the same bits, those of other processes included."""
    for variable in variables:
        by_worker = comm.all_gather_object([copy.tobytes() for copy in copies(variable)])
        everywhere = [bits for here in by_worker for bits in here]
        assert len(everywhere) == comm.size
        assert len(set(everywhere)) == 1, variable


def snapshot(*variables):
    """The bytes of variables on all replicas, to be compared later."""
    return [copy.tobytes() for v in variables for copy in copies(v)]


def share(comm, batch, sizes):
    """A batch (a tuple of arrays) as one share of each size for each replica; those of this worker."""
    assert sum(sizes) == len(batch[0])
    assert len(sizes) == comm.size
    bounds = np.cumsum([0, *sizes])
    pieces = [tuple(tf.convert_to_tensor(x[a:b]) for x in batch) for a, b in itertools.pairwise(bounds)]
    here = len(comm.local_values(None))
    return comm.per_replica(pieces[comm.rank : comm.rank + here])
