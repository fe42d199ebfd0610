"""`disttrain run` over ssh on three hosts, which are network namespaces of this machine: exact, fast on a slow link, and never a
success that was none."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import lab
import numpy as np
import pytest
from helpers import relative_error

HERE = Path(__file__).parent
PROGRAMS = str(HERE / "ranks" / "programs.py")
WHY_NOT = lab.why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
THREE = ["-np", "3", "-H", "h1:1,h2:1,h3:1"]
# Seconds from a fault to the end of everything.
LIMIT = 30


@pytest.fixture(scope="module")
def hosts():
    with lab.Lab(3) as found:
        yield found


def start(hosts, *options, program, **environment):
    environment = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", **environment}
    words = [sys.executable, "-m", "disttrain.cli", "run", *options, "--", "python", *program]
    return hosts.start("h1", *words, environment=environment)


def run(hosts, *options, program, seconds=240, **environment):
    with start(hosts, *options, program=program, **environment) as job:
        return finish(hosts, job, seconds)


def finish(hosts, job, seconds=60):
    """Exit code, output, and what is left on the hosts."""
    output, _ = job.communicate(timeout=seconds)
    return job.returncode, output, hosts.wait_until_empty(5)


def wait_for(job, text, count):
    said, until = "", time.monotonic() + 60
    while said.count(text) < count:
        assert time.monotonic() < until, said
        line = job.stdout.readline()
        assert line, said
        said += line


# Training --------------------------------------------------------------------------------------------------------------


DIGITS = str(HERE / "ranks" / "digits.py")


@pytest.fixture(scope="module")
def one(hosts, tmp_path_factory):
    """Weights before and after, of one process."""
    file = str(tmp_path_factory.mktemp("one") / "weights")
    code, output, _ = run(hosts, "-np", "1", "--launcher", "local", program=[DIGITS, "local", file])
    assert code == 0, output
    return tuple(np.load(f"{file}.npz").values())


@pytest.mark.parametrize(("backend", "launcher"), [("horovod", "mpirun"), ("horovod", "horovodrun"), ("mpi", "mpirun")])
def test_digits_on_three_hosts_are_those_of_one_process(hosts, one, tmp_path, backend, launcher):
    file = str(tmp_path / "three")
    code, output, left = run(hosts, *THREE, "--launcher", launcher, program=[DIGITS, backend, file])
    assert (code, left) == (0, {}), output
    assert "3 ranks on 3 hosts came to their end" in output
    (before, wanted), (same, got) = one, np.load(f"{file}.npz").values()
    assert before.tobytes() == same.tobytes()
    assert relative_error([got], [before], [wanted]) <= 1e-5
    assert not np.array_equal(before, wanted)


RING_BOUND = 2 * (2 / 3) * 64 * 2**20 * 8 / 100e6  # seconds, at 100 Mbit/s and three hosts


@pytest.mark.parametrize("backend", ["horovod", "mpi"])
def test_a_slow_link_is_used_as_well_as_it_can_be(hosts, backend):
    hosts.shape("100mbit")
    try:
        # More than one try: what counts is what the link can do, and other work may hold up a rank.
        program = [PROGRAMS, "ring", backend, str(1.1 * RING_BOUND)]
        code, output, _ = run(hosts, *THREE, "--launcher", "mpirun", program=program)
    finally:
        hosts.unshape()
    assert code == 0, output
    seconds, over = re.search(r"ring ([\d.]+) s over (\d) hosts", output).groups()
    assert over == "3"
    # The link cannot be faster: it would not have been shaped.
    assert 0.9 < float(seconds) / RING_BOUND <= 1.15


# Faults ----------------------------------------------------------------------------------------------------------------


def strike(hosts, fault, *options, program=(PROGRAMS, "wait")):
    """Starts three ranks, does `fault` to them, and returns the exit code, what was said and what is left; in time."""
    with start(hosts, *THREE, *options, program=program) as job:
        wait_for(job, "waiting", 3)
        fault(job)
        struck = time.monotonic()
        code, output, left = finish(hosts, job)
    assert time.monotonic() - struck < LIMIT
    assert code != 0, output
    return code, output, left


def kill(hosts, name, word, number=signal.SIGKILL):
    found = [pid for pid, line in hosts.processes(name).items() if word in line]
    assert found, hosts.processes(name)
    for pid in found:
        os.kill(pid, number)


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun"])
def test_a_killed_rank_is_named_with_its_host(hosts, launcher):
    fault = lambda job: kill(hosts, "h2", f"{sys.executable} {PROGRAMS}")  # noqa: E731
    code, output, left = strike(hosts, fault, "--launcher", launcher)
    assert re.search(r"disttrain: error: rank 1 on h2 (was killed by signal 9|is gone)", output), output
    assert (code in (75, 137), left) == (True, {}), output


def test_a_killed_daemon_is_no_success(hosts):
    """For which mpirun itself returns 0."""
    code, output, left = strike(hosts, lambda job: kill(hosts, "h3", "prted"), "--launcher", "mpirun")
    assert re.search(r"disttrain: error: rank 2 on h3|disttrain: error: mpirun has ended before .*rank 2 on h3", output)
    assert left == {}, output
    assert code != 0


def test_a_cut_link_ends_the_job_on_both_sides(hosts):
    try:
        code, output, _ = strike(hosts, lambda job: hosts.cut("h3"), "--launcher", "mpirun")
        left = hosts.wait_until_empty(LIMIT)
    finally:
        hosts.mend("h3")
    assert "disttrain: error: rank 2 on h3 has not answered for 10 s: its host is down, or the network is cut" in output
    assert (code, left) == (75, {})


def test_sigterm_reaches_the_ranks_on_all_hosts(hosts):
    terminate = lambda job: job.send_signal(signal.SIGTERM)  # noqa: E731
    code, output, left = strike(hosts, terminate, "--launcher", "mpirun", program=(PROGRAMS, "save_on_term"))
    assert (code, left) == (75, {}), output
    for rank in range(3):
        assert f"[{rank}] rank {rank} saves" in output


def test_hosts_that_cannot_take_part_are_named_before_anything_starts(hosts, tmp_path):
    begun = time.monotonic()
    code, output, left = run(hosts, "-np", "3", "-H", "h1:1,h2:1,h9:1", program=[PROGRAMS, "wait"], seconds=LIMIT)
    assert (code, left) == (1, {})
    assert re.search(
        r"disttrain: error: host h9 cannot be reached by ssh \(.*resolve.*\): `ssh h9 true` must work", output
    )
    assert time.monotonic() - begun < LIMIT


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun"])
def test_another_tensorflow_on_a_host_is_refused(hosts, launcher, tmp_path):
    """What the host h2 finds when it looks for TensorFlow's version is another one's."""
    other = tmp_path / "tensorflow-2.20.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorflow\nVersion: 2.20.0\n")
    (tmp_path / "sitecustomize.py").write_text(
        f"import socket, sys\nif socket.gethostname() == 'h2': sys.path.insert(0, {str(tmp_path)!r})\n"
    )
    search = os.pathsep.join(filter(None, [str(tmp_path / "site"), os.environ.get("PYTHONPATH")]))
    (tmp_path / "site").mkdir()
    (tmp_path / "sitecustomize.py").rename(tmp_path / "site" / "sitecustomize.py")
    code, output, left = run(
        hosts, *THREE, "--launcher", launcher, program=[PROGRAMS, "wait"], seconds=LIMIT, PYTHONPATH=search
    )
    assert (code, left) == (1, {}), output
    assert re.search(r"tensorflow is 2\.20\.0 on h2 and 2\.21\.0 here: install the same versions on all hosts", output)


def test_ranks_that_all_run_here_are_refused(hosts):
    """As with an mpirun that does not read its hosts: two names, one machine."""
    code, output, left = run(
        hosts, "-np", "2", "-H", "h1:1,localhost:1", "--launcher", "mpirun", program=[PROGRAMS, "hello"], seconds=LIMIT
    )
    assert (code != 0, left) == (True, {}), output
    assert "ranks run on 1 hosts (h1), and 2 were asked for (h1, localhost)" in output
    assert "attempt" not in output


def test_an_elastic_job_loses_a_host_and_takes_another(hosts, tmp_path):
    """The link to h2 is cut in mid-training; h1 goes on alone, and then with h3."""
    script, listed = tmp_path / "discover.sh", tmp_path / "hosts"
    script.write_text(f"#!/bin/sh\ncat {listed}\n")
    script.chmod(0o755)
    listed.write_text("h1:1\nh2:1\n")
    steps = 150
    words = ["--host-discovery-script", str(script), "--max-np", "2"]
    program = [str(HERE / "ranks" / "elastic.py"), str(tmp_path), str(steps)]

    def wait_for_steps(ranks):
        until, before = time.monotonic() + 120, len(notes(tmp_path))
        while not any(note["ranks"] == ranks for note in notes(tmp_path)[before:]):
            assert job.poll() is None, job.stdout.read()
            assert time.monotonic() < until, notes(tmp_path)[-1:]
            time.sleep(0.2)

    with start(hosts, *words, program=program, STALL_TIMEOUT="10", STEP_SECONDS="0.2") as job:
        try:
            wait_for_steps(2)
            hosts.cut("h2")
            wait_for_steps(1)
            listed.write_text("h1:1\nh3:1\n")
            wait_for_steps(2)
        finally:
            hosts.mend("h2")
        code, output, left = finish(hosts, job, 120)
    assert code == 0, output
    assert left == {}
    assert re.search(
        r"rank \d on h2 has not answered for 10 s: its host is down, or the network is cut; 1 goes on", output
    )
    assert {note["step"] for note in notes(tmp_path)} == set(range(1, steps + 1))
    ends = [np.load(path) for path in tmp_path.glob("end-*.npz")]
    assert len(ends) == 2, output
    assert all(ends[0][name].tobytes() == ends[1][name].tobytes() for name in ends[0].files)


def notes(folder):
    """What the ranks have noted, oldest first."""
    lines = [line for path in folder.glob("seen-*.jsonl") for line in path.read_text().splitlines(keepends=True)]
    return sorted((json.loads(line) for line in lines if line.endswith("\n")), key=lambda note: note["time"])
