"""`disttrain doctor` on this machine as it is, with things missing, and with hosts that are not what they should be."""

import contextlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections import defaultdict
from concurrent.futures import Future
from contextlib import closing
from io import StringIO
from pathlib import Path

import pytest
from once import once
from rich.console import Console

from disttrain.cli.doctor import table
from disttrain.errors import ConfigError
from disttrain.launcher.doctor import ALL, Finding, can_run, choose_backend, machine, mpi, network, software
from disttrain.launcher.doctor.agent import Agent
from disttrain.launcher.doctor.command import ProbeError, facts
from disttrain.launcher.doctor.finding import run_probes
from disttrain.launcher.hosts import Host, is_local, parse_hosts, read_hostfile, ssh_command

REPOSITORY = Path(__file__).parents[1]
ROOT_MAY = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def run(*arguments, python=sys.executable, **variables):
    """Runs `disttrain doctor` in a process of its own; returns its exit code and stdout."""
    command = [str(python), "-c", "from disttrain.cli.main import main; main()", "doctor", *arguments]
    environment = os.environ | ROOT_MAY | {"PYTHONIOENCODING": "utf-8"} | variables
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def environment_without(folder, *packages):
    """The Python of an environment in which all is installed that is here, but these packages and the programs beside Python.

    Horovod is copied: it looks for MPI's library relative to itself, and would find the one here through a link."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = folder / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if entry.name.partition("-")[0] in packages:
            continue
        if entry.name == "horovod":
            shutil.copytree(entry, site / entry.name)
        else:
            (site / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


def by_name(document):
    found = defaultdict(list)
    for row in document["findings"]:
        found[row["name"]].append(row)
    return found


def drawn_cells(text):
    """The cells of a drawn table, row by row, the spaces taken out, at which lines are broken."""
    found = []
    for line in text.splitlines():
        if line.startswith("│"):
            cells = [cell.strip().replace(" ", "") for cell in line.strip("│").split("│")]
            if cells[0]:
                found.append(cells)
            else:
                found[-1] = [a + b for a, b in zip(found[-1], cells, strict=True)]
    return found


# On this machine --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Exit code and JSON on this machine, for horovod."""
    code, said = once(tmp_path_factory, "doctor_here", lambda: run("--backend", "horovod", "--json"))
    return code, json.loads(said)


def test_what_is_here_can_run(here):
    code, document = here
    assert code == 0, document["findings"]
    assert document["backend"] == {"asked": "horovod", "taken": "horovod", "can_run": True}
    assert document["backends"] == dict.fromkeys(("local", "mirrored", "multiworker", "horovod", "mpi"), True)
    rows = by_name(document)
    ok = ("Python", "TensorFlow", "Keras", "Horovod", "mpi4py", "one MPI", "mpirun", "launcher", "all-reduce")
    assert {name: rows[name][0]["status"] for name in ok} == dict.fromkeys(ok, "ok")
    assert rows["TensorFlow"][0]["found"].startswith("2.21.")
    assert rows["Horovod"][0]["found"].startswith("0.28.1: MPI yes, Gloo yes")
    assert "MPI_THREAD_MULTIPLE" in rows["mpi4py"][0]["found"]
    assert rows["one MPI"][0]["found"].startswith("mpi4py, mpirun, Horovod use the same: Open MPI ")
    assert rows["launcher"][0]["found"] == "disttrain run takes mpirun"
    assert rows["horovodrun"][0]["mend"] == "horovodrun --gloo, or mpirun"  # with Open MPI 5
    assert {"GPUs", "srun", "cores", "memory", "shared memory", "open files", "interfaces"} <= rows.keys()
    assert "2 ranks: " in rows["all-reduce"][0]["found"]


def test_the_table_says_the_same_and_loses_no_word(here):
    _, document = here
    findings = [Finding(**row) for row in document["findings"]]
    for columns in (80, 120):
        paper = Console(file=StringIO(), width=columns)
        paper.print(table(findings))
        expected = [[f.status, f.name, f.found, f.mend] for f in findings]
        assert drawn_cells(paper.file.getvalue()) == [[cell.replace(" ", "") for cell in row] for row in expected]
    code, said = run("--backend", "mpi", COLUMNS="80")
    assert code == 0, said
    assert [cells[:2] for cells in drawn_cells(said)] == [[f.status, f.name.replace(" ", "")] for f in findings]
    assert max(map(len, said.splitlines())) <= 80
    assert "mpi can run here" in said


# With things missing ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def no_mpi(tmp_path_factory):
    """Exit code and JSON for mpi where Horovod is installed, and neither mpi4py nor Open MPI."""

    def look():
        python = environment_without(tmp_path_factory.mktemp("no_mpi"), "mpi4py", "openmpi")
        return run("--backend", "mpi", "--json", python=python, PATH="/usr/bin:/bin")

    code, said = once(tmp_path_factory, "doctor_no_mpi", look)
    return code, json.loads(said)


@pytest.fixture(scope="module")
def no_horovod_no_ssh(tmp_path_factory):
    """Exit code and JSON for local where there is no Horovod and, for a host that is named, no ssh."""

    def look():
        folder = tmp_path_factory.mktemp("no_horovod")
        python = environment_without(folder, "horovod")
        return run(
            "--backend", "local", "--json", "-H", "elsewhere.invalid:2", python=python, PATH=str(folder / "none")
        )

    code, said = once(tmp_path_factory, "doctor_no_horovod", look)
    return code, json.loads(said)


def test_without_mpi(no_mpi):
    code, document = no_mpi
    assert code == 1
    assert document["backends"] == {
        "local": True,
        "mirrored": True,
        "multiworker": True,
        "horovod": False,  # it is linked with MPI
        "mpi": False,
    }
    rows, mend = by_name(document), "pip install 'disttrain[mpi]'"
    for name in ("mpi4py", "mpirun", "launcher"):
        assert (rows[name][0]["status"], rows[name][0]["mend"]) == ("absent", mend)
    assert (rows["Horovod"][0]["status"], rows["Horovod"][0]["mend"]) == ("bad", mend)
    assert "libmpi" in rows["Horovod"][0]["found"]
    assert rows["all-reduce"][0]["found"] == "not measured: there is no mpirun"


def test_without_horovod_and_without_ssh(no_horovod_no_ssh):
    code, document = no_horovod_no_ssh
    assert code == 0
    assert document["backends"]["local"]
    assert not document["backends"]["horovod"]
    assert document["hosts"] == [{"name": "elsewhere.invalid", "slots": 2}]
    rows = by_name(document)
    assert rows["Horovod"] == [
        {
            "name": "Horovod",
            "status": "absent",
            "found": "not installed",
            "mend": "pip install 'disttrain[horovod]' && disttrain build-horovod",
            "needed_by": ["horovod"],
        }
    ]
    assert rows["ssh"][0]["status"] == "absent"
    assert rows["ssh"][0]["mend"] == "apt-get install openssh-client"
    assert rows["ssh"][0]["needed_by"] == ["multiworker", "horovod", "mpi"]
    assert rows["all-reduce"][0]["found"] == "not measured: no host can be reached"


def test_a_module_that_crashes_or_hangs_is_a_row(tmp_path, monkeypatch):
    fake = tmp_path / "horovod" / "__init__.py"
    fake.parent.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    fake.write_text("import os; os.abort()")
    (row,) = run_probes({"Horovod": lambda: software.horovod(_Done(facts, "horovod_facts", 60))})
    assert (row.status, row.mend, row.needed_by) == ("bad", "disttrain build-horovod", ("horovod",))
    assert "SIGABRT" in row.found
    fake.write_text(
        "import subprocess, sys, time, pathlib\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(subprocess.Popen(['sleep', '600']).pid))\n"
        "time.sleep(600)"
    )
    with pytest.raises(ProbeError, match="did not answer within 2 s and was stopped"):
        facts("horovod_facts", 2)
    with pytest.raises(ProcessLookupError):  # what it had started is gone with it
        _gone(int((tmp_path / "pid").read_text()))


def test_ranks_that_cannot_be_started(tmp_path, monkeypatch):
    fake = tmp_path / "mpi4py" / "__init__.py"
    fake.parent.mkdir()
    fake.write_text("raise ImportError('libmpi.so.40 is not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (row,) = network.all_reduce([], None)
    assert row.status == "bad"
    assert row.found.startswith("2 ranks under mpirun: mpirun ended with ")
    assert row.found.endswith("ImportError: libmpi.so.40 is not here")
    assert not can_run([row], "mpi")


def test_a_probe_that_fails_hides_no_other():
    def broken():
        raise ZeroDivisionError("no")

    findings = run_probes({"first": broken, "second": lambda: [Finding("second", "ok", "here")]}, ("mpi",))
    assert [f.name for f in findings] == ["first", "second"]
    assert "ZeroDivisionError: no" in findings[0].found
    assert not can_run(findings, "mpi")
    assert can_run(findings, "local")


class _Done:
    """A call as the future that a probe gets."""

    def __init__(self, call, *arguments):
        self.result = lambda: call(*arguments)


def _gone(pid):
    """Raises ProcessLookupError as soon as the process is no more; one that nobody has waited for yet counts as gone."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        os.kill(pid, 0)
        with contextlib.suppress(FileNotFoundError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                raise ProcessLookupError
        time.sleep(0.02)


# Hosts ------------------------------------------------------------------------------------------------------------------


def test_hosts_that_cannot_be_reached_are_named_within_seconds(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # without listening: connections are refused
        ports = {"silent.invalid": silent.getsockname()[1], "refusing.invalid": closed.getsockname()[1]}
        config = tmp_path / "config"
        config.write_text("".join(f"Host {h}\n HostName 127.0.0.1\n Port {port}\n" for h, port in ports.items()))
        monkeypatch.setenv("DISTTRAIN_SSH", f"ssh -F {config}")
        begun = time.monotonic()
        with network.agents_on([Host(name, 1) for name in (*ports, "nobody.invalid")]) as (agents, found):
            seconds = time.monotonic() - begun
    assert agents == {}
    assert seconds < 20
    assert [(f.name, f.status, f.needed_by) for f in found] == [("ssh", "bad", ("multiworker", "horovod", "mpi"))] * 3
    said = {f.found.partition(": ")[0]: f for f in found}
    assert "timed out" in said["silent.invalid"].found
    assert said["silent.invalid"].mend == "is silent.invalid up, and its ssh port open to this host?"
    assert "Connection refused" in said["refusing.invalid"].found
    assert said["refusing.invalid"].mend.startswith("start sshd on refusing.invalid")
    assert "Could not resolve" in said["nobody.invalid"].found
    assert "/etc/hosts" in said["nobody.invalid"].mend


def test_two_names_of_this_machine():
    """What runs on other hosts, over real sockets; ranks that should be on two hosts and are on one are told."""
    hosts = [Host("localhost", 1), Host("127.0.0.1", 1)]
    with network.agents_on(hosts) as (agents, ssh):
        assert ssh == []  # nobody is far
        (same,) = network.versions(agents)
        assert same.status == "ok"
        assert same.found.startswith("the same on localhost, 127.0.0.1: Python 3.")
        skew, off = agents["localhost"].skew()
        assert abs(skew) <= off + 0.001
        assert network.clocks(agents) == []
        assert "is 127.0.0.1, the loopback, on localhost" in network.routes(agents)[0].found
        rate, (link,) = network.link(agents)
        assert rate > 10e6
        assert link.found.endswith("(localhost to 127.0.0.1)") or link.found.endswith("(127.0.0.1 to localhost)")
    (row,) = network.all_reduce(hosts, rate)
    assert row.status == "bad"
    assert not can_run([row], "mpi")


def test_another_version_on_a_host(tmp_path, monkeypatch):
    metadata = tmp_path / "tensorflow-2.20.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: tensorflow\nVersion: 2.20.0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with closing(Agent("localhost", local=True)) as agent:
        (row,) = network.versions({"there": agent})
    assert (row.status, row.found) == ("bad", "tensorflow is 2.20.0 on there, 2.21.0 here")
    assert row.mend == "on there: pip install tensorflow==2.21.0"


def test_an_answer_that_comes_late_is_not_taken_for_the_next():
    with closing(Agent("localhost", local=True)) as agent:
        port = agent.call("listen")
        with pytest.raises(ProbeError, match=r"localhost did not answer within 0.1 s"):
            agent.call("send", "localhost", port, 0.3, seconds=0.1)
        assert agent.call("received") > 1e6
        assert agent.call("clock") == pytest.approx(time.time(), abs=5)


def test_a_host_that_ends_meanwhile():
    agent = Agent("localhost", local=True)
    agent._process.kill()
    agent._process.wait()
    with closing(agent), pytest.raises(ProbeError, match="the connection ended"):
        agent.call("clock")


def test_local_names():
    assert is_local("localhost")
    assert is_local(socket.gethostname())
    assert is_local("127.0.0.1")
    assert not is_local("192.0.2.77")
    assert not is_local("nobody.invalid")


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("h1:2,h2", [("h1", 2), ("h2", 1)]),
        (" h1:2 , 10.0.0.1:4,", [("h1", 2), ("10.0.0.1", 4)]),
        ("h1:2,h2,h1", [("h1", 3), ("h2", 1)]),  # as mpirun counts
    ],
)
def test_hosts_of_the_command_line(text, hosts):
    assert parse_hosts(text) == hosts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no host"),
        (" , ", "names no host"),
        ("h1:0", "'0' slots on h1: a whole number of 1 or more"),
        ("h1:-1", "'-1' slots on h1"),
        ("h1:two", "'two' slots on h1"),
        ("h1:", "'h1:' is not a host"),
        ("h1 h2", "'h1 h2' is not a host"),
        ("-oProxyCommand=x", "is not a host"),
    ],
)
def test_hosts_that_are_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_hosts(text)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("h1 slots=2\nh2 slots=2\n", [("h1", 2), ("h2", 2)]),
        ("# all\n\nh1:2  # first\n  h2\n", [("h1", 2), ("h2", 1)]),
        (
            "digits-worker-0.digits.default.svc slots=8\ndigits-worker-1.digits.default.svc slots=8\n",
            [("digits-worker-0.digits.default.svc", 8), ("digits-worker-1.digits.default.svc", 8)],
        ),  # MPI Operator's
        ("n1\nn1\nn2\nn2\n", [("n1", 2), ("n2", 2)]),  # PBS's: a line for each slot
    ],
)
def test_hostfile(tmp_path, text, hosts):
    path = tmp_path / "hostfile"
    path.write_text(text)
    assert read_hostfile(path) == hosts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no host"),
        ("# nothing\n", "names no host"),
        ("h1 slots=2\nh2 slots=many\n", "line 2: 'many' slots on h2"),
        ("h1 slots=2 max_slots=4\n", "line 1: .* is not a host"),
        (b"\xff\xfe", "it is not text"),
        (None, "No such file"),
    ],
)
def test_hostfile_that_is_refused(tmp_path, text, said):
    path = tmp_path / "hostfile"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=said):
        read_hostfile(path)


def test_ssh_command(monkeypatch):
    monkeypatch.delenv("DISTTRAIN_SSH", raising=False)
    monkeypatch.delenv("PRTE_MCA_plm_ssh_agent", raising=False)
    command = ssh_command("h1", "printf", "%s|", "a b", "$HOME", "'")
    assert command[:-1] == ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "h1"]
    said = subprocess.run(["sh", "-c", command[-1]], capture_output=True, text=True, check=True).stdout
    assert said == "a b|$HOME|'|"
    monkeypatch.setenv("PRTE_MCA_plm_ssh_agent", "ssh -p 2222")
    assert ssh_command("h1", "true")[:3] == ["ssh", "-p", "2222"]
    monkeypatch.setenv("DISTTRAIN_SSH", "ssh -F 'my config'")
    assert ssh_command("h1", "true")[:3] == ["ssh", "-F", "my config"]


# Small ones -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("2.21.0", "<2.22,>=2.21", True),
        ("2.22.0", "<2.22,>=2.21", False),
        ("2.20.1", "<2.22,>=2.21", False),
        ("3.9", ">=3.10", False),
        ("12.5.82", ">=12.5.82,<13.0", True),
        ("2.21", "==2.21.0", True),
        ("1", "", True),
    ],
)
def test_versions_against_what_is_wanted(version, wanted, fits):
    assert software.fits(version, wanted) == fits


def test_what_tensorflow_and_disttrain_ask_for():
    assert ">=2.21" in software.requirement("disttrain", "tensorflow")
    assert ">=" in software.requirement("tensorflow", "nvidia-nccl-cu12")
    assert software.requirement("disttrain", "nothing-of-the-kind") is None


def _future(value):
    future = Future()
    future.set_result(value)
    return future


def _tensorflow(**changes):
    found = {"version": "2.21.0", "cuda": "12.5.1", "gpus": 2, "driver_cuda": 12040}
    found |= {"keras": {"version": "3.15.1", "backend": "tensorflow"}} | changes
    return {finding.name: finding for finding in software.tensorflow(_future(found))}


def test_gpus_with_a_driver_and_without_cuda_libraries():
    rows = _tensorflow()
    assert (rows["GPUs"].status, rows["GPUs"].found[0]) == ("ok", "2")
    # CUDA of the same major version runs.
    assert (rows["CUDA driver"].status, rows["CUDA driver"].found) == ("ok", "driver: up to 12.4; TensorFlow: 12.5.1")
    for name in ("CUDA runtime", "cuDNN", "NCCL"):  # not installed where the tests run, on CPUs
        assert rows[name].mend == "pip install 'disttrain[gpu]'" or rows[name].status == "ok"
    assert all(can_run(rows.values(), backend) for backend in ALL)
    assert _tensorflow(driver_cuda=11080)["CUDA driver"].mend == "install a driver for CUDA 12"
    assert _tensorflow(cuda=None)["CUDA"].status == "warn"


def test_versions_and_backends_that_do_not_fit():
    row = _tensorflow(version="2.20.0")["TensorFlow"]
    assert (row.status, row.needed_by) == ("bad", ALL)
    assert row.mend == f"pip install 'tensorflow{software.requirement('disttrain', 'tensorflow')}'"
    assert "which runs on jax" in _tensorflow(keras={"version": "3.15.1", "backend": "jax"})["Keras"].found
    assert _tensorflow(keras={"version": "2.15.0", "backend": "tensorflow"})["Keras"].status == "bad"


@pytest.mark.parametrize(
    ("mpirun", "horovod", "cannot"),
    [
        ("Open MPI 5.0.11", "/a/libmpi.so.40", set()),
        ("Open MPI 4.1.6", "/a/libmpi.so.40", {"mpi"}),
        ("Open MPI 5.0.11", "/b/libmpi.so.40", {"horovod"}),
        (None, None, set()),
    ],
)
def test_more_than_one_mpi(mpirun, horovod, cannot):
    mpi4py = {"version": "4.1.2", "implementation": "Open MPI v5.0.11", "thread_level": 3, "library": "/a/libmpi.so.40"}
    findings = mpi.library(_future(mpi4py), _future(mpirun), _future({"library": horovod}))
    assert {backend for backend in ALL if not can_run(findings, backend)} == cannot
    without_threads = mpi.library(_future(mpi4py | {"thread_level": 1}), _future(None), _future({}))
    assert not can_run(without_threads, "mpi")


def test_which_launcher_is_taken(tmp_path, monkeypatch):
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\necho slurm 22.05.8\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def taken(named):
        rows = {finding.name: finding for finding in mpi.launchers(_future("Open MPI 5.0.11"), named)}
        assert rows["srun"].found.startswith(f"slurm 22.05.8: {srun}")
        return rows["launcher"].found

    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert taken(named=False) == "disttrain run takes mpirun"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert taken(named=False) == "disttrain run takes srun"
    assert taken(named=True) == "disttrain run takes mpirun"


def test_few_file_descriptors():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        (row,) = machine.descriptors()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (row.status, row.found.partition(",")[0]) == ("warn", "512")
    assert row.mend


@pytest.mark.parametrize(
    ("files", "limit", "quota"),
    [
        ({"memory.max": "1073741824", "cpu.max": "150000 100000"}, 2**30, 1.5),
        ({"memory.max": "max", "cpu.max": "max 100000"}, None, None),
        ({}, None, None),
    ],
)
def test_limits_of_a_container(tmp_path, monkeypatch, files, limit, quota):
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    assert machine.memory_limit() == limit
    assert machine.cpu_quota() == quota


def test_more_ranks_than_cores_or_memory():
    many = 10_000
    assert machine.cores(many)[0].status == machine.memory(many)[0].status == "warn"
    assert "fewer ranks" in machine.cores(many)[0].mend


def test_auto(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    assert choose_backend("mpi", []) == "mpi"
    assert choose_backend("auto", []) == "local"
    assert choose_backend("auto", [Host("h1", 1), Host("h2", 1)]) == "horovod"
    monkeypatch.setenv("TF_CONFIG", "{}")
    assert choose_backend("auto", []) == "multiworker"
