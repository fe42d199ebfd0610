"""What this machine gives to a rank: cores, memory, shared memory, file descriptors."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

from disttrain.launcher.doctor.finding import Finding

_GIB = 2**30
_CGROUPS = Path("/sys/fs/cgroup")
_SHARED_MEMORY = _GIB // 4  # MPI's and NCCL's segments of some ranks; Docker's default is a quarter of it
_DESCRIPTORS = 1024  # each rank has sockets to many others, and tf.data opens files in parallel
_MEMORY_PER_RANK = 1 * _GIB  # TensorFlow alone takes some half of it


def cores(ranks: int) -> list[Finding]:
    """Cores that may be used here, threads asked for, and the container's quota."""
    usable, quota = len(os.sched_getaffinity(0)), cpu_quota()
    threads = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS") if name in os.environ}
    said = f"{usable} of {os.cpu_count()}" + (f", the container may use {quota:g}" if quota else "")
    said += "".join(f", {name}={value}" for name, value in threads.items())
    if quota and quota < usable:
        mend = f"export TF_NUM_INTRAOP_THREADS={max(1, int(quota))} (TensorFlow starts a thread for each of {usable})"
        return [Finding("cores", "ok" if threads else "warn", said, "" if threads else mend)]
    if ranks > usable:
        mend = "export OMPI_MCA_mpi_yield_when_idle=1, or fewer ranks"
        return [Finding("cores", "warn", f"{said}, for {ranks} ranks here", mend)]
    too_many = [name for name, value in threads.items() if value.isdigit() and int(value) > usable]
    if too_many:
        return [Finding("cores", "warn", said, f"unset {' '.join(too_many)}")]
    return [Finding("cores", "ok", said)]


def memory(ranks: int) -> list[Finding]:
    """What is free, and the container's limit."""
    info = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(info[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit = memory_limit()
    said = f"{_size(free)} free of {_size(total)}; cgroup limit: {_size(limit) if limit and limit < total else 'none'}"
    if min(free, limit or free) < ranks * _MEMORY_PER_RANK:
        mend = f"free some, or raise the container's limit: a rank takes {_size(_MEMORY_PER_RANK)} and more"
        return [Finding("memory", "warn", said, mend)]
    return [Finding("memory", "ok", said)]


def shared_memory() -> list[Finding]:
    """/dev/shm, by which MPI and NCCL talk within a machine."""
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError as error:
        said = f"/dev/shm: {error.strerror}"
        return [Finding("shared memory", "warn", said, "mount a tmpfs on /dev/shm")]
    said = f"{_size(usage.free)} free of {_size(usage.total)} in /dev/shm"
    if usage.free < _SHARED_MEMORY:
        mend = "docker run --shm-size=1g; Kubernetes: an emptyDir with medium: Memory on /dev/shm; else remove old files there"
        return [Finding("shared memory", "warn", said, mend)]
    return [Finding("shared memory", "ok", said)]


def descriptors() -> list[Finding]:
    """Files and sockets that a process may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    said = f"{_count(soft)}, at most {_count(hard)}"
    if soft != resource.RLIM_INFINITY and soft < _DESCRIPTORS:
        raised = "65536" if hard == resource.RLIM_INFINITY else str(min(hard, 65536))
        mend = (
            f"ulimit -n {raised}"
            if hard == resource.RLIM_INFINITY or hard >= _DESCRIPTORS
            else ("raise nofile in /etc/security/limits.conf, or docker run --ulimit nofile=65536")
        )
        return [Finding("open files", "warn", said, mend)]
    return [Finding("open files", "ok", said)]


def memory_limit() -> int | None:
    """Bytes that this process's control group, or one above it, allows."""
    return min(_limits("memory", "memory.max", "memory.limit_in_bytes"), default=None)


def cpu_quota() -> float | None:
    """Cores' worth of time that this process's control group, or one above it, allows."""
    found = []
    for folder in _groups("cpu"):
        text = (
            _read(folder / "cpu.max") or f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"
        )
        quota, _, period = text.partition(" ")
        if quota.isdigit() and period.isdigit():
            found.append(int(quota) / int(period))
    return min(found, default=None)


def _limits(controller: str, *names: str) -> list[int]:
    said = [_read(folder / name) for folder in _groups(controller) for name in names]
    return [int(text) for text in said if text.isdigit() and int(text) < 2**62]  # version 1 has no word for none


def _groups(controller: str) -> list[Path]:
    """Folders of this process's control group and of those above it, in both versions of the interface."""
    found = []
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _CGROUPS / controllers if controllers else _CGROUPS
        group = root / path.lstrip("/")
        found += [folder for folder in (group, *group.parents) if folder.is_relative_to(root)]
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _size(count: float) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / 2**20:.0f} MiB"


def _count(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit}"
