"""Runs the tests of whole models as one rank of several: they judge by themselves, against one device in this process."""

import keras
import reference
import test_exactness_models as models
from _report import BACKEND, report
from helpers import assert_replicas_equal, relative_error, weights

import disttrain as dt
from disttrain.gradients import sparse

sparse.SMALL = 0
comm = dt.init(BACKEND)
comms = {"here": comm}


def sizes(*wanted):
    """For two ranks the first two count, the second with all that others would have had."""
    return list(wanted) if comm.size == 3 else [wanted[0], sum(wanted[1:])]


def fit_with_synchronized_batch_normalization():
    """Keras's own `fit` with `dt.DistributedOptimizer`, equal shares, against one device on the joined batch."""
    ((x, y),) = models.image_batches(1, 12)
    share = slice(comm.rank * 12 // comm.size, (comm.rank + 1) * 12 // comm.size)
    model = models.cnn()
    before = weights(model)
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9, global_clipnorm=5.0)
    model.compile(dt.DistributedOptimizer(optimizer, comm), loss="mse")
    model.fit(x[share], y[share], batch_size=12, epochs=4, shuffle=False, verbose=0)

    model_ref, plain = models.cnn(), keras.optimizers.SGD(0.01, momentum=0.9)
    *_, after = reference.train(model_ref, plain, models.mean_squares, [(x, y)] * 4, "global_norm", 5.0)
    assert relative_error(weights(model), before, after) <= 1e-5
    assert_replicas_equal(comm, model.variables)


models.test_synchronized_batch_normalization(comms, "here", sizes(7, 2, 4))
models.test_synchronized_batch_normalization(comms, "here", sizes(0, 9, 4))
models.test_moving_statistics_without_synchronization_are_equal_on_all_replicas(comm, jit=False, sizes=sizes(7, 0, 5))
models.test_embedding_with_repeated_ids(comms, "here", sizes(8, 0, 3), jit=False)
models.test_embedding_with_repeated_ids(comms, "here", sizes(3, 1, 7), jit=True)
models.test_tied_weights(comms, "here", sizes(2, 0, 9))
models.test_masked_tokens_count_nothing(comms, "here", sizes(4, 0, 7), jit=False)
models.test_masked_tokens_count_nothing(comms, "here", sizes(1, 2, 8), jit=True)
models.test_sample_weights(comms, "here", sizes(1, 3, 9))
if comm.name != "multiworker":  # Keras cannot `fit` under it at all
    fit_with_synchronized_batch_normalization()
report(done=True)
comm.close()
