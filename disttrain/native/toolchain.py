"""What Horovod is built with and for: TensorFlow, MPI, compilers, CUDA. Found here, or named with the way to get it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from disttrain.errors import BackendError

EXTRA = "pip install 'disttrain[horovod]'"
_MODULES = ("setuptools", "wheel", "packaging", "cloudpickle", "psutil", "yaml")


@dataclass(frozen=True)
class Mpi:
    """An Open MPI with its compiler wrapper."""

    compiler: Path
    version: str
    libraries: tuple[Path, ...]


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit and an NCCL."""

    home: Path
    version: str
    nccl: Path
    nccl_version: str


def search_path() -> str:
    """Where programs are looked for: beside this interpreter first, where pip puts them, activated or not."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def program(name: str) -> Path | None:
    """The program of this name, or None."""
    found = shutil.which(name, path=search_path())
    return Path(found) if found else None


def tensorflow_version() -> str:
    """The installed TensorFlow's version, without importing it."""
    try:
        version = importlib.metadata.version("tensorflow")
    except importlib.metadata.PackageNotFoundError:
        raise BackendError("TensorFlow is not installed, Horovod is built for it: pip install disttrain") from None
    if version.split(".")[:2] != ["2", "21"]:
        raise BackendError(
            f"Horovod is built for TensorFlow 2.21 only, and {version} is installed: pip install 'tensorflow==2.21.*'"
        )
    return version


def package_folder(name: str) -> Path | None:
    """The folder of an installed package, which is not imported."""
    spec = find_spec(name)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def mpi() -> Mpi:
    """Open MPI's compiler wrapper, its version and the folders of its libraries."""
    compiler = program("mpicxx")
    if not compiler:
        raise BackendError(f"Horovod needs MPI's compiler wrapper mpicxx, which is not here: {EXTRA}")
    said = _output([compiler, "--showme:version"])
    version = re.search(r"Open MPI (\S+)", said)
    if not version:
        raise BackendError(f"{compiler} is not Open MPI's, the only MPI that is supported: {EXTRA}")
    return Mpi(compiler, version[1], tuple(map(Path, _output([compiler, "--showme:libdirs"]).split())))


def mpirun() -> Path:
    """The program that starts ranks."""
    found = program("mpirun")
    if not found:
        raise BackendError(f"Horovod needs MPI's mpirun, which is not here: {EXTRA}")
    return found


def check_build_tools() -> None:
    """Raises for the first program that compiling needs and that is missing."""
    # CMake takes the compilers from CXX and CC where those are set; they may have words after the program's name.
    c, cpp = os.environ.get("CC") or "cc", os.environ.get("CXX") or "c++"
    for what, command in ((f"a C++ compiler ({cpp})", cpp), (f"a C compiler ({c})", c), ("make", "make")):
        if not program(command.split()[0]):
            raise BackendError(
                f"Horovod needs {what}, which is not here: install it (Debian, Ubuntu: apt-get install g++ make)"
            )
    if not program("cmake"):
        raise BackendError(f"Horovod needs cmake, which is not here: {EXTRA}")


def check_python() -> None:
    """Raises for the Python packages that are missing, of those that build Horovod and those that it imports."""
    if not find_spec("pip"):
        raise BackendError(f"pip installs Horovod, and is not here: {sys.executable} -m ensurepip")
    missing = [name for name in _MODULES if not find_spec(name)]
    if missing:
        raise BackendError(f"Horovod needs the Python packages {', '.join(missing)}, which are not here: {EXTRA}")


def pip(*arguments: str) -> list[str]:
    """The command that runs this interpreter's pip."""
    return [sys.executable, "-m", "pip", *arguments]


def cuda() -> Cuda:
    """A CUDA toolkit with nvcc and headers, and NCCL."""
    home = _cuda_home()
    version = re.search(r"release (\d+\.\d+)", _output([home / "bin" / "nvcc", "--version"]))
    if not version:
        raise BackendError(
            f"{home / 'bin' / 'nvcc'} does not tell its version: set CUDA_HOME to a CUDA toolkit that works"
        )
    nccl = _nccl_home()
    header = (nccl / "include" / "nccl.h").read_text()
    numbers = [re.search(rf"#define NCCL_{part}\s+(\d+)", header)[1] for part in ("MAJOR", "MINOR", "PATCH")]
    return Cuda(home, version[1], nccl, ".".join(numbers))


def _cuda_home() -> Path:
    named = [os.environ.get("HOROVOD_CUDA_HOME"), os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    nvcc = program("nvcc")
    named.append(str(nvcc.resolve().parent.parent) if nvcc else None)
    for home in (Path(name) for name in named if name):
        if (home / "bin" / "nvcc").is_file() and (home / "include" / "cuda_runtime.h").is_file():
            return home
    raise BackendError(
        "--gpu needs a CUDA toolkit, nvcc and headers, which is not here: install one and set CUDA_HOME to its folder"
    )


def _nccl_home() -> Path:
    wheels = find_spec("nvidia")
    named = [os.environ.get("HOROVOD_NCCL_HOME")]
    named += [f"{folder}/nccl" for folder in (wheels.submodule_search_locations or ())] if wheels else []
    for home in (Path(name) for name in named if name):
        if (home / "include" / "nccl.h").is_file() and nccl_library(home):
            return home
    raise BackendError("--gpu needs NCCL, which is not here: pip install 'disttrain[gpu]', or set HOROVOD_NCCL_HOME")


def nccl_library(home: Path) -> Path | None:
    """NCCL's shared library. The wheel has no libnccl.so, by which linkers look, but its versioned name alone."""
    return next(iter(sorted((home / "lib").glob("libnccl.so*"))), None)


def _output(command: list[Path | str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except OSError as error:
        raise BackendError(f"{command[0]} cannot be run: {error.strerror}") from None
    return done.stdout
