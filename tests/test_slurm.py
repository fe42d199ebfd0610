"""`launch/slurm.sbatch`, `disttrain run` and `dt.init` on a real Slurm of two nodes."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import slurm as lab

PROGRAMS = str(Path(__file__).parent / "ranks" / "programs.py")
SCRIPT = str(Path(__file__).parent.parent / "launch" / "slurm.sbatch")
WHY_NOT = lab.why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
# As in an environment that is active: what belongs to this Python is found on PATH.
ACTIVE = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def slurm():
    with lab.Slurm() as cluster:
        yield cluster


@pytest.fixture
def output(tmp_path):
    return tmp_path / "output"


def submit(slurm, output, *words):
    return slurm.submit(f"--output={output}", *words, **ACTIVE)


def wrapped(slurm, output, program, restarts=0):
    """A job that says with what code `disttrain run` has ended, which stays in the allocation."""
    line = f"disttrain run --restarts {restarts} -- python {PROGRAMS} {program}; echo code $?"
    return submit(slurm, output, "--nodes=2", "--ntasks-per-node=1", "--no-requeue", "--wrap", line)


def wait_for(output, text, count=1, seconds=60):
    until = time.monotonic() + seconds
    while not output.exists() or output.read_text().count(text) < count:
        assert time.monotonic() < until, output.exists() and output.read_text()
        time.sleep(0.1)
    return output.read_text()


def test_near_the_end_of_its_time_a_job_saves_is_requeued_and_goes_on_from_there(slurm, output, tmp_path):
    """Slurm itself gives the signal, in the first of its looks at the clock, one in half a minute."""
    limits = ["--time=1", "--signal=TERM@30"]
    job = submit(slurm, output, *limits, SCRIPT, "python", PROGRAMS, "count", str(tmp_path))
    wait_for(output, "has saved step", 2)
    (tmp_path / "enough").touch()
    ended = slurm.wait_for_state(job, "COMPLETED", "FAILED", "TIMEOUT")
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("COMPLETED", "1", "0:0"), output.read_text()
    said = output.read_text()
    assert (
        "disttrain: error: interrupted by signal 15 (SIGTERM) from Slurm; all ranks have saved and can go on from there"
        in said
    )
    for rank in (0, 1):
        prefix = rf"\[{rank}\] rank {rank}"
        saved = re.search(rf"^{prefix} has saved step (\d+)$", said, re.MULTILINE)[1]
        first, second = re.findall(rf"^{prefix} of 2 on h{rank + 1} begins at step (\d+)$", said, re.MULTILINE)
        assert (first, second) == ("0", saved)
        assert int(saved) > 0
        assert f"[{rank}] rank {rank} has done" in said
    assert slurm.left() == {}


def test_digits_save_are_requeued_and_go_on_over_two_nodes(slurm, output, tmp_path):
    options = ["--steps", "200", "--checkpoint-every", "20", "--out", str(tmp_path)]
    job = submit(slurm, output, SCRIPT, *options)
    until = time.monotonic() + 120
    while not list((tmp_path / "checkpoints").glob("*20")):
        assert time.monotonic() < until, output.exists() and output.read_text()
        time.sleep(0.1)
    slurm.do("scancel", "--signal=TERM", str(job))
    ended = slurm.wait_for_state(job, "COMPLETED", "FAILED", seconds=180)
    said = output.read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), said
    assert "from Slurm; all ranks have saved and can go on from there" in said
    assert 20 <= int(re.search(r"going on from .*step (\d+)", re.sub(r"\s+", " ", said))[1]) < 200
    assert "disttrain: 2 ranks on 2 hosts came to their end" in said
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["replicas"], summary["backend"], summary["steps"]) == (2, "horovod", 200)


def test_a_rank_that_fails_fails_the_job_with_its_code(slurm, output):
    job = submit(slurm, output, SCRIPT, "python", PROGRAMS, "fail_on", "h2", "7")
    ended = slurm.wait_for_state(job, "FAILED", "COMPLETED")
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "7:0", "0")
    last = "disttrain: error: rank 1 on h2 ended with exit code 7. Its last line: a mistake on h2"
    assert last in wait_for(output, last)
    assert slurm.left() == {}


@pytest.mark.parametrize(
    ("mpi", "backend", "by"), [("none", "multiworker", "srun"), ("pmix", "horovod", "srun --mpi=pmix")]
)
def test_ranks_know_who_they_are_and_reach_each_other(slurm, mpi, backend, by):
    program = [sys.executable, PROGRAMS, "who"]
    said = slurm.do(
        "srun", "--nodes=2", "--ntasks=3", f"--mpi={mpi}", *program, seconds=200, OMPI_MCA_mpi_yield_when_idle="1"
    )
    everybody = [(0, 3, 0, "h1"), (1, 3, 1, "h1"), (2, 3, 0, "h2")]
    assert said.splitlines().count(f"{backend} {by} {everybody}") == 3, said
    assert slurm.left() == {}


def test_a_cancelled_job_leaves_nothing(slurm, output):
    job = submit(slurm, output, SCRIPT, "python", PROGRAMS, "wait")
    wait_for(output, "waiting", 2)
    slurm.do("scancel", str(job))
    # Slurm signals the programs, what is beside them and `disttrain run` in no order.
    said = wait_for(output, "disttrain: error", seconds=30)
    assert re.search(r"error: (interrupted|rank \d on h\d was killed) by signal 15 \(SIGTERM\)", said), said
    assert slurm.wait_for_state(job, "CANCELLED", "COMPLETED", "FAILED", "PENDING")["JobState"] == "CANCELLED"
    assert slurm.left() == {}


def test_ranks_that_slurm_has_told_to_end_are_not_started_again(slurm, output, tmp_path):
    job = wrapped(slurm, output, f"count {tmp_path}", restarts=1)
    wait_for(output, "begins", 2)
    time.sleep(1)  # both listen
    slurm.do("scancel", "--signal=TERM", str(job))
    said = wait_for(output, "code", seconds=30)
    assert "from Slurm; all ranks have saved and can go on from there\ncode 75\n" in said
    slurm.wait_for_state(job, "COMPLETED")


def test_a_lost_step_daemon_is_a_lost_rank(slurm, output):
    """Slurm itself takes no notice of it."""
    job = wrapped(slurm, output, "wait")
    wait_for(output, "waiting", 2)
    (daemon,) = slurm.hosts.processes("h2", "slurmstepd")
    os.kill(daemon, signal.SIGKILL)
    said = wait_for(output, "code", seconds=30)
    assert "disttrain: error: rank 1 on h2 is gone: its host or what started it there was lost" in said
    assert said.splitlines()[-1] == "code 75"
    slurm.wait_for_state(job, "COMPLETED")
    assert slurm.left() == {}


def test_a_node_behind_a_cut_link_is_named(slurm, output):
    job = wrapped(slurm, output, "wait")
    wait_for(output, "waiting", 2)
    slurm.hosts.cut("h2")
    try:
        said = wait_for(output, "code", seconds=45)
        # On the node itself the rank ends, too; what is Slurm's own ends when the controller can say so.
        until = time.monotonic() + 15
        while (left := slurm.hosts.processes("h2", PROGRAMS)) and time.monotonic() < until:
            time.sleep(0.2)
    finally:
        slurm.hosts.mend("h2")
    assert "disttrain: error: rank 1 on h2 has not answered for 10 s: its host is down, or the network is cut" in said
    assert (said.splitlines()[-1], left) == ("code 75", {})
    slurm.wait_for_state(job, "COMPLETED")
    assert slurm.left() == {}
