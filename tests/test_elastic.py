"""Workers that die, hang, come and go while a training runs: real processes, on aliases of this machine, by Horovod's driver."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import horovod.runner.elastic.driver
import keras
import numpy as np
import tensorflow as tf
from horovod.runner.common.util.secret import make_secret_key
from horovod.runner.elastic.discovery import FixedHosts, HostManager
from horovod.runner.elastic.worker import WorkerNotificationService

from disttrain.comm.connections import Connections
from disttrain.data import digits
from disttrain.launcher.driver import Driver, Registry

SCRIPT = Path(__file__).parent / "ranks" / "elastic.py"
EXAMPLES, BATCH = 1437, 100
STEPS_OF_EPOCH = -(-EXAMPLES // BATCH)


class Elastic:
    """A job of `disttrain run`, and the list of hosts that its discovery script prints."""

    def __init__(self, folder, steps, hosts, *options, **environment):
        self.folder, self._hosts = folder, folder / "hosts"
        self.set_hosts(hosts)
        script = folder / "discover.sh"
        script.write_text(f"#!/bin/sh\ncat {self._hosts}\n")
        script.chmod(0o755)
        words = ["--host-discovery-script", script, *options, "--", sys.executable, SCRIPT, folder, steps]
        self._output = folder / "output"
        with self._output.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "disttrain.cli", "run", *map(str, words)],
                env=os.environ | environment | {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        # SIGTERM ends the ranks as well; what does not end by it is found by its command line.
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        self.process.kill()
        self.process.wait()
        for pid in self.alive():
            os.kill(pid, signal.SIGKILL)

    @property
    def output(self):
        return self._output.read_text()

    def set_hosts(self, lines):
        # As a whole: the script must not see a half of it.
        fresh = self._hosts.with_suffix(".new")
        fresh.write_text("".join(f"{line}\n" for line in lines))
        fresh.rename(self._hosts)

    def alive(self):
        """Processes that train."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes().decode().split("\0")
                if words[1:3] == [str(SCRIPT), str(self.folder)]:
                    found.append(int(process.name))
        return found

    def worker_on(self, host):
        """A living process of the host, as Horovod calls it."""
        (pid,) = (p for p in self.alive() if (self.folder / f"here-{p}").read_text() == host)
        return pid

    def wait_for(self, ranks, more_steps=5, seconds=120):
        """Until so many ranks have together done a few steps."""
        until, since = time.monotonic() + seconds, max((note["step"] for note in self.notes()), default=0)
        while True:
            steps = [note["step"] for note in self.notes() if note["ranks"] == ranks and note["step"] > since]
            if steps and max(steps) >= min(steps) + more_steps:
                return
            assert self.process.poll() is None, self.output
            assert time.monotonic() < until, f"{len(self.alive())} alive; {self.output}"
            time.sleep(0.1)

    def wait_for_end_of(self, pid, seconds=60):
        until = time.monotonic() + seconds
        while pid in self.alive():
            assert time.monotonic() < until, self.output
            time.sleep(0.1)

    def notes(self):
        for path in self.folder.glob("seen-*.jsonl"):
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError):  # a line that is being written, or was when the rank was killed
                    yield json.loads(line)

    def ended(self, seconds=90):
        code = self.process.wait(seconds)
        until = time.monotonic() + 5
        while self.alive() and time.monotonic() < until:
            time.sleep(0.1)
        assert not self.alive(), "left behind"
        return code

    def check_steps(self, last):
        """What has gone into the gradient of every step is what should have, whoever was there."""
        by_step = {}
        for note in self.notes():
            found = {name: note[name] for name in ("examples", "a", "b", "c")}
            assert by_step.setdefault(note["step"], found) == found
        assert sorted(by_step) == list(range(1, last + 1))
        for step, found in by_step.items():
            ids = batch_of(step)
            assert found == {
                "examples": len(ids),
                "a": int((ids % 1009).sum()),
                "b": int((ids * 7 % 1009).sum()),
                "c": int((ids * 331 % 1009).sum()),
            }


def batch_of(step):
    """The examples of a step, from 1."""
    epoch, number = divmod(step - 1, STEPS_OF_EPOCH)
    order = np.random.default_rng([4, epoch]).permutation(EXAMPLES)
    return order[number * BATCH : (number + 1) * BATCH]


def losses_of_one_device(steps):
    """The losses of a plain loop on the same global batches."""
    keras.utils.set_random_seed(11)
    (images, labels), _ = digits.load()
    layers = [keras.layers.Flatten(), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)]
    model = keras.Sequential([keras.Input((8, 8, 1)), *layers])
    optimizer, found = keras.optimizers.Adam(3e-3), []
    for step in range(1, steps + 1):
        x, y = images[batch_of(step)], labels[batch_of(step)]
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(y, model(x), from_logits=True))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        found.append(float(loss))
    return found


def test_who_waits_in_a_connection_that_is_cut_learns_of_it():
    """Only in those that were opened meanwhile, and that are still what they were."""
    connections, before = Connections(), socket.socketpair()
    with connections.opened():
        mine, closed = socket.socketpair(), socket.socketpair()
    number = closed[0].fileno()
    closed[0].close()
    later = socket.socketpair()  # takes the number that has become free
    assert number in (later[0].fileno(), later[1].fileno())
    heard = []
    thread = threading.Thread(target=lambda: heard.append(mine[0].recv(1)))
    thread.start()
    connections.cut()
    thread.join(10)
    assert heard == [b""]
    for one, other in (before, later):
        one.sendall(b"x")
        assert other.recv(1) == b"x"


class Job:
    """What Horovod's registry of ranks asks of its driver."""

    resumed = 0

    def finished(self):
        return False

    def resume(self):
        self.resumed += 1


def until_true(holds, seconds=20):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_host_whose_last_rank_fails_while_ranks_meet_is_taken_away():
    job, hosts = Job(), HostManager(FixedHosts({"a": 1, "b": 1}))
    hosts.update_available_hosts()
    ranks = Registry(job, hosts)
    ranks.reset(2)

    def record(what, host):
        def call():
            with contextlib.suppress(RuntimeError):  # that the rank is in another state by now
                what(host, 0)

        threading.Thread(target=call, daemon=True).start()

    record(ranks.record_ready, "b")
    until_true(lambda: ranks.count("READY") == 1)
    record(ranks.record_failure, "b")
    until_true(lambda: ranks.count("FAILURE") == 1)
    record(ranks.record_ready, "a")
    until_true(lambda: job.resumed == 1)
    assert ranks.again == set()
    assert (hosts.is_blacklisted("a"), hosts.is_blacklisted("b")) == (False, True)


def test_rank_0_hears_of_hosts_that_came_before_it_could_listen(monkeypatch):
    class Rendezvous:
        def init(self, slots):
            pass

        def stop(self):
            pass

    class Told:
        count = 0

        def handle_hosts_updated(self, timestamp, result):
            self.count += 1

    monkeypatch.setattr(horovod.runner.elastic.driver, "WorkerStateRegistry", Registry)  # as `main` does
    hosts, told, key = FixedHosts({"localhost": 1}), Told(), make_secret_key()
    service = WorkerNotificationService(key, None, told)
    driver = Driver(Rendezvous(), hosts, 1, 4)
    try:
        driver.start(1, lambda slot, events: (events[0].wait() and 0, time.time()))
        hosts.set({"localhost": 1, "127.0.0.1": 1})
        until_true(lambda: len(driver._host_manager.current_hosts.available_hosts) == 2)
        for _ in range(2):
            driver.register_worker_server("localhost", 0, service.addresses(), key)
        assert told.count == 2
        driver.resume()  # the ranks have met anew
        driver.register_worker_server("localhost", 0, service.addresses(), key)
        assert told.count == 2
    finally:
        driver.stop()
        service.shutdown()


def test_two_workers_then_one_then_three_end_where_one_device_does(tmp_path):
    """All of it within one epoch of 15 steps, of which a worker is killed in the first third."""
    steps = 2 * STEPS_OF_EPOCH
    with Elastic(
        tmp_path, steps, ["localhost:1", "127.0.0.1:1"], "-np", "2", "--max-np", "3", STEP_SECONDS="0.7"
    ) as job:
        job.wait_for(2, more_steps=2)
        os.kill(job.worker_on("127.0.0.1"), signal.SIGKILL)
        job.wait_for(1, more_steps=1)
        job.set_hosts(["localhost:3"])
        job.wait_for(3, more_steps=1)
        first_of_three = min(note["step"] for note in job.notes() if note["ranks"] == 3)
        assert first_of_three <= STEPS_OF_EPOCH, "not within one epoch: the steps are too fast for this machine"
        assert job.ended() == 0, job.output
    assert "was killed by signal 9 (SIGKILL); 1 goes on" in job.output
    assert "3 ranks" in job.output
    job.check_steps(steps)
    # As many micro-batches of the whole batch as before, where they can be divided: two ranks had two each.
    parts = {note["ranks"]: note["parts"] for note in job.notes()}
    assert parts == {2: 2, 1: 4, 3: 2}
    ends = [np.load(path) for path in tmp_path.glob("end-*.npz")]
    assert len(ends) == 3
    for name in ends[0].files:
        assert np.isfinite(ends[0][name]).all()
        assert len({end[name].tobytes() for end in ends}) == 1
    summaries = [json.loads(path.read_text()) for path in tmp_path.glob("end-*.json")]
    assert {s["examples"] for s in summaries} == {2 * EXAMPLES}
    losses = {note["step"]: note["loss"] for note in job.notes()}
    np.testing.assert_allclose([losses[s] for s in range(1, steps + 1)], losses_of_one_device(steps), rtol=1e-4)


def test_a_worker_that_hangs_one_whose_slot_goes_and_a_signal_that_ends_all(tmp_path):
    hosts = ["localhost:2", "127.0.0.1:1"]
    with Elastic(tmp_path, 5000, hosts, "--max-np", "3", STALL_TIMEOUT="6", CHECKPOINTS="1") as job:
        job.wait_for(3)
        os.kill(job.worker_on("127.0.0.1"), signal.SIGSTOP)
        job.wait_for(2)
        assert "was killed by signal 9 (SIGKILL); 2 go on" in job.output
        job.set_hosts(["localhost:1"])
        job.wait_for(1)
        job.process.send_signal(signal.SIGTERM)
        assert job.ended() == 75, job.output
    assert "all ranks have saved and can go on from there" in job.output
    steps = max(note["step"] for note in job.notes())
    assert (tmp_path / "checkpoints" / f"step-{steps:09d}").is_dir()
    job.check_steps(steps)


def test_the_last_worker_of_a_host_goes_on_while_another_is_started_beside_it(tmp_path):
    with Elastic(tmp_path, 5000, ["localhost:2"], "--max-np", "2", "--restarts", "0", CHECKPOINTS="1") as job:
        job.wait_for(2)
        killed = min(job.alive())  # the first to come, which is rank 0
        os.kill(killed, signal.SIGKILL)
        job.wait_for(2)
        assert killed not in job.alive()
        job.process.send_signal(signal.SIGTERM)
        assert job.ended() == 75, job.output
    assert "was killed by signal 9 (SIGKILL); 1 goes on" in job.output
    job.check_steps(max(note["step"] for note in job.notes()))


def test_a_worker_that_is_asked_to_end_leaves_and_the_others_go_on(tmp_path):
    """As a node that is to be taken away asks its own."""
    words = ["-np", "3", "--max-np", "3", "--restarts", "0"]
    with Elastic(tmp_path, 5000, ["localhost:2", "127.0.0.1:1"], *words, CHECKPOINTS="1") as job:
        job.wait_for(3)
        asked = job.worker_on("127.0.0.1")
        os.kill(asked, signal.SIGTERM)
        job.wait_for_end_of(asked)
        job.set_hosts(["localhost:2"])  # or another would come in its place by and by
        job.wait_for(2)
        job.process.send_signal(signal.SIGTERM)
        assert job.ended() == 75, job.output
    assert "was killed" not in job.output
    job.check_steps(max(note["step"] for note in job.notes()))


def test_a_worker_that_is_lost_in_the_validation_is_replaced_and_all_end_together(tmp_path):
    """The one in its place has done no step, and yet does what the others do after the last."""
    words = ["--max-np", "2", "--restarts", "0"]
    with Elastic(tmp_path, 12, ["localhost:2"], *words, CHECKPOINTS="1", VALIDATE="1") as job:
        until = time.monotonic() + 120
        while len(list(tmp_path.glob("validating-*"))) < 2:
            assert job.process.poll() is None, job.output
            assert time.monotonic() < until, job.output
            time.sleep(0.05)
        os.kill(max(job.alive()), signal.SIGKILL)
        assert job.ended() == 0, job.output
    assert job.output.count("was killed by signal 9 (SIGKILL); 1 goes on") == 1
    summaries = [json.loads(path.read_text()) for path in tmp_path.glob("end-*.json")]
    assert len(summaries) == 2
    assert summaries[0]["validation"] == summaries[1]["validation"]
    assert {s["steps"] for s in summaries} == {12}
    job.check_steps(12)


def test_a_signal_that_ends_all_ends_one_that_is_being_started_too(tmp_path):
    words = ["--max-np", "2", "--restarts", "0", "--grace", "60"]
    with Elastic(tmp_path, 5000, ["localhost:2"], *words, CHECKPOINTS="1") as job:
        job.wait_for(2)
        os.kill(max(job.alive()), signal.SIGKILL)
        until_true(lambda: "1 goes on" in job.output, 30)
        struck = time.monotonic()
        job.process.send_signal(signal.SIGTERM)
        assert job.ended() == 75, job.output
    assert time.monotonic() - struck < 55, "one of them had to be told at the end of the grace period"
    assert "all ranks have saved and can go on from there" in job.output
    job.check_steps(max(note["step"] for note in job.notes()))


def test_when_all_are_gone_the_next_attempt_goes_on_from_the_checkpoint(tmp_path):
    words = ["--max-np", "2", "--restarts", 1]
    with Elastic(tmp_path, 60, ["localhost:2"], *words, STEP_SECONDS="0.2", CHECKPOINTS="1") as job:
        job.wait_for(2)
        for pid in job.alive():
            os.kill(pid, signal.SIGKILL)
        assert job.ended() == 0, job.output
    assert "was killed by signal 9 (SIGKILL)" in job.output
    assert "disttrain: starting again, 1 of 1" in job.output
    job.check_steps(60)


def test_a_mistake_in_the_program_ends_the_job_and_is_named(tmp_path):
    with Elastic(tmp_path, 60, ["localhost:1", "127.0.0.1:1"], "--max-np", "2", "--restarts", 0, FAIL_AT="4") as job:
        assert job.ended(120) == 1, job.output
    assert "a mistake of step 4" in job.output
    assert "ended with exit code 1" in job.output
    refused = [path.read_text() for path in tmp_path.glob("refused-*")]
    assert len(refused) >= 2
    assert all("use dt.data.Batches, or shuffle(..., reshuffle_each_iteration=False)" in text for text in refused)
