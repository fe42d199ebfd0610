"""All that a communicator can do, as one rank of several: judged here against numpy, since the inputs of all ranks follow from
their numbers. What was reduced is left for the test, which compares the bits of the ranks."""

import contextlib
import itertools
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from _report import BACKEND, RANK, arrays, report  # first: it writes down the process's id

import disttrain as dt
from disttrain.comm.buckets import Wire
from disttrain.errors import BackendError, ConfigError

if BACKEND == "mpi":
    sys.modules["horovod"] = None  # as if it were not built
comm = dt.init()
SIZE = comm.size
RANKS = range(SIZE)
OPS = {"sum": np.sum, "mean": np.mean, "min": np.min, "max": np.max}
DTYPES = ["float32", "float64", "int32", "int64", "float16", "bfloat16"]
TOLERANCE = {"float32": 1e-6, "float64": 1e-14, "float16": 2e-3, "bfloat16": 2e-2}  # all others are exact
seen = {}


def cast(array, dtype):
    # A scalar tensor of bfloat16 refuses np.asarray.
    array = array.numpy() if tf.is_tensor(array) else np.asarray(array)
    return array.astype(tf.as_dtype(dtype).as_numpy_dtype)


def dense(rank, dtype):
    """Tensors of one rank: a scalar, a matrix, a vector, and one without elements."""
    rng = np.random.default_rng([rank, DTYPES.index(dtype)])
    draw = (lambda shape: rng.integers(-99, 99, shape)) if "int" in dtype else (lambda shape: rng.uniform(1, 9, shape))
    return [cast(draw(shape), dtype) for shape in ((), (3, 5), (7,), (0, 2))]


def reduced(op, dtype, arrays):
    """The mean of whole numbers is a whole number as well: without what comes after the point."""
    result = OPS[op]([cast(x, "float64") for x in arrays], axis=0)
    return np.trunc(result) if "int" in dtype else result


def rows(rank, dtype="float32"):
    """Rows of a table of 6, some of them several times; none on rank 1."""
    count = 0 if rank == 1 else 5
    rng = np.random.default_rng(rank)
    return cast(rng.integers(-9, 9, (count, 2)), dtype), rng.integers(0, 6, count)


def whole_table(op):
    table = np.zeros((6, 2))
    for rank in RANKS:
        values, indices = rows(rank)
        np.add.at(table, indices, values)
    return table / SIZE if op == "mean" else table


def slices_of(values, indices):
    return tf.IndexedSlices(tf.convert_to_tensor(values), tf.convert_to_tensor(indices), tf.constant([6, 2]))


def run(fn, *args):
    """What fn gives on this process's replica."""
    return comm.local_values(comm.run(fn, args))[0]


def both(fn, *args):
    """What fn gives eagerly and what it gives in a tf.function."""
    yield "eager", run(fn, *args)
    traced = tf.function(lambda *bound: comm.run(fn, bound), autograph=False)
    yield "traced", comm.local_values(traced(*args))[0]


@contextlib.contextmanager
def other(**options):
    """The same engine with other options, which `dt.init` takes once in a process."""
    if comm.name == "multiworker":
        comm._wire, usual = Wire(**options), comm._wire
        yield comm
        comm._wire = usual
    else:
        yield type(comm)(Wire(**options), None)


def keep(name, *tensors):
    """For the test, which finds the same bits on all ranks."""
    for i, x in enumerate(tensors):
        seen[f"{name} {i}"] = np.frombuffer(x.numpy().tobytes(), np.uint8)


def assert_near(got, wanted, dtype):
    assert got.dtype == dtype, got.dtype
    assert got.shape == np.shape(wanted), got.shape
    tolerance = TOLERANCE.get(dtype, 0)
    np.testing.assert_allclose(cast(got, "float64"), wanted, rtol=tolerance, atol=tolerance)


# Who is who -----------------------------------------------------------------------------------------------------------


def ranks():
    assert (comm.rank, comm.local_rank, comm.is_chief) == (RANK, RANK, RANK == 0)
    assert comm.all_gather_object(comm.rank) == list(RANKS)


def replica_id_is_known_while_tracing():
    for _, replica in both(lambda x: x + comm.replica_id(), tf.constant(0)):
        assert replica == RANK
    assert type(run(comm.replica_id)) is int


def owns():
    for make in (tf.Variable, keras.Variable):
        with comm.scope():
            assert comm.owns(make(1.0))
        assert comm.owns(make(1.0)) == (comm.name != "multiworker")


def shares():
    for examples in (0, 1, 2, 3, 10, 12):
        x = np.arange(examples * 2).reshape(examples, 2)
        for batches in ([(x, {"y": x[:, 0]})], tf.data.Dataset.from_tensors((x, {"y": x[:, 0]}))):
            (batch,) = comm.distribute(batches)
            ((mine, named),) = comm.local_values(batch)
            np.testing.assert_array_equal(named["y"], mine[:, 0])
            dealt = comm.all_gather_object(mine.numpy())
            sizes = [len(share) for share in dealt]
            assert sizes == sorted(sizes, reverse=True)
            assert max(sizes) - min(sizes) <= 1
            np.testing.assert_array_equal(np.concatenate(dealt), x)


# Reducing -------------------------------------------------------------------------------------------------------------


def all_reduce(communicator=comm, name="one bucket", ops=OPS):
    """All dtypes in one call, so that they must be sorted out."""
    mine = [(dtype, i) for dtype in DTYPES for i in range(len(dense(RANK, dtype)))]
    tensors = [tf.constant(dense(RANK, dtype)[i]) for dtype, i in mine]
    for op in ops:
        for how, got in both(lambda *x, op=op: communicator.all_reduce(x, op), *tensors):
            keep(f"{name} {op} {how}", *got)
            for x, (dtype, i) in zip(got, mine, strict=True):
                assert_near(x, reduced(op, dtype, [dense(rank, dtype)[i] for rank in RANKS]), dtype)


def all_reduce_in_several_buckets():
    """Some 50 numbers in each."""
    with other(bucket_mib=0.0002) as small:
        all_reduce(small, "several buckets", ("mean", "max"))


def all_reduce_of_nothing():
    for _, got in both(lambda: comm.all_reduce([])):
        assert list(got) == []


def all_reduce_of_constants():
    """TensorFlow may not take the results for constants."""

    def reduce():
        x = tf.constant([1.0, 2.0]) * (comm.replica_id() + 1)
        return comm.all_reduce([x, x[0], tf.cast(x, tf.bfloat16)]), comm.all_gather(x), comm.all_reduce([x], "max")

    for _, ((vector, scalar, half), gathered, (largest,)) in both(reduce):
        total = sum(RANKS) + SIZE
        assert vector.numpy().tolist() == half.numpy().tolist() == [total, 2 * total]
        assert scalar == total
        assert gathered.numpy().tolist() == [x for rank in RANKS for x in (rank + 1, 2 * rank + 2)]
        assert largest.numpy().tolist() == [SIZE, 2 * SIZE]


def halves_are_summed_wide():
    """Neither sums on the way to a mean or a smaller sum, nor tiny terms get lost."""
    halves = np.array([[60000, 2048, -60000], [60000, 1, 60000], [60000, 1, 60000]][:SIZE])
    brains = [256, 1, 1][:SIZE]
    mine = tf.constant(halves[RANK], tf.float16), tf.constant(brains[RANK], tf.bfloat16)
    for op, reduce in OPS.items():
        with np.errstate(over="ignore"):  # 60000 on all ranks has no sum in float16
            wanted = cast(reduce(halves, axis=0), "float16")
        for how, (half, brain) in both(lambda *x, op=op: comm.all_reduce(x, op), *mine):
            keep(f"wide {op} {how}", half, brain)
            np.testing.assert_array_equal(half, wanted)
            assert brain.numpy() == cast(reduce(brains), "bfloat16")


def indexed_slices_among_dense_tensors():
    def reduce(op, vector, values, indices):
        first, table, last = comm.all_reduce([vector, slices_of(values, indices), vector[0]], op)
        assert isinstance(table, tf.IndexedSlices)
        return first, last, tf.convert_to_tensor(table)

    vector = tf.constant([1.0, 2.0]) * (RANK + 1)
    for op, dtype in (("sum", "float32"), ("mean", "float32"), ("sum", "bfloat16")):
        for how, got in both(lambda *x, op=op: reduce(op, *x), vector, *map(tf.constant, rows(RANK, dtype))):
            keep(f"slices {op} {dtype} {how}", *got)
            factor = OPS[op](np.arange(SIZE) + 1)
            assert_near(got[0], [factor, 2 * factor], "float32")
            assert_near(got[1], factor, "float32")
            assert_near(got[2], whole_table(op), dtype)
    with pytest.raises(ConfigError, match="op 'max' is not known, use 'sum' or 'mean'"):
        run(lambda: comm.all_reduce([slices_of(*rows(RANK))], "max"))


def unknown_op():
    with pytest.raises(ConfigError, match=r"op='product': use one of 'sum', 'mean', 'min', 'max'"):
        run(lambda: comm.all_reduce([tf.ones([2])], "product"))


def reduce_scatter():
    values = [SIZE * np.random.default_rng(rank).integers(-9, 9, (2 * SIZE, 3)) for rank in RANKS]
    for dtype, op in [*itertools.product(["float32"], OPS), *itertools.product(DTYPES[1:], ["mean"])]:
        mine = tf.constant(cast(values[RANK], dtype))
        for _, got in both(lambda x, op=op: comm.reduce_scatter(x, op), mine):
            assert_near(got, np.split(OPS[op](values, axis=0), SIZE)[RANK], dtype)


# On the wire ----------------------------------------------------------------------------------------------------------


def narrow(thin, dtype, tolerance):
    """Large float32 tensors, whose sums float16 has no room for; all else as it is."""
    large = [np.full(20000, 60000), np.full((200, 100), 1e-30), np.full(20000, 1e30), np.zeros(20000)]
    large.append(np.random.default_rng(0).uniform(59000, 60000, 20000))
    exact = [np.full(20000, 1 + 2.0**-40), np.full(3, 1 + 2.0**-20), np.float64(1 + 2.0**-20)]
    mine = [tf.constant(cast(x, "float32")) for x in large]
    mine += [tf.constant(x, t) for x, t in zip(exact, ("float64", "float32", "float32"), strict=True)]
    for op in ("sum", "mean"):
        for how, got in both(lambda *x, op=op: thin.all_reduce(x, op), *mine):
            keep(f"{dtype} {op} {how}", *got)
            factor = SIZE if op == "sum" else 1
            for x, wanted in zip(got, large, strict=False):
                assert x.dtype == tf.float32
                np.testing.assert_allclose(cast(x, "float64"), factor * wanted, rtol=tolerance)
            for x, wanted in zip(got[len(large) :], exact, strict=True):
                np.testing.assert_array_equal(x, factor * wanted)


def what_is_not_finite(thin, dtype):
    """On the last rank alone: it arrives as something not finite, on all ranks."""
    bad = [np.nan, np.inf, -np.inf]
    mine = [np.full(20000, 3, np.float32) for _ in bad]
    for x, value in zip(mine, bad, strict=True):
        x[7] = value if RANK == SIZE - 1 else 3
    for how, got in both(lambda *x: thin.all_reduce(x), *map(tf.constant, mine)):
        keep(f"not finite {dtype} {how}", *got)
        for x in got:
            assert np.flatnonzero(~np.isfinite(x)).tolist() == [7]
            assert x[0] == 3 * SIZE


def wire_dtypes():
    for dtype, tolerance in (("float16", 1e-3), ("bfloat16", 1e-2)):
        with other(wire_dtype=dtype) as thin:
            narrow(thin, dtype, tolerance)
            what_is_not_finite(thin, dtype)


# Gathering and giving -------------------------------------------------------------------------------------------------


def all_gather():
    uneven = [(dtype, [0, 3, 1]) for dtype in ("float32", "int64", "uint32", "bfloat16", "bool")]
    for dtype, counts in [*uneven, ("float32", [2, 0, 0]), ("float32", [0, 0, 0])]:
        parts = [cast(np.full((counts[rank], 2), rank + 1), dtype) for rank in RANKS]
        for _, got in both(comm.all_gather, tf.constant(parts[RANK])):
            assert_near(got, np.concatenate(parts), dtype)


def all_gather_of_an_unknown_number():
    @tf.function(input_signature=[tf.TensorSpec([None, 3])])
    def gather(x):
        return comm.run(comm.all_gather, (x,))

    for more in range(3):
        parts = [np.full((rank + more, 3), rank, np.float32) for rank in RANKS]
        np.testing.assert_array_equal(comm.local_values(gather(parts[RANK]))[0], np.concatenate(parts))


def broadcast():
    def make(rank):
        values = [rank + 0.1, [rank + 0.5, -1.0], [[rank] * 3] * 2, rank == 1, [rank == 1, rank == 0], -rank - 2**40]
        dtypes = ["float32", "bfloat16", "uint32", "bool", "bool", "int64"]
        with comm.scope():
            variables = [tf.Variable(x, dtype=dtype) for x, dtype in zip(values, dtypes, strict=True)]
            return [*variables, keras.Variable(np.full((2, 3), rank)), keras.Variable(rank, dtype="int32")]

    mine, wanted = make(RANK), make(1)
    comm.broadcast(mine, root=1)
    for i, (got, want) in enumerate(zip(mine, wanted, strict=True)):
        bits = [np.asarray(tf.convert_to_tensor(x)).tobytes() for x in (got, want)]
        assert bits[0] == bits[1], (got, want)
        seen[f"broadcast {i}"] = np.frombuffer(bits[0], np.uint8)


def broadcast_from_nobody():
    with comm.scope():
        variable = tf.Variable(1.0)
    for root in (SIZE, -1):
        with pytest.raises(BackendError, match=f"no rank {root} in a group of {SIZE}"):
            comm.broadcast([variable], root=root)


def all_gather_object():
    wanted = [{"rank": rank, "long": "x" * 1000 * rank} for rank in RANKS]
    gathered = [comm.all_gather_object(wanted[RANK])]

    @tf.function(autograph=False)
    def traced(x):
        gathered.append(comm.all_gather_object(wanted[RANK]))
        with tf.init_scope():
            gathered.append(comm.all_gather_object(wanted[RANK]))
        comm.run(lambda: gathered.append(comm.all_gather_object(wanted[RANK])))
        return x + 1

    assert traced(tf.constant(1)) == 2
    assert gathered == [wanted] * 4


def barrier():
    """Nobody has left before all have come."""
    time.sleep(0.2 * RANK)
    came = time.monotonic()
    assert comm.barrier() is None
    left = time.monotonic()
    came, left = zip(*comm.all_gather_object((came, left)), strict=True)
    assert max(came) <= min(left)


for check in (
    ranks,
    replica_id_is_known_while_tracing,
    owns,
    shares,
    all_reduce,
    all_reduce_in_several_buckets,
    all_reduce_of_nothing,
    all_reduce_of_constants,
    halves_are_summed_wide,
    wire_dtypes,
    indexed_slices_among_dense_tensors,
    unknown_op,
    reduce_scatter,
    all_gather,
    all_gather_of_an_unknown_number,
    broadcast,
    broadcast_from_nobody,
    all_gather_object,
    barrier,
):
    check()
arrays(**seen)
report(done=True, backend=comm.name, rank=comm.rank, size=comm.size)
comm.close()
if RANK == 0:
    comm.close()  # again: waits for nobody
