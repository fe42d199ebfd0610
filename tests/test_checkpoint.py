"""Checkpoints: a training that was interrupted goes on bit for bit, and nothing that happens to a disk loses what was saved."""

import functools
import logging
import os
import re
import shutil
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

import disttrain as dt
from disttrain.data.batches import Batches
from disttrain.errors import ConfigError, DataError, Preempted

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


# What may happen to files ----------------------------------------------------------------------------------------------


def damage(folder, how):
    data, state = folder / "variables.data-00000-of-00001", folder / "state.json"
    if how == "truncated":
        os.truncate(data, data.stat().st_size - 1)
    elif how == "a byte flipped":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif how == "a file missing":
        data.unlink()
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


@pytest.mark.parametrize("how", ["truncated", "a byte flipped", "a file missing", "state missing", "state changed"])
def test_a_damaged_checkpoint_is_passed_over(saved, tmp_path, caplog, how):
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    content = lambda: [path.read_bytes() for path in sorted((tmp_path / "step-000000004").iterdir())]  # noqa: E731
    before = content()
    damage(tmp_path / "step-000000004", how)
    assert content() != before
    with caplog.at_level(logging.WARNING, "disttrain"):
        found = dt.Checkpointer(tmp_path).latest()
    assert found.folder.name == "step-000000002"
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
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], check=True)
    try:
        with caplog.at_level(logging.WARNING, "disttrain"):
            train(make(local, dt.Checkpointer(disk, every_steps=1)), Batches(columns(), 8), steps=2)
            assert caplog.text == ""
            (disk / "ballast").write_bytes(b"x" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
            said = train(make(local, dt.Checkpointer(disk, every_steps=1)), Batches(columns(), 8), steps=4)
        assert said["steps"] == 4
        assert re.search(r"no checkpoint of step 3 in \S+ \(.*No space left on device\); training goes on, the last one is \S+2$",
                         caplog.text, re.MULTILINE)  # fmt: skip
        assert sorted(path.name for path in disk.iterdir()) == ["ballast", "step-000000001", "step-000000002"]
        assert dt.Checkpointer(disk).latest().folder.name == "step-000000002"
    finally:
        subprocess.run(["umount", disk], check=True)


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
    return subprocess.Popen(
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
