"""`disttrain run` on this machine: what it starts, what it shows, and how it ends where something goes wrong."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from disttrain.errors import BackendError, ConfigError
from disttrain.launcher.command import Job, choose_hosts, choose_launcher, commands, resolve
from disttrain.launcher.hosts import Host
from disttrain.world import World, world
from launch import Started, free_ports

PROGRAMS = str(Path(__file__).parent / "ranks" / "programs.py")
LAUNCHERS = ["mpirun", "horovodrun", "local"]
BIN = Path(sys.executable).parent
# By which this process of pytest finds what its tests have started.
MARK = f"of-test-process-{os.getpid()}"


def command(*options, program):
    return [sys.executable, "-m", "disttrain.cli", "run", *options, "--", "python", PROGRAMS, *program]


def start(*options, program):
    # As from a shell in which nothing is activated: what belongs to this Python is found beside it.
    environment = os.environ | {"PATH": os.environ["PATH"].replace(f"{BIN}{os.pathsep}", ""), "MARK": MARK}
    return Started(
        command(*options, program=program),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(*options, program, seconds=90):
    """Exit code, output and what is left behind."""
    with start(*options, program=program) as job:
        return finish(job, seconds)


def finish(job, seconds=90):
    output, _ = job.communicate(timeout=seconds)
    until = time.monotonic() + 3
    while (left := programs_alive()) and time.monotonic() < until:
        time.sleep(0.1)
    return job.returncode, output, left


def programs_alive():
    """Processes of `programs.py` and what they have forked, agents included; this test's alone."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (folder / "cmdline").read_bytes()
            running = (folder / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
            mine = f"MARK={MARK}".encode() in (folder / "environ").read_bytes()
            if running and mine and PROGRAMS.encode() in line and b"disttrain.cli" not in line:
                found.append(int(folder.name))
    return found


def wait_for(job, text, count=1, seconds=60):
    """Reads what the job says until it has said `text` so often."""
    said, until = "", time.monotonic() + seconds
    while said.count(text) < count:
        assert time.monotonic() < until, said
        line = job.stdout.readline()
        assert line, said
        said += line
    return said


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_rank_runs_and_its_lines_carry_its_number(launcher):
    code, output, left = run("-np", "2", "--launcher", launcher, program=["hello"])
    assert (code, left) == (0, []), output
    by = {"local": "torchrun"}.get(launcher, launcher)
    for rank in (0, 1):
        assert f"[{rank}] rank {rank} of 2 by {by}, attempt 0" in output.splitlines()
        assert f"[{rank}] a word on stderr" in output.splitlines()
    assert re.search(r"^disttrain: 2 ranks on \S+ came to their end, \d+ s$", output, re.MULTILINE)


def test_rank_0_alone_is_shown():
    code, output, _ = run("-np", "3", "--launcher", "local", "--output", "rank0", program=["hello"])
    assert code == 0
    assert [line for line in output.splitlines() if "attempt" in line] == ["rank 0 of 3 by torchrun, attempt 0"]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_rank_that_fails_first_is_named_with_its_last_line(launcher):
    begun = time.monotonic()
    code, output, left = run("-np", "2", "--launcher", launcher, program=["fail"])
    assert (code, left) == (1, []), output
    assert time.monotonic() - begun < 40
    traceback = output.index("[1] Traceback (most recent call last)")
    last = re.search(
        r"^disttrain: error: rank 1 on \S+ ended with exit code 1\. Its last line: ValueError: a mistake in the program$",
        output,
        re.MULTILINE,
    )
    assert traceback < last.start()


def test_hidden_output_of_the_rank_that_fails_is_shown_after_all():
    code, output, _ = run("-np", "2", "--launcher", "local", "--output", "rank0", program=["fail"])
    assert code == 1
    assert "Traceback (most recent call last)" in output


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_rank_is_named(launcher):
    with start("-np", "2", "--launcher", launcher, program=["wait"]) as job:
        wait_for(job, "waiting", 2)
        victims = [pid for pid in programs_alive() if rank_of(pid) == "1" and not is_agent(pid)]
        os.kill(min(victims), signal.SIGKILL)
        struck = time.monotonic()
        code, output, left = finish(job)
    assert (code, left) == (137, []), output
    assert time.monotonic() - struck < 30
    assert re.search(r"disttrain: error: rank 1 on \S+ was killed by signal 9 \(SIGKILL\)", output)


def rank_of(pid):
    environment = dict(x.split(b"=", 1) for x in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if b"=" in x)
    names = (b"HOROVOD_RANK", b"OMPI_COMM_WORLD_RANK", b"RANK")
    return next((environment[name].decode() for name in names if name in environment), None)


def is_agent(pid):
    return b"disttrain.launcher.agent" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_killed_agent_is_a_lost_rank_and_takes_its_program_with_it():
    with start("-np", "2", "--launcher", "local", program=["wait"]) as job:
        wait_for(job, "waiting", 2)
        (victim,) = [pid for pid in programs_alive() if rank_of(pid) == "1" and is_agent(pid)]
        os.kill(victim, signal.SIGKILL)
        code, output, left = finish(job)
    # The program's own child, which it left behind, is in nobody's hand any more.
    assert code == 75, output
    assert re.search(r"rank 1 on \S+ is gone: its host or what started it there was lost", output)
    assert all(not rank_of(pid) or rank_of(pid) == "1" for pid in left)
    for pid in left:
        os.kill(pid, signal.SIGKILL)


def test_what_a_program_leaves_behind_ends_with_it():
    begun = time.monotonic()
    code, output, _ = run("-np", "2", "--launcher", "local", program=["daemon"])
    assert code == 0, output
    assert output.count("that is all, \N{CHECK MARK}") == 2
    assert time.monotonic() - begun < 20
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            mine = f"MARK={MARK}".encode() in (folder / "environ").read_bytes()
            assert not (mine and b"sleep" in (folder / "cmdline").read_bytes())


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_sigterm_reaches_every_rank_and_what_they_save_counts(launcher):
    with start("-np", "2", "--launcher", launcher, program=["save_on_term"]) as job:
        wait_for(job, "waiting", 2)
        job.send_signal(signal.SIGTERM)
        struck = time.monotonic()
        code, output, left = finish(job)
    assert (code, left) == (75, []), output
    assert time.monotonic() - struck < 25
    assert "[0] rank 0 saves" in output
    assert "[1] rank 1 saves" in output
    assert "all ranks have saved and can go on from there" in output


@pytest.mark.parametrize("signals", [["SIGTERM"], ["SIGINT", "SIGINT"]])
def test_ranks_that_do_not_listen_are_ended_all_the_same(signals):
    with start("-np", "2", "--launcher", "mpirun", "--grace", "2", program=["deaf"]) as job:
        wait_for(job, "waiting", 2)
        struck = time.monotonic()
        for name in signals:
            job.send_signal(getattr(signal, name))
            time.sleep(0.5)
        code, output, left = finish(job)
    assert code == 128 + getattr(signal, signals[0]), output
    assert left == []
    assert time.monotonic() - struck < 20
    assert f"interrupted by signal {getattr(signal, signals[0]).value} ({signals[0]})" in output


def test_it_starts_again_as_often_as_it_may(tmp_path):
    code, output, _ = run("-np", "2", "--launcher", "local", "--restarts", "2", program=["fail_once", str(tmp_path)])
    assert code == 0, output
    assert (tmp_path / "attempts-0").read_text() == "01"
    assert "rank 0 on" in output
    assert "ended with exit code 7" in output
    assert "disttrain: starting again, 1 of 2" in output
    (tmp_path / "attempts-0").write_text("")
    (tmp_path / "attempts-0").unlink()
    code, output, _ = run("-np", "2", "--launcher", "local", program=["fail_once", str(tmp_path)])
    assert code == 7, output


def digits(folder, script, launcher):
    words = ["--launcher", launcher, "--host-discovery-script", str(script), "--max-np", "2"]
    train = ["disttrain", "train", "digits", "--resume", "auto", "--checkpoint-every", "1", "--out", str(folder)]
    train += ["--steps", "24", "--batch-size", "400"]
    return [sys.executable, "-m", "disttrain.cli", "run", *words, "--", *train]


def test_an_elastic_job_goes_on_with_the_hosts_that_there_are(tmp_path):
    """Two ranks, of which one is killed when its slot is gone; then one; then two again, and the end."""
    hosts, script = tmp_path / "hosts", tmp_path / "discover.sh"
    script.write_text(f"#!/bin/sh\ncat {hosts}\n")
    script.chmod(0o755)
    hosts.write_text("localhost:2\n")
    environment = os.environ | {"MARK": MARK, "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    with Started(
        digits(tmp_path / "run", script, "mpirun"),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as job:
        newest = lambda: max((int(x.name[5:]) for x in tmp_path.glob("run/checkpoints/step-*")), default=0)  # noqa: E731

        def wait_for_step(number):
            until = time.monotonic() + 120
            while newest() < number:
                assert job.poll() is None, job.stdout.read()
                assert time.monotonic() < until, newest()
                time.sleep(0.02)

        wait_for_step(1)
        hosts.write_text("localhost:1\n")
        victims = [p for p in trainings_alive() if rank_of(p) == "1"]
        os.kill(max(victims), signal.SIGKILL)
        lost = newest()
        wait_for_step(lost + 1)
        hosts.write_text("localhost:2\n")
        output, _ = job.communicate(timeout=180)
    assert job.returncode == 0, output
    assert re.search(r"rank 1 on \S+ was killed by signal 9", output)
    assert output.count("disttrain: starting again") in (1, 2), output
    assert newest() == 24
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 24
    # Each example of an epoch once, four batches in each, whoever has seen them.
    assert summary["examples"] == 6 * 1437
    assert summary["validation"]["accuracy"] > 0.5


def trainings_alive():
    """Processes that train, of this test alone, without their agents."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (folder / "cmdline").read_bytes()
            mine = f"MARK={MARK}".encode() in (folder / "environ").read_bytes()
            if mine and b"digits" in line and b"launcher.agent" not in line and b"--max-np" not in line:
                found.append(int(folder.name))
    return found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host-discovery-script", "x"], "--host-discovery-script wants --max-np or -np"),
        (["--host-discovery-script", "nowhere.sh", "-np", "2"], "nowhere.sh cannot be run"),
        (["--host-discovery-script", "x", "-np", "2", "--min-np", "3"], "--min-np 3 is more than --max-np 2"),
        (["--host-discovery-script", "/bin/true", "-np", "2", "--start-timeout", "1"],
         "there is room for 0 ranks (hosts: none), and --min-np is 1"),
        (["--host-discovery-script", "/bin/false", "-np", "2"], "/bin/false ended with 1"),
    ],
)  # fmt: skip
def test_an_elastic_job_that_cannot_start(words, message):
    code, output, _ = run(*words, program=["hello"])
    assert code != 0
    assert message in output


def test_a_launcher_that_does_not_start_all_ranks_is_quoted(monkeypatch):
    monkeypatch.setenv("PRTE_MCA_prte_if_include", "nowhere0")
    code, output, _ = run("-np", "2", "--launcher", "mpirun", program=["hello"])
    assert code != 0
    said = re.search(
        r"^disttrain: error: mpirun ended with \d+ before all ranks were there: (.*)$", output, re.MULTILINE
    )
    assert "No network interfaces were found" in said[1]


def test_ranks_that_do_not_come_are_named(monkeypatch, tmp_path):
    """One agent sleeps where it should start."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, time\nif os.environ.get('RANK') == '1' and 'RANK' in os.environ: time.sleep(300)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code, output, left = run("-np", "2", "--launcher", "local", "--start-timeout", "5", program=["hello"])
    assert (code, left) == (75, [])
    assert "rank 1 of 2 did not come up in time" in output


def test_a_world_of_the_wrong_size_is_refused(monkeypatch):
    """What another launcher has left in the shell makes every rank believe that it is alone."""
    monkeypatch.setenv("HOROVOD_RANK", "0")
    monkeypatch.setenv("HOROVOD_SIZE", "1")
    code, output, left = run("-np", "2", "--launcher", "mpirun", program=["hello"])
    assert code != 0
    assert left == []
    assert re.search(r"rank 0 on \S+ was started as one of 1, not of 2: mpirun does not see the hosts or slots", output)
    assert "attempt" not in output


# What is started, and what is refused ----------------------------------------------------------------------------------


def test_dry_run_prints_what_a_shell_would_run():
    done = subprocess.run(command("-np", "2", "--launcher", "mpirun", "--dry-run", program=["hello"]),
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert "OMPI_MCA_mpi_yield_when_idle=" in done.stdout
    environment = os.environ | {"DISTTRAIN_ATTEMPT": "dry"}
    ran = subprocess.run(
        ["bash", "-c", done.stdout], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert sorted(ran.stdout.splitlines()) == [f"rank {rank} of 2 by mpirun, attempt dry" for rank in (0, 1)]


def job_for(hosts, launcher="mpirun", **options):
    return Job(["/bin/train"], sum(host.slots for host in hosts), hosts, launcher, **options)


def test_what_people_forget_is_set_between_hosts(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("OMPI_", "PRTE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("SECRET_OF_MINE", "1")
    monkeypatch.setenv("OMPI_MCA_plm_rsh_args", "-o ConnectionAttempts=10")
    (started,) = commands(job_for([Host("192.0.2.1", 64), Host("192.0.2.2", 64)]), {"DISTTRAIN_X": "1"})
    assert started.environment["OMPI_MCA_mpi_yield_when_idle"] == "1"
    assert started.environment["PRTE_MCA_oob_tcp_keepalive_time"] == "5"
    assert started.environment["PRTE_MCA_plm_ssh_args"] == "-o ConnectionAttempts=10"
    assert Path(started.environment["OMPI_MCA_coll_tuned_dynamic_rules_filename"]).exists()
    line = " ".join(started.words)
    assert "--host 192.0.2.1:64,192.0.2.2:64" in line
    travelling = {name for word, name in zip(started.words, started.words[1:], strict=False) if word == "-x"}
    assert {"NCCL_DEBUG", "DISTTRAIN_X", "PATH", "OMPI_MCA_coll_tuned_dynamic_rules_filename"} <= travelling
    assert "SECRET_OF_MINE" not in travelling
    # On one machine nothing of that is needed, and a ring would be slower.
    (started,) = commands(job_for([])._replace(ranks=1), {})
    assert "OMPI_MCA_coll_tuned_use_dynamic_rules" not in started.environment


def test_what_is_set_already_stays(monkeypatch):
    monkeypatch.setenv("OMPI_MCA_mpi_yield_when_idle", "0")
    (started,) = commands(job_for([])._replace(ranks=1), {})
    assert started.environment["OMPI_MCA_mpi_yield_when_idle"] == "0"


def test_the_launcher_is_chosen_by_where_this_is(monkeypatch, tmp_path):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert choose_launcher("auto", []) == "mpirun"
    assert choose_launcher("auto", [], elastic=True) == "horovodrun"
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert choose_launcher("auto", []) == "mpirun"
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert choose_launcher("auto", []) == "srun"


def test_the_hosts_of_mpi_operator_are_found(monkeypatch, tmp_path):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("train-worker-0.train slots=2\ntrain-worker-1.train slots=2\n")
    monkeypatch.setenv("OMPI_MCA_orte_default_hostfile", str(hostfile))
    hosts = [Host("train-worker-0.train", 2), Host("train-worker-1.train", 2)]
    assert choose_hosts(None, None) == hosts
    assert choose_hosts([Host("other", 1)], None) == [Host("other", 1)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--launcher", "srun", "-np", "2"], "there is no Slurm allocation here"),
        (["-H", "h1", "--hostfile", "hosts"], "-H and --hostfile: give one of the two"),
        (["--hostfile", "nowhere"], "hostfile nowhere cannot be read"),
        ([], "how many ranks? Say -np N"),
        (["-np", "3", "-H", "localhost:2"], "-np 3: the hosts have 2 slots together (localhost:2)"),
        (
            ["-np", "2", "--launcher", "local", "-H", "192.0.2.1:2"],
            "--launcher local starts ranks on this machine alone",
        ),
        (["-np", "2", "-H", "nowhere.invalid:2"], "host nowhere.invalid cannot be reached by ssh"),
    ],
)
def test_what_cannot_be_started_is_said_at_once(words, message):
    begun = time.monotonic()
    code, output, _ = run(*words, program=["hello"])
    assert code != 0
    assert message in output, output
    assert time.monotonic() - begun < 20


def test_a_program_that_is_not_there():
    with pytest.raises(ConfigError, match="there is no program 'trian'"):
        resolve(["trian"])
    assert resolve(["python", "x"]) == [sys.executable, "x"]
    assert resolve(["disttrain"]) == [str(BIN / "disttrain")]


# Who a process is, by each launcher's variables ------------------------------------------------------------------------

SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("environment", "launcher", "local_rank", "collectives"),
    [
        ({"HOROVOD_RANK": "3", "HOROVOD_SIZE": "4", "HOROVOD_LOCAL_RANK": "1"}, "horovodrun", 1, True),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "1"}, "mpirun", 1, True),
        (OPEN_MPI | SLURM, "mpirun", 1, True),
        ({"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}, "mpiexec", 1, True),
        (SLURM, "srun", 1, False),
        (SLURM | {"PMIX_RANK": "3"}, "srun --mpi=pmix", 1, True),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, "torchrun", 1, False),
        ({"JOB_COMPLETION_INDEX": "3", "DISTTRAIN_HOSTS": "a:1,b:1,c:1,d:1"}, "an Indexed Job", 0, False),
    ],
)
def test_a_process_finds_out_who_it_is(environment, launcher, local_rank, collectives):
    assert world(environment) == World(launcher, 3, 4, local_rank, collectives)


@pytest.mark.parametrize("by", ["an Indexed Job", "torchrun"])
def test_workers_that_are_told_in_other_words_find_each_other(by):
    """As a pod of an Indexed Job with DISTTRAIN_HOSTS, and as what torchrun starts, which knows rank 0's address alone."""
    ports = free_ports(4)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    indexed = {"DISTTRAIN_HOSTS": ",".join(f"127.0.0.1:{port}" for port in ports[:2])}
    torchrun = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[2])}
    started = [
        subprocess.Popen(
            [sys.executable, PROGRAMS, "who"],
            env=environment
            | (indexed | {"JOB_COMPLETION_INDEX": rank} if by == "an Indexed Job" else torchrun | {"RANK": rank}),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0]
    host = socket.gethostname()
    for line in said:
        assert line.strip().endswith(f"multiworker {by} {[(0, 2, 0, host), (1, 2, 1, host)]}")


def test_a_process_that_nobody_has_started_is_nobodys():
    assert world({}) is None
    assert world({"JOB_COMPLETION_INDEX": "3"}) is None
    with pytest.raises(BackendError, match="HOROVOD_SIZE='two': the launcher's variable should be a whole number"):
        world({"HOROVOD_RANK": "0", "HOROVOD_SIZE": "two"})
