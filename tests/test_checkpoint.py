"""Checkpoints: a training that was interrupted goes on bit for bit, and nothing that happens to a disk loses what was saved."""

import contextlib
import functools
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import keras
import numpy as np
import problem
import pytest
import reference
import tensorflow as tf
from helpers import relative_error, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

import disttrain as dt
from disttrain.checkpoint import checkpointer, files
from disttrain.data.batches import Batches
from disttrain.errors import ConfigError, DataError, Preempted
from launch import Started, launch, start

EXAMPLES, EPOCHS = 29, 3  # of 8 examples: four batches, the last of five


class StruckError(Exception):
    pass


def columns():
    rng = np.random.default_rng(0)
    return rng.normal(size=(EXAMPLES, 6)).astype("float32"), rng.integers(0, 3, EXAMPLES)


def make(comm, checkpoint=None, width=5):
    """A model with all kinds of state: weights, Adam's slots and schedule, moving statistics, seeds of dropout, noise."""
    keras.utils.set_random_seed(3)
    keras.backend.clear_session(free_memory=False)
    with comm.scope():
        layers = [keras.Input((6,)), keras.layers.Dense(width), keras.layers.BatchNormalization()]
        model = keras.Sequential([*layers, keras.layers.Dropout(0.5), keras.layers.Dense(3)])
        optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, 12))
    loss_fn = dt.losses.sparse_categorical_crossentropy()
    noise = dt.transforms.add_noise(0.01, seed=1)
    step = dt.TrainStep(model, optimizer, loss_fn=loss_fn, comm=comm, after_reduce=[noise], jit=False)
    return dt.Trainer(step, progress=False, checkpoint=checkpoint)


class Interrupting(Batches):
    """Raises where batch `at` should come, counted over all epochs of this process."""

    def __init__(self, at, *args, **options):
        super().__init__(*args, **options)
        self._left = at

    def epoch(self, number):
        return self._raising(super().epoch(number))

    def _raising(self, batches):
        for batch in batches:
            if self._left == 0:
                raise StruckError
            self._left -= 1
            yield batch


def train(trainer, data, **length):
    return trainer.fit(data, **(length or {"epochs": EPOCHS}))


@pytest.fixture(scope="module")
def whole(comms):
    """Backend -> state and summary of a training that nothing disturbs."""

    @functools.cache
    def run(backend):
        trainer = make(comms[backend])
        said = train(trainer, Batches(columns(), 8, seed=5))
        return snapshot(*trainer.step.state), said

    return run


@pytest.mark.parametrize(("backend", "every", "at"), [("local", 1, 6), ("local", 5, 11), ("mirrored2", 4, 8)])
def test_an_interrupted_training_goes_on_bit_for_bit(comms, whole, tmp_path, backend, every, at):
    state, said = whole(backend)
    save = lambda: dt.Checkpointer(tmp_path, every_steps=every)  # noqa: E731
    with pytest.raises(StruckError):
        train(make(comms[backend], save()), Interrupting(at, columns(), 8, seed=5))
    resumed = make(comms[backend], save())
    said_again = train(resumed, Batches(columns(), 8, seed=5))
    assert snapshot(*resumed.step.state) == state
    for name in ("steps", "epochs", "examples", "skipped", "grad_norm", "train"):
        assert said_again[name] == said[name], name


@pytest.mark.parametrize("interrupted", [2, 4, 6])  # an epoch has four batches
@pytest.mark.parametrize(
    ("shuffle", "after", "says"),
    [
        ({"seed": 1}, lambda x: x, None),
        ({"seed": 1, "reshuffle_each_iteration": False}, lambda x: x.repeat(2).take(EXAMPLES), None),
        ({"seed": 1}, lambda x: x.cache().prefetch(2), None),
        ({"seed": 1}, lambda x: x.repeat(2).take(EXAMPLES), "a stage after shuffle, such as repeat, hides it"),
        ({}, lambda x: x, "shuffle has no seed"),
    ],
)
def test_going_on_in_a_pipeline_that_shuffles(local, tmp_path, caplog, shuffle, after, says, interrupted):
    """It does so in the same order, or warns."""

    def pipeline():
        tf.random.set_seed(None)  # `make` has set one
        return after(tf.data.Dataset.from_tensor_slices(columns()).shuffle(EXAMPLES, **shuffle)).batch(8)

    whole = make(local)
    train(whole, pipeline(), steps=11)
    train(make(local, dt.Checkpointer(tmp_path)), pipeline(), steps=interrupted)
    resumed = make(local, dt.Checkpointer(tmp_path))
    with caplog.at_level(logging.WARNING, "disttrain"):
        said = train(resumed, pipeline(), steps=11)
    # Of whatever stages, the first iteration in a process is the first.
    lost = says is not None and (not shuffle or interrupted > 4)
    assert (f"in the epoch to go on in ({says}): some of its examples may be seen twice" in caplog.text) == lost
    if not lost:
        assert "may be seen twice" not in caplog.text
    assert (snapshot(*resumed.step.state) == snapshot(*whole.step.state)) == (not lost)
    assert (said["steps"], said["epochs"], said["examples"]) == (11, 3, 2 * EXAMPLES + 24)


def test_a_training_that_is_over_stays_so(local, whole, tmp_path):
    state, said = whole("local")
    for _ in range(2):
        trainer = make(local, dt.Checkpointer(tmp_path))
        assert train(trainer, Batches(columns(), 8, seed=5))["steps"] == said["steps"]
        assert snapshot(*trainer.step.state) == state


def test_a_training_may_be_made_longer(local, tmp_path):
    whole = make(local)
    train(whole, Batches(columns(), 8), steps=7)
    train(make(local, dt.Checkpointer(tmp_path)), Batches(columns(), 8), steps=3)
    longer = make(local, dt.Checkpointer(tmp_path))
    said = train(longer, Batches(columns(), 8), steps=7)
    assert (said["steps"], said["epochs"]) == (7, 2)
    assert snapshot(*longer.step.state) == snapshot(*whole.step.state)


def test_another_backend_and_number_of_replicas_may_go_on(local, two, tmp_path):
    train(make(local, dt.Checkpointer(tmp_path)), Batches(columns(), 8), steps=5)
    here = make(two, dt.Checkpointer(tmp_path))
    assert train(here, Batches(columns(), 8), steps=5)["steps"] == 5
    values = tf.train.load_checkpoint(tmp_path / "step-000000005" / "variables")  # as TensorFlow's own tools read it
    for variable in here.step.model.trainable_variables:
        np.testing.assert_array_equal(variable.numpy(), values.get_tensor(variable.path))


def test_a_run_that_was_killed_goes_on_on_other_ranks_and_backends(local, tmp_path):
    """Two ranks of Horovod are killed; three of MPI and one device go on: the update is that of one device all along."""
    struck, steps = tmp_path / "struck", 12
    with start("horovod", 2, "resume", struck, problem.STEPS, 0.1) as job:
        job.wait_for_mark(1, "step 5", timeout=200)
        os.kill(job.pid_of_rank(1), signal.SIGKILL)
        assert job.wait(timeout=240).returncode != 0
    shutil.copytree(struck, tmp_path / "alone")
    result = launch("mpi", 3, "resume", struck, steps, 0, timeout=200).check()
    begun = result.reports[0]["start"]
    assert 3 <= begun < steps
    keras.backend.clear_session(free_memory=False)  # names as in the processes of the ranks
    with local.scope():
        model, optimizer = problem.build(), problem.OPTIMIZERS["adam"]()
    step = dt.TrainStep(model, optimizer, loss_fn=problem.losses, comm=local, jit=False)
    alone = dt.Trainer(step, progress=False, checkpoint=dt.Checkpointer(tmp_path / "alone"))
    assert alone.fit(problem.batches(29), steps=steps)["steps"] == steps
    assert optimizer.iterations.numpy() == steps
    assert step._calls == steps - begun
    weights = list(
        reference.train(problem.build(), problem.OPTIMIZERS["adam"](), problem.mean_loss, problem.batches(29)[:steps])
    )
    for arrays in result.arrays:
        assert [arrays[str(i)].tobytes() for i in range(4)] == [result.arrays[0][str(i)].tobytes() for i in range(4)]
    for ended in ([result.arrays[0][str(i)] for i in range(4)], [v.numpy() for v in model.trainable_variables]):
        assert relative_error(ended, weights[0], weights[-1]) <= 1e-6


# A save holds training up for a moment alone, and is of that moment --------------------------------------------------


@pytest.fixture
def held_back(monkeypatch):
    """An event: nothing is written before it is set."""
    gate, write = threading.Event(), files.write

    def later(*args):
        assert gate.wait(60)
        write(*args)

    monkeypatch.setattr(files, "write", later)
    yield gate
    gate.set()


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("backend", ["local", "mirrored2"])
def test_what_is_saved_is_of_the_moment(comms, tmp_path, held_back, backend, jit):
    """Training goes on while the checkpoint is being written, its update compiled by XLA or not."""
    trainer = make(comms[backend], width=300)
    trainer.step._jit_setting = jit
    trainer.step._prepare()
    train(trainer, Batches(columns(), 8), steps=2)
    checkpoint = dt.Checkpointer(tmp_path)
    variables = checkpointer._named(trainer.step.state)  # Keras's, and TensorFlow's own
    values = {name: v.numpy().tobytes() for name, v in variables.items()}
    checkpoint.save(2, trainer.step.state, {})
    train(trainer, Batches(columns(), 8), steps=3)
    assert not list(tmp_path.iterdir())
    held_back.set()
    assert checkpoint.wait() == ""
    moved = [name for name, v in variables.items() if v.numpy().tobytes() != values[name]]
    assert len(moved) > len(values) - 3
    saved = tf.train.load_checkpoint(tmp_path / "step-000000002" / "variables")
    assert all(saved.get_tensor(name).tobytes() == value for name, value in values.items())


def test_variables_may_be_changed_in_any_way_while_they_are_written(tmp_path, held_back):
    """Assigned, added to, scattered into, updated by Keras's optimizers, whole or by rows, and by XLA."""
    ways = {
        "assign": lambda v: v.assign(tf.zeros_like(v)),
        "assign_add": lambda v: v.assign_add(tf.ones_like(v)),
        "scatter_update": lambda v: v.scatter_update(tf.IndexedSlices(tf.zeros([1, 400]), [1])),
        "scatter_add": lambda v: v.scatter_add(tf.IndexedSlices(tf.ones([2, 400]), [0, 2])),
        "in a function": tf.function(lambda v: v.assign_sub(tf.ones_like(v)), autograph=False),
        "XLA": tf.function(lambda v: v.assign(2.0 * v + 1.0), autograph=False, jit_compile=True),
        "slice": lambda v: v[1].assign(tf.zeros([400])),
    }
    variables = {name: tf.Variable(tf.random.normal([300, 400]), name=name.replace(" ", "_")) for name in ways}
    before = {v.name.removesuffix(":0"): v.numpy() for v in variables.values()}
    checkpoint = dt.Checkpointer(tmp_path)
    checkpoint.save(1, list(variables.values()), {})
    for _ in range(2):
        for name, way in ways.items():
            way(variables[name])
    held_back.set()
    assert checkpoint.wait() == ""
    saved = tf.train.load_checkpoint(tmp_path / "step-000000001" / "variables")
    for variable in variables.values():
        name = variable.name.removesuffix(":0")
        assert variable.numpy().tobytes() != before[name].tobytes(), name
        assert saved.get_tensor(name).tobytes() == before[name].tobytes(), name


def test_a_save_copies_nothing(tmp_path, held_back):
    variable = tf.Variable(tf.zeros([50_000_000]), name="large")  # 200 MB
    checkpoint = dt.Checkpointer(tmp_path)
    start = time.perf_counter()
    copied = np.array(variable.numpy())
    copying, start = time.perf_counter() - start, time.perf_counter()
    checkpoint.save(1, [variable], {})
    assert time.perf_counter() - start < copying / 4
    held_back.set()
    checkpoint.wait()
    saved = tf.train.load_checkpoint(tmp_path / "step-000000001" / "variables")
    assert saved.get_tensor("large").tobytes() == copied.tobytes()


def test_the_thread_that_writes_gives_way(tmp_path, monkeypatch):
    seen = []
    nice = lambda *args: seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))  # noqa: E731
    monkeypatch.setattr(files, "write", nice)
    checkpoint = dt.Checkpointer(tmp_path)
    checkpoint.save(1, [tf.Variable(1.0, name="x")], {})
    checkpoint.wait()
    assert seen == [os.getpriority(os.PRIO_PROCESS, 0) + 10]


# For others to use -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["local", "mirrored2"])
def test_export(comms, tmp_path, backend):
    """The model of a checkpoint, read by plain Keras and served by plain TensorFlow."""
    checkpoint = dt.Checkpointer(tmp_path / "checkpoints", every_steps=2)
    trainer = make(comms[backend], checkpoint)
    train(trainer, Batches(columns(), 8), steps=4)
    x = columns()[0]
    wanted = np.asarray(trainer.step.model(x))
    fresh = make(comms[backend]).step.model
    assert not np.allclose(fresh(x), wanted, atol=1e-3)
    for name in ("model.keras", "served"):
        assert checkpoint.export(fresh, tmp_path / "out" / name).folder.name == "step-000000004"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.keras", "served"]
    script = (
        "import keras, numpy as np, sys, tensorflow as tf; x = np.load(sys.argv[1]);"
        "served = tf.saved_model.load(sys.argv[3]);"
        "np.save(sys.argv[4], [keras.models.load_model(sys.argv[2])(x), served.serve(x)])"
    )
    np.save(tmp_path / "x.npy", x)
    paths = [tmp_path / name for name in ("x.npy", "out/model.keras", "out/served", "seen.npy")]
    subprocess.run(
        [sys.executable, "-c", script, *map(str, paths)], check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""}
    )
    for seen in np.load(tmp_path / "seen.npy"):
        np.testing.assert_allclose(seen, wanted, rtol=1e-6, atol=1e-6)


def test_export_of_a_given_checkpoint_over_what_was_exported_before(local, saved, tmp_path):
    checkpoint, model = dt.Checkpointer(saved[0]), make(local).step.model
    for name in ("model.keras", "served"):
        for step in (4, 2):
            folder = saved[0] / f"step-{step:09d}"
            checkpoint.export(model, tmp_path / name, checkpointer.Saved(folder, files.read_state(folder)))
    values = tf.train.load_checkpoint(saved[0] / "step-000000002" / "variables")
    kernel = values.get_tensor(model.layers[0].kernel.path)
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "model.keras").layers[0].kernel.numpy(), kernel)
    np.testing.assert_array_equal(tf.saved_model.load(tmp_path / "served").variables[0].numpy(), kernel)


def test_export_of_what_is_not_there(local, saved, tmp_path):
    model = make(local).step.model
    with pytest.raises(DataError, match=r"there is no whole checkpoint in \S+: nothing to export"):
        dt.Checkpointer(tmp_path / "empty").export(model, tmp_path / "model.keras")
    with pytest.raises(DataError, match=r"dense/kernel has shape \(6, 5\) in it and \(6, 7\) here"):
        dt.Checkpointer(saved[0]).export(make(local, width=7).step.model, tmp_path / "model.keras")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConfigError, match="the model has no variables yet"):
        dt.Checkpointer(saved[0]).export(keras.Sequential([keras.layers.Dense(3)]), tmp_path / "model.keras")
    with pytest.raises(DataError, match=r"cannot write \S+file/model.keras"):
        dt.Checkpointer(saved[0]).export(model, tmp_path / "file" / "model.keras")


# What may happen to files ----------------------------------------------------------------------------------------------


def damage(folder, how):
    data, state = folder / "variables.data-00000-of-00001", folder / "state.json"
    if how == "truncated":
        os.truncate(data, data.stat().st_size - 1)
    elif how == "a byte flipped":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif how == "a shard missing":
        data.unlink()
    elif how == "the index missing":
        (folder / "variables.index").unlink()
    elif how == "a byte of the index flipped":
        content = bytearray((folder / "variables.index").read_bytes())
        content[len(content) // 2] ^= 1
        (folder / "variables.index").write_bytes(content)
    elif how == "a byte more":
        data.write_bytes(data.read_bytes() + b"0")
    elif how == "all of it gone":
        for path in folder.iterdir():
            path.unlink()
    elif how == "state missing":
        state.unlink()
    elif how == "state changed":
        state.write_text(state.read_text().replace('\\"steps\\": 4', '\\"steps\\": 3'))


@pytest.fixture(scope="module")
def saved(comms, tmp_path_factory):
    """A folder with checkpoints of steps 2 and 4, and the state after step 4."""
    folder = tmp_path_factory.mktemp("saved")
    trainer = make(comms["local"], dt.Checkpointer(folder, every_steps=2))
    train(trainer, Batches(columns(), 8), steps=4)
    return folder, snapshot(*trainer.step.state)


DAMAGES = [
    *("truncated", "a byte flipped", "a byte more", "a shard missing", "the index missing"),
    *("a byte of the index flipped", "state missing", "state changed", "all of it gone"),
]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(saved, tmp_path, caplog, how):
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    content = lambda: [path.read_bytes() for path in sorted((tmp_path / "step-000000004").iterdir())]  # noqa: E731
    before = content()
    damage(tmp_path / "step-000000004", how)
    assert content() != before
    with caplog.at_level(logging.WARNING, "disttrain"):
        found = dt.Checkpointer(tmp_path).latest()
    assert found.folder.name == "step-000000002"
    assert len(caplog.records) == 1
    assert re.search(r"the checkpoint of step 4 is passed over: \S+ (has changed since|is not a whole)", caplog.text)


def test_training_goes_on_from_the_one_before_a_damaged_one(local, saved, tmp_path):
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "step-000000004", "a byte flipped")
    again = make(local, dt.Checkpointer(tmp_path, every_steps=2))
    train(again, Batches(columns(), 8), steps=4)
    assert snapshot(*again.step.state) == saved[1]
    assert dt.Checkpointer(tmp_path).latest().folder.name == "step-000000004"


def test_a_full_disk_costs_a_warning(local, tmp_path, caplog):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with caplog.at_level(logging.WARNING, "disttrain"):
            train(make(local, dt.Checkpointer(disk, every_steps=1)), Batches(columns(), 8), steps=2)
            assert caplog.text == ""
            if mounted:
                (disk / "ballast").write_bytes(b"x" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
            else:  # a machine on which nobody may mount: a file that cannot grow
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
            said = train(make(local, dt.Checkpointer(disk, every_steps=1)), Batches(columns(), 8), steps=4)
        assert said["steps"] == 4
        reason = r"\(.*(?:No space left on device|File too large)\)"
        warning = rf"no checkpoint of step 3 in \S+ {reason}; training goes on, the last one is \S+2$"
        assert re.search(warning, caplog.text, re.MULTILINE)
        left = ["step-000000001", "step-000000002"]
        assert sorted(path.name for path in disk.iterdir()) == ["ballast"] * mounted + left
        assert dt.Checkpointer(disk).latest().folder.name == "step-000000002"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if mounted:
            subprocess.run(["umount", disk], check=True)


@contextlib.contextmanager
def somebody_else():
    """Files are somebody else's within it: root may do anything otherwise."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@contextlib.contextmanager
def read_only(folder):
    """As a disk is that was mounted so, or that the kernel has given up on."""
    if subprocess.run(["mount", "--bind", folder, folder], capture_output=True, check=False).returncode:
        with no_permission(folder):  # a machine on which nobody may mount
            yield
        return
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@contextlib.contextmanager
def no_permission(folder):
    folder.chmod(0o555)
    with somebody_else():
        yield
    folder.chmod(0o755)


@pytest.mark.parametrize("cannot", [read_only, no_permission])
def test_a_folder_that_may_not_be_written_costs_a_warning(local, saved, caplog, cannot):
    """Training goes on, the old checkpoints are as they were, and the end says what was not saved."""
    with tempfile.TemporaryDirectory() as name:  # not pytest's: those are closed to somebody else
        Path(name).chmod(0o755)
        folder = Path(name) / "checkpoints"
        shutil.copytree(saved[0], folder)
        content = lambda: {path: path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}  # noqa: E731
        before, trainer = content(), make(local, dt.Checkpointer(folder, every_steps=2))
        with cannot(folder), caplog.at_level(logging.WARNING, "disttrain"):
            said = train(trainer, Batches(columns(), 8), steps=7)
        assert content() == before
    assert said["steps"] == 7
    assert re.match(r"no checkpoint of step 7 in \S+ \((Read-only file system|Permission denied)\)$", said["unsaved"])
    first, last, end = (record.getMessage() for record in caplog.records)
    assert re.match(
        r"no checkpoint of step 6 in \S+ \(.*\); training goes on, the last one is \S+step-000000004$", first
    )
    assert re.match(r"no checkpoint of step 7 in", last)
    assert re.match(r"the training is done, but no checkpoint of step 7 in .*: save the model elsewhere$", end)


def test_a_folder_that_may_not_be_read_is_no_empty_one(local, saved):
    """Nobody would want a training to start anew because of that."""
    with tempfile.TemporaryDirectory() as name:
        shutil.copytree(saved[0], Path(name) / "checkpoints")
        Path(name).chmod(0o000)
        trainer = make(local, dt.Checkpointer(Path(name) / "checkpoints"))
        with (
            somebody_else(),
            pytest.raises(DataError, match=r"cannot look for checkpoints in \S+ \(Permission denied\)"),
        ):
            train(trainer, Batches(columns(), 8), steps=5)
        Path(name).chmod(0o700)


def test_a_disk_that_is_full_at_the_end_is_no_success(tmp_path):
    """`disttrain train` saves the model, and says with its exit code that the training cannot be made longer."""
    (tmp_path / "checkpoints").write_text("no folder")
    words = ["train", "digits", "--steps", "2", "--backend", "local", "--resume", "auto", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "disttrain.cli", *words], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 1, done.stderr
    assert re.search(r"^disttrain: error: no checkpoint of step 2 in .*though the training is done", done.stderr, re.M)
    assert "Traceback" not in done.stderr
    assert keras.models.load_model(tmp_path / "digits.keras").count_params() > 0
    assert json.loads((tmp_path / "summary.json").read_text())["unsaved"].startswith("no checkpoint of step 2 in")


def test_what_killed_runs_have_left_is_taken_away(local, saved, tmp_path):
    """When a training saves there, not when somebody looks; and what this process is writing stays."""
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "step-000000004", tmp_path / ".step-000000004.old")
    for step in (1, 9):
        (tmp_path / f".step-{step:09d}.partial").mkdir()
    (tmp_path / ".step-000000001.gone").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    assert dt.Checkpointer(tmp_path).latest().folder.name == "step-000000004"
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    files._being_written.add(tmp_path / ".step-000000009.partial")
    try:
        train(make(local, dt.Checkpointer(tmp_path)), Batches(columns(), 8), steps=5)
    finally:
        files._being_written.clear()
    left = [".step-000000009.partial", "step-000000002", "step-000000004", "step-000000005"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_a_checkpoint_that_is_being_taken_away_is_none(local, saved, tmp_path, caplog, monkeypatch):
    """A process that is killed meanwhile leaves half of it."""
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)

    def killed(folder, **options):
        for path in folder.glob("variables*"):
            path.unlink()

    monkeypatch.setattr(shutil, "rmtree", killed)
    files.remove(tmp_path / "step-000000002")
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step-000000002.gone", "step-000000004"]
    assert [step for step, _ in files.find(tmp_path)] == [4]
    train(make(local, dt.Checkpointer(tmp_path)), Batches(columns(), 8), steps=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000004", "step-000000005"]


def test_a_kill_between_the_two_renames_loses_nothing(local, saved, tmp_path):
    """The new one was not there yet when the old one of the same step had left its place."""
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "step-000000002")
    (tmp_path / "step-000000004").rename(tmp_path / ".step-000000004.old")
    shutil.copytree(tmp_path / ".step-000000004.old", tmp_path / ".step-000000004.partial")
    found = dt.Checkpointer(tmp_path).latest()
    assert (found.folder.name, found.state["run"]["steps"]) == (".step-000000004.old", 4)
    again = make(local, dt.Checkpointer(tmp_path, keep=2))
    train(again, Batches(columns(), 8), steps=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000004", "step-000000005"]
    assert dt.Checkpointer(tmp_path / "..").latest() is None
    assert files.read_state(tmp_path / "step-000000004")["run"]["steps"] == 4


def test_what_merely_could_not_be_read_is_not_taken_away(local, saved, tmp_path, caplog, monkeypatch):
    """A disk that fails for a moment: the one before is taken, and the newer one stays."""
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    read = files._checksum

    def failing(path):
        if path.parent.name == "step-000000004":
            raise OSError(5, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(files, "_checksum", failing)
    checkpoint = dt.Checkpointer(tmp_path)
    with caplog.at_level(logging.WARNING, "disttrain"):
        assert checkpoint.latest().folder.name == "step-000000002"
    assert re.search(r"the checkpoint of step 4 is passed over: \S+ cannot be read \(.*Input/output error", caplog.text)
    monkeypatch.undo()
    checkpoint.save(3, [tf.Variable(1.0, name="x")], {})
    checkpoint.wait()
    assert dt.Checkpointer(tmp_path).latest().folder.name == "step-000000004"


def test_a_folder_that_cannot_be_is_a_warning(local, tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    with caplog.at_level(logging.WARNING, "disttrain"):
        said = train(make(local, dt.Checkpointer(tmp_path / "file" / "x")), Batches(columns(), 8), steps=1)
    assert said["steps"] == 1
    assert "(Not a directory); training goes on, there is none yet" in caplog.text


def test_as_many_are_kept_as_were_asked_for(local, tmp_path):
    (tmp_path / ".step-000000007.partial").mkdir()  # of one that was killed while it wrote
    train(make(local, dt.Checkpointer(tmp_path, every_steps=1, keep=2)), Batches(columns(), 8), steps=5)
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-000000004", "step-000000005"]


def test_a_damaged_one_does_not_push_out_whole_ones(local, saved, tmp_path):
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "step-000000004", "truncated")
    train(make(local, dt.Checkpointer(tmp_path, keep=1)), Batches(columns(), 8), steps=3)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000000003"]


def test_the_same_model_built_again_in_one_process_is_told_why(local, tmp_path):
    """Keras counts layers on; "dense_1" of the second is "dense" of the first."""
    train(make(local, dt.Checkpointer(tmp_path)), Batches(columns(), 8), steps=1)
    keras.utils.clear_session()
    with local.scope():
        keras.Sequential([keras.Input((6,)), keras.layers.Dense(5)])
        layers = [keras.Input((6,)), keras.layers.Dense(5), keras.layers.BatchNormalization()]
        again = keras.Sequential([*layers, keras.layers.Dropout(0.5), keras.layers.Dense(3)])
    with pytest.raises(DataError, match=r"Names differ by numbers alone: keras.utils.clear_session\(\)"):
        dt.Checkpointer(tmp_path).export(again, tmp_path / "model.keras")


def test_another_model_is_refused(local, tmp_path):
    train(make(local, dt.Checkpointer(tmp_path)), Batches(columns(), 8), steps=1)
    with pytest.raises(DataError, match=r"dense/kernel has shape \(6, 5\) in it and \(6, 4\) here"):
        train(make(local, dt.Checkpointer(tmp_path), width=4), Batches(columns(), 8), steps=2)


def test_a_training_that_is_to_start_anew_does_not_mix_with_an_old_one(local, tmp_path):
    train(make(local, dt.Checkpointer(tmp_path, resume=False)), Batches(columns(), 8), steps=1)
    with pytest.raises(ConfigError, match=r"step-000000001 is there already, and this training is to start anew"):
        train(make(local, dt.Checkpointer(tmp_path, resume=False)), Batches(columns(), 8), steps=2)


@pytest.mark.parametrize("options", [{"every_steps": 0}, {"keep": 0}, {"every_minutes": 0}])
def test_numbers_out_of_range(tmp_path, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        dt.Checkpointer(tmp_path, **options)


# Being asked to end ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_saves_and_ends_after_the_step(local, tmp_path, name):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]

    class Signalling(Batches):
        def epoch(self, number):
            for i, batch in enumerate(super().epoch(number)):
                if i == 2:
                    os.kill(os.getpid(), getattr(signal, name))
                yield batch

    with pytest.raises(Preempted) as ended:
        train(make(local, dt.Checkpointer(tmp_path)), Signalling(columns(), 8))
    assert ended.value.code == 75
    assert str(ended.value) == f"asked to end ({name}): saved after step 3"
    assert dt.Checkpointer(tmp_path).latest().folder.name == "step-000000003"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == handlers


def test_what_could_not_be_saved_is_not_called_saved(local, tmp_path):
    (tmp_path / "file").write_text("no folder")

    class Signalling(Batches):
        def epoch(self, number):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().epoch(number)

    with pytest.raises(DataError, match=r"asked to end, and no checkpoint of step 1 in \S+ \(Not a directory\)"):
        train(make(local, dt.Checkpointer(tmp_path / "file" / "x")), Signalling(columns(), 8))


def test_ctrl_c_twice_ends_at_once(local, tmp_path):
    class Signalling(Batches):
        def epoch(self, number):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            return super().epoch(number)

    with pytest.raises(KeyboardInterrupt):
        train(make(local, dt.Checkpointer(tmp_path)), Signalling(columns(), 8))


def digits(folder, *options):
    words = ["-np", "2", "--launcher", "mpirun", "--", sys.executable, "-m", "disttrain.cli", "train", "digits"]
    words += ["--epochs", "4", "--batch-size", "500", "--resume", "auto", "--out", str(folder), *options]
    return Started(
        [sys.executable, "-m", "disttrain.cli", "run", *words],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_ranks_save_together_and_go_on_bit_for_bit(tmp_path):
    """`disttrain run` is asked to end while the ranks train; started again, it goes on from there."""
    with digits(tmp_path / "whole") as job:
        said, _ = job.communicate(timeout=240)
        assert job.returncode == 0, said
    folder = tmp_path / "interrupted"
    with digits(folder, "--checkpoint-every", "1") as job:
        while not list(folder.glob("checkpoints/step-*")):
            assert job.poll() is None, job.stdout.read()
        job.send_signal(signal.SIGTERM)
        said, _ = job.communicate(timeout=60)
    assert job.returncode == 75, said
    assert re.search(r"asked to end \(SIGTERM\): saved after step \d+ in", said)
    assert "all ranks have saved and can go on from there" in said
    newest = max(folder.glob("checkpoints/step-*")).name
    assert newest < "step-000000012"
    with digits(folder) as job:
        said, _ = job.communicate(timeout=240)
        assert job.returncode == 0, said
    assert f"{newest}: step" in said
    one, other = (
        tf.train.load_checkpoint(name / "checkpoints" / "step-000000012" / "variables")
        for name in (tmp_path / "whole", folder)
    )
    names = one.get_variable_to_shape_map()
    assert len(names) > 20
    assert names == other.get_variable_to_shape_map()
    assert all(one.get_tensor(name).tobytes() == other.get_tensor(name).tobytes() for name in names)


# Data ------------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 5), st.integers(0, 3), st.data())
def test_every_example_of_an_epoch_is_seen_once(examples, batch_size, ranks, epoch, data):
    """Over any number of ranks, ragged ends and fewer examples than ranks included, interrupted anywhere or not."""
    from disttrain.comm.shares import split

    batches = Batches((np.arange(examples),), batch_size, seed=1)
    cut = data.draw(st.integers(0, len(batches)))
    before = list(batches.epoch(epoch).take(cut))
    after = list(Batches((np.arange(examples),), batch_size, seed=1).epoch(epoch).skip(cut))
    seen = [share[0].numpy() for batch in before + after for share in split(batch, ranks)]
    assert sorted(np.concatenate(seen)) == list(range(examples))
    assert len(before + after) == len(batches)


def test_every_epoch_has_an_order_of_its_own():
    batches = Batches((np.arange(50),), 50, seed=1)
    one, other = (next(iter(batches.epoch(number)))[0].numpy() for number in (0, 1))
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(one, next(iter(Batches((np.arange(50),), 50, seed=1).epoch(0)))[0])
    assert not np.array_equal(one, next(iter(Batches((np.arange(50),), 50, seed=2).epoch(0)))[0])
    np.testing.assert_array_equal(next(iter(Batches((np.arange(50),), 50, shuffle=False)))[0], np.arange(50))


def test_columns_that_do_not_fit():
    with pytest.raises(DataError, match=r"the arrays of a data set hold \[3, 4\] examples"):
        Batches((np.zeros(3), np.zeros(4)), 2)
    with pytest.raises(DataError, match=r"hold \[0\] examples"):
        Batches((np.zeros(0),), 2)
