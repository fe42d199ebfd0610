"""MPI, and the programs that start ranks."""

from __future__ import annotations

import os
import re
import shutil
import sys
from concurrent.futures import Future
from pathlib import Path

from disttrain.launcher.doctor.command import ProbeError, last_line, output
from disttrain.launcher.doctor.finding import PROCESSES, Finding

EXTRA = "pip install 'disttrain[mpi]'"
_LEVELS = ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")
_VERSION_SECONDS = 10.0


def program(name: str) -> str | None:
    """Where a program is: beside this interpreter first, where pip puts it, then on the PATH."""
    return shutil.which(
        name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    )


def library(mpi4py: Future[dict], mpirun: Future[str | None], horovod: Future[dict]) -> list[Finding]:
    """mpi4py, the library that it finds, and whether mpirun and Horovod are of the same MPI."""
    try:
        found = mpi4py.result()
    except ProbeError as error:
        if "No module named 'mpi4py'" in str(error):
            return [Finding("mpi4py", "absent", "not installed", EXTRA, ("mpi",))]
        return [Finding("mpi4py", "bad", f"no MPI library can be loaded: {error}", EXTRA, ("mpi",))]
    level = found["thread_level"]
    said = f"{found['version']}, {found['implementation']}, MPI_THREAD_{_LEVELS[level]}"
    if level < _LEVELS.index("SERIALIZED"):
        mend = "use an MPI with MPI_THREAD_SERIALIZED, and leave mpi4py.rc.thread_level alone"
        return [Finding("mpi4py", "bad", said, mend, ("mpi",))]
    return [Finding("mpi4py", "ok", said, "", ("mpi",)), *_one_mpi(found, mpirun, horovod)]


def launchers(mpirun: Future[str | None], named: bool) -> list[Finding]:
    """mpirun, horovodrun and srun, and which of them `disttrain run` takes; `named`: there are hosts of -H, not Slurm's."""
    rows = [_mpirun(mpirun), _horovodrun(mpirun), _srun()]
    names = [row.name for row in rows if row.status in ("ok", "warn")]
    order = ("mpirun", "horovodrun") if named or not _in_slurm() else ("srun", "mpirun", "horovodrun")
    taken = next((name for name in order if name in names), None)
    if taken:
        return [*rows, Finding("launcher", "ok", f"disttrain run takes {taken}", "", ("horovod", "mpi"))]
    return [
        *rows,
        Finding("launcher", "absent", "nothing here starts ranks of horovod or mpi", EXTRA, ("horovod", "mpi")),
    ]


def mpirun_version() -> str | None:
    """Which MPI mpirun is of, as "Open MPI 5.0.11"; None where there is none.

    Raises:
      ProbeError: it is there and does not answer.
    """
    path = program("mpirun")
    if not path:
        return None
    said = output([path, "--version"], _VERSION_SECONDS)
    match = re.search(r"\(Open MPI\) (\S+)", said)
    return f"Open MPI {match[1]}" if match else said.splitlines()[0].strip()


def root_variables() -> dict[str, str]:
    """What lets Open MPI start as root, in containers; it asks to be told twice."""
    names = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
    return dict.fromkeys(names, "1") if os.geteuid() == 0 else {}


def _mpirun(asked: Future[str | None]) -> Finding:
    try:
        version = asked.result()
    except ProbeError as error:
        return Finding("mpirun", "bad", str(error), EXTRA, ("mpi",))
    if version is None:
        return Finding("mpirun", "absent", "not found beside Python or on the PATH", EXTRA, ("mpi",))
    said = f"{version}: {program('mpirun')}"
    missing = [name for name in root_variables() if name not in os.environ]
    if missing and version.startswith("Open MPI"):
        mend = "export " + " ".join(f"{name}=1" for name in missing)
        return Finding("mpirun", "warn", f"{said}; it refuses to start as root", mend, ("mpi",))
    return Finding("mpirun", "ok", said, "", ("mpi",))


def _horovodrun(mpirun: Future[str | None]) -> Finding:
    path = program("horovodrun")
    if not path:
        return Finding("horovodrun", "absent", "not found; mpirun starts Horovod too")
    if re.match(r"Open MPI ([5-9]|\d\d)", _or_none(mpirun) or ""):
        mend = "horovodrun --gloo, or mpirun"
        return Finding("horovodrun", "warn", "its --mpi writes options that Open MPI 5 refuses", mend)
    return Finding("horovodrun", "ok", path)


def _srun() -> Finding:
    path = program("srun")
    if not path:
        return Finding("srun", "absent", "not found: no Slurm here")
    try:
        version = last_line(output([path, "--version"], _VERSION_SECONDS))
    except ProbeError as error:
        return Finding("srun", "bad", str(error), "ask whoever runs the cluster", PROCESSES if _in_slurm() else ())
    return Finding(
        "srun", "ok", f"{version}: {path}" + (f", in job {os.environ['SLURM_JOB_ID']}" if _in_slurm() else "")
    )


def _in_slurm() -> bool:
    return "SLURM_JOB_ID" in os.environ


def _one_mpi(mpi4py: dict, mpirun: Future[str | None], horovod: Future[dict]) -> list[Finding]:
    """A launcher of one MPI and a library of another leave each rank alone in a world of its own."""
    name, rows = "one MPI", []
    launcher, linked = _or_none(mpirun), (_or_none(horovod) or {}).get("library")
    mine = mpi4py["implementation"].replace(" v", " ")
    if launcher and launcher.startswith("Open MPI") and mine != launcher:
        mend = f"put the mpirun of {mine} first on the PATH, or {EXTRA}"
        rows.append(Finding(name, "bad", f"mpirun is of {launcher}, mpi4py uses {mine}", mend, ("mpi",)))
    if linked and mpi4py["library"] and os.path.realpath(linked) != os.path.realpath(mpi4py["library"]):
        said = f"Horovod is linked with {linked}, mpi4py uses {mpi4py['library']}"
        rows.append(Finding(name, "bad", said, "disttrain build-horovod", ("horovod",)))
    same = ["mpi4py", *(["mpirun"] if launcher else []), *(["Horovod"] if linked else [])]
    return rows or [Finding(name, "ok", f"{', '.join(same)} use the same: {mine}")]


def _or_none(asked: Future):
    """What came of it; None where it failed, which its own row says."""
    return None if asked.exception() else asked.result()
