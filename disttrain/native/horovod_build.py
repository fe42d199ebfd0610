"""Horovod 0.28.1 for TensorFlow 2.21: built from source once, kept as a wheel, installed and tried out.

Its own package does not build for this TensorFlow. Three things are done about it, all in `horovod_source.py`:

- Two headers that TensorFlow no longer ships get stand-ins of two lines, and two more of TensorFlow's folders are put on the
  compiler's path. What is lost is Horovod's XLA ops, whose XLA interface is gone; nothing else.
- The library finds MPI, and NCCL, relative to itself: a wheel from the cache works in every environment.
- With GPUs, `stream_executor::gpu::AsGpuStreamValue(Stream*)` is gone from TensorFlow. What Horovod calls by that name becomes
  `stream->platform_specific_handle().stream`; without it the library links, and fails as soon as it is loaded.

The wheel has MPI and Gloo, and MPI for operations on CPUs; with `gpu` also NCCL for those on GPUs, compiled by the CUDA toolkit's
nvcc. CUDA's runtime is linked in: the toolkit must not be newer than the driver of the machines that train.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from disttrain.errors import BackendError
from disttrain.native import horovod_check, process, toolchain
from disttrain.native.horovod_source import HEADERS, VERSION, download, fingerprint, sha256, unpack
from disttrain.native.log import last_error, percent
from disttrain.native.toolchain import Cuda, Mpi

_FLAGS = {
    "HOROVOD_WITH_TENSORFLOW": "1",
    "HOROVOD_WITHOUT_PYTORCH": "1",
    "HOROVOD_WITHOUT_MXNET": "1",
    "HOROVOD_WITH_MPI": "1",
    "HOROVOD_WITH_GLOO": "1",
    "HOROVOD_CPU_OPERATIONS": "MPI",
    "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # Gloo's CMake files are older than CMake 4 accepts by itself
}
_CPU_FLAGS = {"HOROVOD_WITHOUT_NVTX": "1"}
# The wheel's NCCL is a shared library, and another one, linked in statically, would be a second NCCL beside TensorFlow's.
_GPU_FLAGS = {"HOROVOD_GPU_OPERATIONS": "NCCL", "HOROVOD_NCCL_LINK": "SHARED"}

_CHECK_LIMIT = 180.0  # seconds; it takes less than ten where two cores are free


@dataclass(frozen=True)
class Recipe:
    """What shapes the wheel: another one is built wherever one of these changes."""

    tensorflow: str
    python: str  # implementation, version, ABI and platform
    mpi: str
    device: str
    changes: str  # a hash of what is changed in the source, of flags, and of where libraries are looked for

    @property
    def key(self) -> str:
        """The name of the wheel's folder."""
        return f"horovod{VERSION}-tf{self.tensorflow}-{self.python}-openmpi{self.mpi}-{self.device}-{self.changes}"


@dataclass(frozen=True)
class Tools:
    """What the wheel is built with."""

    mpi: Mpi
    cuda: Cuda | None

    @property
    def flags(self) -> dict[str, str]:
        """Horovod's build options that do not depend on where things are."""
        return _FLAGS | (_GPU_FLAGS if self.cuda else _CPU_FLAGS)


@dataclass(frozen=True)
class Outcome:
    """What `build_horovod` has done."""

    wheel: Path
    built: bool
    installed: bool


def build_horovod(
    gpu: bool = False,
    jobs: int | None = None,
    say: Callable[[str], None] = lambda line: None,
    show: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Makes sure that this interpreter's environment has a Horovod that works with its TensorFlow.

    `say` gets lines that tell what begins, `show` those that tell how far it has come."""
    tools = Tools(toolchain.mpi(), toolchain.cuda() if gpu else None)
    recipe = make_recipe(tools)
    folder = cache_folder() / recipe.key
    wheel = _wheel(folder)
    if wheel and _is_ready(wheel):
        return Outcome(wheel, built=False, installed=False)
    toolchain.check_python()
    toolchain.mpirun()
    with _only_one(say):
        wheel = _wheel(folder)
        built = wheel is None
        if not wheel:
            try:
                wheel = _build(recipe, tools, folder, jobs or len(os.sched_getaffinity(0)), say, show)
            except OSError as error:  # a full disk, above all: the source takes some 300 MB while it is compiled
                raise BackendError(f"Horovod could not be built in {folder}: {error}") from error
        installed = not _is_ready(wheel)
        if installed:
            _install(wheel, say)
            _check(wheel, gpu, say)
    return Outcome(wheel, built, installed)


# What is built ----------------------------------------------------------------------------------------------------------


def make_recipe(tools: Tools) -> Recipe:
    """Looks up what the wheel depends on."""
    cuda = tools.cuda
    return Recipe(
        tensorflow=toolchain.tensorflow_version(),
        python=sysconfig.get_config_var("SOABI"),
        mpi=tools.mpi.version,
        device=f"cuda{cuda.version}-nccl{cuda.nccl_version}" if cuda else "cpu",
        changes=fingerprint(tools.flags, _library_path(tools)),
    )


def _library_path(tools: Tools) -> str:
    """Where the library looks for others: relative to itself for all that is in its environment."""
    packages = Path(sysconfig.get_path("platlib")).resolve()
    environment, home = Path(sys.prefix).resolve(), packages / "horovod" / "tensorflow"
    folders = [*tools.mpi.libraries, packages / "tensorflow", *([tools.cuda.nccl / "lib"] if tools.cuda else [])]
    return ";".join(
        f"$ORIGIN/{os.path.relpath(folder, home)}" if folder.is_relative_to(environment) else str(folder)
        for folder in map(Path.resolve, folders)
    )


def _build(
    recipe: Recipe, tools: Tools, folder: Path, jobs: int, say: Callable[[str], None], show: Callable[[str], None]
) -> Path:
    """Compiles the wheel in a folder of its own, and puts it into the cache when it is whole."""
    toolchain.check_build_tools()
    folder.mkdir(exist_ok=True)
    for left_behind in folder.glob("build-*"):  # by a process that was killed
        shutil.rmtree(left_behind, ignore_errors=True)
    log = folder / "build.log"
    log.write_text(f"{recipe}\n{tools}\n")
    say(
        f"building Horovod {VERSION} for TensorFlow {recipe.tensorflow}, Open MPI {recipe.mpi} and {recipe.device}, "
        f"{jobs} compilers at a time (about five minutes on two cores); log: {log}"
    )
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as name:
        work = Path(name)
        source = unpack(download(cache_folder(), log), work)
        command = toolchain.pip("wheel", "--verbose", "--no-build-isolation", "--no-deps", "--no-cache-dir")
        command += ["--wheel-dir", str(work / "wheel"), str(source)]
        code = process.run(
            command,
            log,
            environment=_build_environment(tools, work, jobs),
            folder=work,
            watch=lambda: show(f"compiling Horovod, {percent(log)} %"),
        )
        made = _wheel(work / "wheel")
        if code or not made:
            raise BackendError(
                f"Horovod did not compile: {last_error(log)} The log: {log} (where memory is short, --jobs 1 needs least)"
            )
        os.replace(made, folder / made.name)
    return folder / made.name


def _build_environment(tools: Tools, work: Path, jobs: int) -> dict[str, str]:
    """The user's own, less what would steer Horovod's build elsewhere."""
    tensorflow = toolchain.package_folder("tensorflow") / "include" / "external"
    headers = [HEADERS, tensorflow / "highwayhash", tensorflow / "farmhash_archive" / "src"]
    theirs = {name: value for name, value in os.environ.items() if not name.startswith("HOROVOD_")}
    ours = {
        "PATH": toolchain.search_path(),
        "MPI_HOME": str(tools.mpi.compiler.parent.parent),
        "MAKEFLAGS": f"-j{jobs}",
        "CPLUS_INCLUDE_PATH": os.pathsep.join([*map(str, headers), *filter(None, [theirs.get("CPLUS_INCLUDE_PATH")])]),
        "DISTTRAIN_RPATH": _library_path(tools),
        "TMPDIR": str(work),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PIP_USE_PEP517": "1",  # for pips that would run setup.py the old way, which downloads packages by itself
    }
    if tools.cuda:
        # Horovod takes the first nvcc on the path to list architectures, and its own home's to compile.
        ours["PATH"] = os.pathsep.join([str(tools.cuda.home / "bin"), ours["PATH"]])
        ours["HOROVOD_CUDA_HOME"] = str(tools.cuda.home)
        ours["HOROVOD_NCCL_HOME"] = str(_link_nccl(tools.cuda.nccl, work / "nccl"))
    return theirs | tools.flags | ours


def _link_nccl(home: Path, folder: Path) -> Path:
    """A folder with NCCL under the names by which compilers and linkers look for it; the wheel's library has only another."""
    (folder / "lib").mkdir(parents=True)
    (folder / "include").symlink_to((home / "include").resolve())
    (folder / "lib" / "libnccl.so").symlink_to(toolchain.nccl_library(home).resolve())
    return folder


# The cache --------------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where wheels and the source package are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home, "disttrain", "horovod")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lock").touch()
    except OSError as error:
        raise BackendError(
            f"cannot write to {folder}: {error.strerror}. Set XDG_CACHE_HOME to a folder of yours"
        ) from None
    return folder


def _wheel(folder: Path) -> Path | None:
    return next(folder.glob("horovod-*.whl"), None)


@contextlib.contextmanager
def _only_one(say: Callable[[str], None]) -> Iterator[None]:
    """Lets one process at a time build and install; the kernel gives the lock back however that process ends."""
    with (cache_folder() / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another disttrain build-horovod to end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# Installing and checking ------------------------------------------------------------------------------------------------


def _is_ready(wheel: Path) -> bool:
    """Whether exactly this wheel is installed, and has passed the check here."""
    return _installed_hash() == sha256(wheel) and _passed(wheel).is_file()


def _installed_hash() -> str | None:
    """The sha256 of the wheel that the installed Horovod came from, by pip's own record."""
    try:
        record = importlib.metadata.distribution("horovod").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    archive = json.loads(record or "{}").get("archive_info", {})
    return archive.get("hashes", {}).get("sha256") or archive.get("hash", "").removeprefix("sha256=") or None


def _passed(wheel: Path) -> Path:
    """The file that stands for a check that was passed in this environment."""
    return wheel.parent / f"passed-{hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]}"


def _install(wheel: Path, say: Callable[[str], None]) -> None:
    say(f"installing it into {sys.prefix}")
    log = wheel.parent / "install.log"
    log.write_text("")
    command = toolchain.pip("install", "--no-deps", "--force-reinstall", "--no-index", str(wheel))
    _passed(wheel).unlink(missing_ok=True)
    if process.run(command, log):
        raise BackendError(f"Horovod was built, and pip did not install it: {last_error(log)} The log: {log}")


def _check(wheel: Path, gpu: bool, say: Callable[[str], None]) -> None:
    """Two ranks add up a tensor, as a training would start them."""
    say("checking it: two ranks, one all-reduce")
    log = wheel.parent / "check.log"
    log.write_text("")
    command = [str(toolchain.mpirun()), "-np", "2", "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    command += [sys.executable, horovod_check.__file__, *(["--gpu"] if gpu else [])]
    with tempfile.TemporaryDirectory() as work:
        try:
            code = process.run(
                command, log, environment=_check_environment(gpu, work), folder=Path(work), limit=_CHECK_LIMIT
            )
        except TimeoutError:
            raise BackendError(
                f"Horovod was built, and two ranks of it did not end within {_CHECK_LIMIT:g} s; they were stopped. The log: {log}"
            ) from None
    if code:
        raise BackendError(f"Horovod was built, and two ranks of it did not work: {last_error(log)} The log: {log}")
    _passed(wheel).touch()


def _check_environment(gpu: bool, work: str) -> dict[str, str]:
    theirs = {name: value for name, value in os.environ.items() if not name.startswith("HOROVOD_")}
    ours = {"PATH": toolchain.search_path(), "TMPDIR": work, "TF_CPP_MIN_LOG_LEVEL": "3"}
    for component in ("sm", "vader"):  # Open MPI 5's and 4's shared memory: ranks that are killed leave it in /dev/shm
        ours[f"OMPI_MCA_btl_{component}_backing_directory"] = work
    if os.geteuid() == 0:  # in containers; Open MPI asks to be told twice
        ours |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    if not gpu:
        ours["CUDA_VISIBLE_DEVICES"] = ""
    return theirs | ours
