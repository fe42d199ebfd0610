"""The protocol of communicators in real processes, on every engine; how they are chosen, and what they refuse."""

import json
import subprocess
import sys
import time

import pytest

import disttrain as dt
from disttrain.comm.multiworker import _cluster as described_cluster
from disttrain.errors import BackendError
from launch import BACKEND, launch, start

TWO_WORKERS = {"worker": ["127.0.0.1:20001", "127.0.0.1:20002"]}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("engine", ["multiworker", "horovod", "gloo", "mpi"])
def test_protocol(engine, ranks):
    """Judged in the ranks, except for the bits, and that "auto" has chosen what it should."""
    result = launch(engine, ranks, "comm_protocol", timeout=300).check()
    assert result.reports == [
        {"done": True, "backend": BACKEND[engine], "rank": rank, "size": ranks} for rank in range(ranks)
    ]
    bits = [{name: array.tobytes() for name, array in arrays.items()} for arrays in result.arrays]
    assert len(bits[0]) > 100
    assert all(other == bits[0] for other in bits)


@pytest.mark.parametrize(
    ("engine", "option", "values"),
    [
        ("gloo", "stall_timeout", [120, 60]),
        ("mpi", "wire_dtype", [None, "float16"]),
        ("multiworker", "bucket_mib", [25, 16]),
    ],
)
def test_ranks_with_different_options(engine, option, values):
    with start(engine, 2, "comm_options", json.dumps([{option: value} for value in values])) as job:
        job.wait_for_mark(0, "refused", timeout=120)
        refused = time.monotonic()
        result = job.wait(timeout=180)
    assert time.monotonic() - refused < 15
    assert result.returncode != 0
    assert not result.left_behind
    message = f"ranks disagree on {option}: {values[0]} on rank 0, {values[1]} on rank 1: make them equal"
    assert result.reports == [{"error": message}] * 2


def test_buckets_travel_during_the_backward_pass_in_buffers_that_stay():
    for rank in launch("mpi", 2, "comm_overlap", timeout=300).check().reports:
        assert rank["buckets"] == 10
        assert sum(rank["begun"]) >= 5, "steps whose first bucket left before the last one's gradients existed"
        assert any(rank["reduced"]), "no first bucket was back before the last one's gradients existed"
        assert len(set(rank["buffers"][-6:])) == 1


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "modules", "message"),
    [
        ("mpi", ["mpi4py"], r"mpi4py cannot be used \(.*\): pip install 'disttrain\[mpi\]'"),
        ("horovod", ["horovod", "horovod.tensorflow"], r"Horovod cannot be imported \(.*\): `disttrain build-horovod`"),
    ],
)
def test_what_an_engine_stands_on_is_missing(monkeypatch, backend, modules, message):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setenv("OMPI_MCA_mpi_yield_when_idle", "1")  # which the engine may set: taken away afterwards
    with pytest.raises(BackendError, match=message):
        dt.init(backend)


def test_mpi_without_threads():
    code = "import mpi4py; mpi4py.rc.thread_level = 'single'; import disttrain as dt; dt.init('mpi')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode != 0
    assert "BackendError: backend 'mpi': this MPI library was started without support for threads" in ended.stderr
    assert "do not set mpi4py.rc.thread_level" in ended.stderr


def tf_config(cluster, index=0, kind="worker"):
    return json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("worker 0 of 2", r"TF_CONFIG is not what it should be \(JSONDecodeError: .*\): it wants JSON with"),
        ("[]", r"TF_CONFIG is not what it should be \(TypeError"),
        (json.dumps({"cluster": TWO_WORKERS}), r"TF_CONFIG is not what it should be \(KeyError: 'task'\)"),
        (tf_config({"worker": "127.0.0.1:20001"}), r"TF_CONFIG is not what it should be \(TypeError"),
        (tf_config(TWO_WORKERS, 2), "task index 2, but there are 2 of 'worker'"),
        (tf_config(TWO_WORKERS, -1), "task index -1, but there are 2 of 'worker'"),
        (tf_config({"worker": ["127.0.0.1:20001"] * 2}), "address 127.0.0.1:20001 is there twice"),
        (
            tf_config({**TWO_WORKERS, "ps": ["127.0.0.1:20003"]}),
            "jobs 'worker', 'ps' and this task 'worker'; only 'worker' and 'chief' train here",
        ),
        (tf_config(TWO_WORKERS, kind="chief"), "jobs 'worker' and this task 'chief'; only 'worker' and 'chief' train"),
        (tf_config(TWO_WORKERS), "TensorFlow has already started: call dt.init before anything else uses TensorFlow"),
        ("", "neither TF_CONFIG nor a launcher says who the workers are. Set in each process TF_CONFIG="),
    ],
)
def test_tf_config_with_a_fault(monkeypatch, text, message):
    monkeypatch.delenv("SLURM_STEP_NODELIST", raising=False)
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(BackendError, match=message):
        dt.init("multiworker")


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        ("a:1,b:1,c:1", "DISTTRAIN_HOSTS names 3 workers, but torchrun started 2"),
        ("a:1,b", "DISTTRAIN_HOSTS: 'b' is not host:port"),
    ],
)
def test_a_list_of_hosts_with_a_fault(monkeypatch, hosts, message):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "DISTTRAIN_HOSTS": hosts}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BackendError, match=message):
        described_cluster()


def test_the_chief_of_tf_config_is_rank_0(monkeypatch):
    cluster = {"worker": ["host1:1", "host2:1"], "chief": ["host0:1"]}
    monkeypatch.setenv("TF_CONFIG", tf_config(cluster, 1))
    found = described_cluster()
    assert (found.workers, found.rank) == (["host0:1", "host1:1", "host2:1"], 2)


def workers_of_slurm(monkeypatch, **said):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    common = {"STEP_NODELIST": "node[2,10],gpu", "STEP_TASKS_PER_NODE": "2(x2),1", "NODEID": "1", "LOCALID": "1"}
    for name, value in (common | said).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return described_cluster()


def test_workers_of_slurm(monkeypatch):
    found = workers_of_slurm(monkeypatch, JOB_ID="3", STEP_ID="0")
    workers = ["node2:10384", "node2:10385", "node10:10386", "node10:10387", "gpu:10388"]
    assert (found.workers, found.rank) == (workers, 3)
    assert found.resolver.cluster_spec().as_dict() == {"worker": workers}
    assert (found.resolver.task_type, found.resolver.task_id) == ("worker", 3)


def test_workers_of_other_jobs_and_steps_have_other_ports(monkeypatch):
    steps = [("3", "0"), ("3", "1"), ("4", "0"), ("4", "1"), ("123456789", "0")]
    jobs = [workers_of_slurm(monkeypatch, JOB_ID=job, STEP_ID=step).workers for job, step in steps]
    ports = [int(address.rpartition(":")[2]) for workers in jobs for address in workers]
    assert len(set(ports)) == 5 * len(steps)
    assert 10000 <= min(ports) <= max(ports) < 32000
