"""Building Horovod: everything but the compiling itself, which `launch/test.sh` does before the tests. No network."""

import dataclasses
import importlib.metadata
import io
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from disttrain.errors import BackendError
from disttrain.native import horovod_build, horovod_source, process, toolchain
from disttrain.native.horovod_build import Recipe, Tools
from disttrain.native.log import last_error, percent
from disttrain.native.toolchain import Cuda, Mpi

ROOT = Path(__file__).parents[1]
TOOLS = Tools(Mpi(Path("/opt/mpi/bin/mpicxx"), "5.0.11", (Path("/opt/mpi/lib"),)), cuda=None)
CUDA = Cuda(Path("/opt/cuda"), "13.0", Path("/opt/nccl"), "2.28.3")
PROGRAMS = ("c++", "cc", "make", "cmake", "mpirun", "mpicxx")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return horovod_build.cache_folder()


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder of programs that do nothing, and the only one where programs are looked for."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in PROGRAMS:
        (folder / name).write_text("#!/bin/sh\necho 'mpicxx: Open MPI 5.0.11 (Language: C++)'\n")
        (folder / name).chmod(0o755)
    monkeypatch.setattr(toolchain, "search_path", lambda: str(folder))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return folder


# What is missing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("mpicxx", r"MPI's compiler wrapper mpicxx, which is not here: pip install 'disttrain\[horovod\]'$"),
        ("cmake", r"cmake, which is not here: pip install 'disttrain\[horovod\]'$"),
        ("c++", r"a C\+\+ compiler \(c\+\+\), which is not here: install it \(.* apt-get install g\+\+ make\)$"),
        ("cc", r"a C compiler \(cc\), which is not here: install it"),
        ("make", r"needs make, which is not here: install it"),
    ],
)
def test_a_missing_program_is_named_with_the_way_to_get_it(cache, programs, missing, sentence):
    (programs / missing).unlink()
    with pytest.raises(BackendError, match=sentence):
        horovod_build.build_horovod()
    assert not list(cache.rglob("build-*"))


def test_a_missing_mpirun(programs):
    (programs / "mpirun").unlink()
    with pytest.raises(BackendError, match=r"mpirun, which is not here: pip install 'disttrain\[horovod\]'$"):
        toolchain.mpirun()


def test_missing_python_packages(monkeypatch):
    monkeypatch.setattr(toolchain, "find_spec", lambda name: None if name in ("cloudpickle", "yaml") else name)
    with pytest.raises(
        BackendError, match=r"Python packages cloudpickle, yaml, .*: pip install 'disttrain\[horovod\]'$"
    ):
        toolchain.check_python()
    monkeypatch.setattr(toolchain, "find_spec", lambda name: None if name == "pip" else name)
    with pytest.raises(BackendError, match=r"pip installs Horovod, and is not here: .* -m ensurepip$"):
        toolchain.check_python()


def test_an_mpi_that_is_not_open_mpi(programs):
    (programs / "mpicxx").write_text("#!/bin/sh\necho 'mpicxx for MPICH version 4.2.0'\n")
    with pytest.raises(BackendError, match="mpicxx is not Open MPI's, the only MPI that is supported"):
        toolchain.mpi()


def test_another_tensorflow(cache, programs, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.20.1")
    sentence = r"for TensorFlow 2\.21 only, and 2\.20\.1 is installed: pip install 'tensorflow==2\.21\.\*'$"
    with pytest.raises(BackendError, match=sentence):
        horovod_build.build_horovod()


def test_no_tensorflow(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(BackendError, match=r"TensorFlow is not installed.*: pip install disttrain$"):
        toolchain.tensorflow_version()


def test_gpu_without_nccl(tmp_path, programs, monkeypatch):
    for name in ("bin/nvcc", "include/cuda_runtime.h"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("HOROVOD_CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("HOROVOD_NCCL_HOME", raising=False)
    monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"needs NCCL, which is not here: pip install 'disttrain\[gpu\]'"):
        toolchain.cuda()

    nccl = tmp_path / "nccl"
    (nccl / "include").mkdir(parents=True)
    (nccl / "lib").mkdir()
    (nccl / "include" / "nccl.h").write_text("#define NCCL_MAJOR 2\n#define NCCL_MINOR 28\n#define NCCL_PATCH 3\n")
    (nccl / "lib" / "libnccl.so.2").touch()
    monkeypatch.setenv("HOROVOD_NCCL_HOME", str(nccl))
    assert toolchain.cuda() == Cuda(tmp_path, "13.0", nccl, "2.28.3")


def test_a_cache_that_cannot_be_written(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    with pytest.raises(BackendError, match=r"cannot write to /proc/nowhere/disttrain/horovod: .* Set XDG_CACHE_HOME"):
        horovod_build.cache_folder()


# The source -----------------------------------------------------------------------------------------------------------


def test_a_source_that_is_not_there_or_not_the_one(cache, tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        BackendError, match=r"0\.28\.1 could not be downloaded: ERROR: No matching distribution.*The log: "
    ):
        horovod_source.download(cache, log)

    name = f"horovod-{horovod_source.VERSION}"
    with tarfile.open(tmp_path / f"{name}.tar.gz", "w:gz") as tar:
        text = f"open({str(tmp_path / 'was run')!r}, 'w')"
        entry = tarfile.TarInfo(f"{name}/setup.py")
        entry.size = len(text)
        tar.addfile(entry, io.BytesIO(text.encode()))
    shutil.copy(tmp_path / f"{name}.tar.gz", cache)  # one that lies in the cache is checked, too
    with pytest.raises(BackendError, match="could not be downloaded: ERROR: THESE PACKAGES DO NOT MATCH THE HASHES"):
        horovod_source.download(cache, log)
    assert not (tmp_path / "was run").exists()


@pytest.mark.parametrize("patch", horovod_source.PATCHES, ids=lambda patch: patch.file)
def test_a_patch_fits_once_or_fails_loudly(tmp_path, patch):
    file = tmp_path / patch.file
    file.parent.mkdir(parents=True)
    file.write_text(f"before\n{patch.old}\nafter\n")
    patch.apply(tmp_path)
    assert file.read_text() == f"before\n{patch.new}\nafter\n"
    for copies in (0, 2):
        file.write_text(f"before\n{patch.old * copies}\nafter\n")
        with pytest.raises(BackendError, match=rf"{patch.file} of Horovod's source: .* occurs {copies} times there"):
            patch.apply(tmp_path)
    with pytest.raises(BackendError, match="occurs 0 times there"):
        patch.apply(tmp_path / "nowhere")


def test_the_stand_in_headers_are_in_the_package(tmp_path):
    for name in ("disttrain", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-w",
        "out",
        ".",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next((tmp_path / "out").glob("*.whl"))) as wheel:
        shipped = {name for name in wheel.namelist() if name.endswith(".h")}
        folder = "disttrain/native/horovod_headers/tensorflow/compiler/xla"
        assert shipped == {f"{folder}/client/xla_builder.h", f"{folder}/service/custom_call_target_registry.h"}
        for name in shipped:
            code = [line for line in wheel.read(name).decode().splitlines() if not line.startswith("//")]
            assert code == ["#pragma once", "#undef HAVE_GPU"]


# The cache ------------------------------------------------------------------------------------------------------------


def test_the_key_changes_with_each_ingredient():
    recipe = Recipe("2.21.0", "cpython-311-x86_64-linux-gnu", "5.0.11", "cpu", "0123456789ab")
    others = [
        dataclasses.replace(recipe, tensorflow="2.21.1"),
        dataclasses.replace(recipe, python="cpython-312-x86_64-linux-gnu"),
        dataclasses.replace(recipe, mpi="4.1.6"),
        dataclasses.replace(recipe, device="cuda13.0-nccl2.28.3"),
        dataclasses.replace(recipe, changes="ba9876543210"),
    ]
    assert len({recipe.key, *(other.key for other in others)}) == 6
    assert recipe.key == "horovod0.28.1-tf2.21.0-cpython-311-x86_64-linux-gnu-openmpi5.0.11-cpu-0123456789ab"


def test_the_recipe_changes_with_tools_flags_and_patches(monkeypatch):
    recipes = [horovod_build.make_recipe(TOOLS)]

    def add(tools):
        recipes.append(horovod_build.make_recipe(tools))

    add(dataclasses.replace(TOOLS, cuda=CUDA))
    add(dataclasses.replace(TOOLS, cuda=dataclasses.replace(CUDA, version="12.9")))
    add(dataclasses.replace(TOOLS, cuda=dataclasses.replace(CUDA, nccl_version="2.32.0")))
    add(dataclasses.replace(TOOLS, mpi=dataclasses.replace(TOOLS.mpi, version="5.0.10")))
    add(dataclasses.replace(TOOLS, mpi=dataclasses.replace(TOOLS.mpi, libraries=(Path("/usr/lib"),))))
    with monkeypatch.context() as patched:
        patched.setitem(horovod_build._FLAGS, "HOROVOD_CPU_OPERATIONS", "GLOO")
        add(TOOLS)
    with monkeypatch.context() as patched:
        patched.setattr(horovod_source, "PATCHES", horovod_source.PATCHES[:1])
        add(TOOLS)
    with monkeypatch.context() as patched:
        patched.setattr(horovod_source, "HEADERS", ROOT / "nowhere")
        add(TOOLS)
    assert len({recipe.key for recipe in recipes}) == len(recipes)
    assert recipes[1].device == "cuda13.0-nccl2.28.3"
    assert recipes[0] == horovod_build.make_recipe(TOOLS)


def test_libraries_of_this_environment_are_found_relative_to_the_wheel():
    inside = Tools(Mpi(Path(sys.prefix, "bin", "mpicxx"), "5.0.11", (Path(sys.prefix, "lib"),)), cuda=None)
    assert sys.prefix not in horovod_build._library_path(inside)
    assert horovod_build._library_path(TOOLS).startswith("/opt/mpi/lib;$ORIGIN/../../tensorflow")


_TWO_AT_A_TIME = """
import sys, time
from pathlib import Path
from disttrain.native import horovod_build as hb

def build(recipe, tools, folder, *rest):
    with Path(sys.argv[1]).open("a") as file:
        file.write("built\\n")
    time.sleep(1)
    folder.mkdir()
    (folder / "horovod-0.whl").write_bytes(b"wheel")
    return folder / "horovod-0.whl"

hb._build = build
hb._installed_hash = lambda: hb.sha256(next(hb.cache_folder().glob("*/*.whl")))
hb._install = lambda *rest: None
hb._check = lambda wheel, *rest: hb._passed(wheel).touch()
outcome = hb.build_horovod(say=print)
print(outcome.built, outcome.wheel.read_bytes())
"""


@pytest.mark.skipif(not toolchain.program("mpicxx"), reason="pip install 'disttrain[horovod]'")
def test_two_processes_build_once(cache, tmp_path):
    command = [sys.executable, "-c", _TWO_AT_A_TIME, str(tmp_path / "count")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(process.communicate(timeout=60)[0].splitlines()[-1] for process in both)
    assert said == ["False b'wheel'", "True b'wheel'"]
    assert (tmp_path / "count").read_text() == "built\n"


def test_what_is_installed_is_left_alone():
    """The real command. It compiles and installs nothing here, and needs no TensorFlow to know that."""
    try:
        recipe = horovod_build.make_recipe(Tools(toolchain.mpi(), cuda=None))
        wheel = next((horovod_build.cache_folder() / recipe.key).glob("*.whl"))
    except (BackendError, StopIteration):
        pytest.skip("disttrain build-horovod has not been run here")
    if not horovod_build._passed(wheel).is_file():
        pytest.skip("disttrain build-horovod has not been run here")
    installed = importlib.metadata.distribution("horovod").locate_file("horovod/__init__.py")
    before = os.stat(installed)
    command = [str(Path(sys.executable).parent / "disttrain"), "build-horovod"]
    begin = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - begin < 10  # half a second where nothing else runs
    lines = done.stdout.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Horovod 0.28.1 is here already; the wheel: ")
    assert Path(lines[0].rpartition(": ")[2]).is_file()
    assert os.stat(installed) == before


# Logs and processes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[ 9%] Building\n/x/mpi_ops.cc:7:3: fatal error: y.h: No such file or directory\ncompilation terminated.\n"
            "make[1]: *** [Makefile:1: all] Error 2\nsubprocess.CalledProcessError: Command '[]' returned 2.\n"
            "error: subprocess-exited-with-error\nERROR: Failed building wheel for horovod\n",
            "/x/mpi_ops.cc:7:3: fatal error: y.h: No such file or directory.",
        ),
        (
            "CMake Error at CMakeLists.txt:9 (find_package):\n  Could not find MPI.\n\nerror: subprocess-exited-with-error",
            "CMake Error at CMakeLists.txt:9 (find_package): Could not find MPI.",
        ),
        ("all is well\nand then it ended\n", "and then it ended."),
        ("", "it said nothing."),
    ],
)
def test_the_line_of_a_log_that_says_what_went_wrong(tmp_path, text, said):
    (tmp_path / "log").write_text(text)
    assert last_error(tmp_path / "log") == said


def test_percent(tmp_path):
    log = tmp_path / "log"
    log.write_text("[  3%] Building\n" + "x" * 200_000)
    assert percent(log) == 0
    log.write_text("x" * 200_000 + "\n[  3%] Building\n[ 57%] Building\n")
    assert percent(log) == 57


def test_nothing_is_left_behind_when_time_is_up(tmp_path, monkeypatch):
    # With job control every child gets a process group of its own, as mpirun's ranks do. One of them does not want to end.
    script = "set -m; sleep 300 & (trap '' TERM; echo $$ >pid; while :; do sleep 0.1; done) & wait"
    monkeypatch.setattr(process, "_GRACE", 0.5)
    with pytest.raises(TimeoutError, match=r"bash took more than 0\.5 s"):
        process.run(["bash", "-c", script], tmp_path / "log", folder=tmp_path, limit=0.5)
    session = int((tmp_path / "pid").read_text())
    assert process._session(session) == []
    assert process.run(["sh", "-c", "echo said; exit 3"], tmp_path / "log") == 3
    assert (tmp_path / "log").read_text().endswith("said\n")
