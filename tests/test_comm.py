"""Collectives of the local and the mirrored communicator: the same words, the same meaning."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from disttrain.errors import BackendError, DataError

BACKENDS = ["local", "mirrored2", "mirrored3"]


def shares_of(comm, rows=None):
    """Different numbers for every replica: [4, 2], or `rows` of them."""
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, (3, 6, 2)).astype("float32")[: comm.size]
    return [tf.constant(v[: rows[r] if rows else 6]) for r, v in enumerate(values)]


def on_replicas(comm, fn, values):
    """What `fn` returns on each replica, eagerly."""
    return comm.local_values(comm.run(fn, (comm.per_replica(values),)))


def bound(comm, fn, values):
    """Like `on_replicas`, in a tf.function that takes the values as its argument."""
    call = tf.function(lambda argument: comm.run(fn, (argument,)), autograph=False)
    return comm.local_values(call(comm.per_replica(values)))


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("op", ["sum", "mean", "min", "max"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_reduce(comms, backend, op, traced):
    comm = comms[backend]
    values = shares_of(comm)
    run = bound if traced else on_replicas
    results = run(comm, lambda x: comm.all_reduce([x, x[0, 0]], op), values)
    wanted = getattr(np, op)(np.stack(values), axis=0)
    assert len(results) == comm.size
    for matrix, scalar in results:
        np.testing.assert_allclose(matrix, wanted, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(scalar, wanted[0, 0], rtol=1e-6)
        assert matrix.numpy().tobytes() == results[0][0].numpy().tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_reduce_of_nothing(comms, backend):
    comm = comms[backend]
    assert comm.local_values(comm.run(lambda: comm.all_reduce([]))) in ([[]], [[], []], [[], [], []])


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_reduce_of_indexed_slices_among_dense_tensors(comms, backend):
    comm = comms[backend]
    values = shares_of(comm, [2, 2, 2])

    def reduce(x):
        slices = tf.IndexedSlices(x, tf.constant([1, 3]), tf.constant([5, 2]))
        dense, total = comm.all_reduce([x, slices])
        return dense, tf.convert_to_tensor(total)

    for dense, total in bound(comm, reduce, values):
        np.testing.assert_allclose(dense, np.sum(values, axis=0), rtol=1e-6)
        np.testing.assert_allclose(total.numpy()[[1, 3]], np.sum(values, axis=0), rtol=1e-6)
        assert not total.numpy()[[0, 2, 4]].any()


@pytest.mark.parametrize("op", ["sum", "mean", "max"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_reduce_scatter(comms, backend, op):
    comm = comms[backend]
    values = shares_of(comm)
    wanted = np.split(getattr(np, op)(np.stack(values), axis=0), comm.size)
    for got, want in zip(bound(comm, lambda x: comm.reduce_scatter(x, op), values), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("rows", [[6, 6, 6], [1, 4, 2], [0, 3, 0]])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_gather(comms, backend, rows):
    comm = comms[backend]
    values = shares_of(comm, rows)
    for got in on_replicas(comm, comm.all_gather, values):
        np.testing.assert_array_equal(got, np.concatenate(values))


@pytest.mark.parametrize("backend", BACKENDS)
def test_replica_id_is_known_while_tracing(comms, backend):
    comm, seen = comms[backend], []

    def ask(x):
        seen.append(comm.replica_id())
        return x + comm.replica_id()

    results = bound(comm, ask, [tf.constant(10)] * comm.size)
    assert sorted(seen) == list(range(comm.size))
    assert all(type(i) is int for i in seen)
    assert [int(r) for r in results] == [10 + i for i in range(comm.size)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_process_is_all_of_the_world(comms, backend):
    comm = comms[backend]
    assert (comm.rank, comm.local_rank, comm.is_chief) == (0, 0, True)
    assert comm.all_gather_object({"a": 1}) == [{"a": 1}]
    assert comm.barrier() is None
    variable = tf.Variable(1.0)
    comm.broadcast([variable], root=0)
    assert variable.numpy() == 1
    with pytest.raises(BackendError, match=f"no rank 7 in a group of {comm.size}"):
        comm.broadcast([variable], root=7)


@pytest.mark.parametrize("make", [tf.Variable, keras.Variable])
def test_owns(comms, make):
    outside = make(1.0)
    made = {}
    for name, comm in comms.items():
        with comm.scope():
            made[name] = make(1.0)
    assert comms["local"].owns(outside)
    for name, comm in comms.items():
        for other, variable in made.items():
            assert comm.owns(variable) == (name == other), (name, other)
    assert not comms["mirrored2"].owns(outside)


@pytest.mark.parametrize("backend", BACKENDS)
def test_per_replica_and_local_values_are_inverse(comms, backend):
    comm = comms[backend]
    values = [{"x": tf.fill([r + 1, 2], float(r)), "y": (tf.range(r),)} for r in range(comm.size)]
    back = comm.local_values(comm.per_replica(values))
    assert len(back) == comm.size
    for value, again in zip(values, back, strict=True):
        np.testing.assert_array_equal(again["x"], value["x"])
        np.testing.assert_array_equal(again["y"][0], value["y"][0])


def test_per_replica_wants_one_value_for_each(three):
    with pytest.raises(BackendError, match="2 values for 3 replicas"):
        three.per_replica([tf.zeros([]), tf.zeros([])])


@pytest.mark.parametrize("as_dataset", [False, True])
@pytest.mark.parametrize("examples", [0, 1, 2, 3, 10, 11, 12])
@pytest.mark.parametrize("backend", BACKENDS)
def test_distribute_deals_out_every_example(comms, backend, examples, as_dataset):
    comm = comms[backend]
    x = np.arange(examples * 2, dtype="float32").reshape(examples, 2)
    batches = [(x, {"label": np.arange(examples)})]
    if as_dataset:
        batches = tf.data.Dataset.from_tensors((x, {"label": np.arange(examples)}))
    distributed = comm.distribute(batches)
    assert len(distributed) == 1
    for _ in range(2):  # epochs
        (batch,) = distributed
        shares = comm.local_values(batch)
        sizes = [len(s[0]) for s in shares]
        assert len(sizes) == comm.size
        assert sum(sizes) == examples
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True)
        np.testing.assert_array_equal(np.concatenate([s[0] for s in shares]), x)
        np.testing.assert_array_equal(np.concatenate([s[1]["label"] for s in shares]), np.arange(examples))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((), "holds no tensors"),
        ((np.zeros((4, 2)), np.float32(1)), "holds a scalar"),
        ((np.zeros((4, 2)), np.zeros(3)), r"number of examples: shapes \(4, 2\), \(3,\)"),
        ((tf.sparse.from_dense(np.eye(3)),), "SparseTensor, which cannot be shared out"),
    ],
)
def test_batches_that_cannot_be_shared_out(three, batch, message):
    with pytest.raises(DataError, match=message):
        list(three.distribute([batch]))
    with pytest.raises(DataError, match=message):
        three.local_shares(batch)
