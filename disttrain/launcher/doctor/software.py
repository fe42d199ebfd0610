"""Python, TensorFlow, Keras, GPUs with what they need, and Horovod."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from concurrent.futures import Future
from pathlib import Path

from disttrain.launcher.doctor.command import ProbeError, output
from disttrain.launcher.doctor.finding import ALL, Finding

_BUILD = "pip install 'disttrain[horovod]' && disttrain build-horovod"
_CUDA_PACKAGES = {"CUDA runtime": "nvidia-cuda-runtime-cu12", "cuDNN": "nvidia-cudnn-cu12", "NCCL": "nvidia-nccl-cu12"}


def python() -> list[Finding]:
    """This Python against what disttrain asks for."""
    try:
        package = importlib.metadata.metadata("disttrain")
        ours, wanted = Finding("disttrain", "ok", package["Version"]), package["Requires-Python"]
    except importlib.metadata.PackageNotFoundError:
        ours, wanted = Finding("disttrain", "warn", "runs from its source folder, not installed", "pip install ."), ""
    version = platform.python_version()
    if fits(version, wanted):
        return [ours, Finding("Python", "ok", f"{version} ({wanted})", "", ALL)]
    return [ours, Finding("Python", "bad", f"{version}, {wanted} is wanted", "use another Python", ALL)]


def tensorflow(asked: Future[dict]) -> list[Finding]:
    """TensorFlow, Keras, GPUs, CUDA and NCCL."""
    try:
        found = asked.result()
    except ProbeError as error:
        wanted = f"pip install 'tensorflow{requirement('disttrain', 'tensorflow') or ''}'"
        if "No module named 'tensorflow'" in str(error):
            return [Finding("TensorFlow", "absent", "not installed", wanted, ALL)]
        return [Finding("TensorFlow", "bad", f"does not import: {error}", f"{wanted} --force-reinstall", ALL)]
    return [
        _version("TensorFlow", "tensorflow", found["version"]),
        *_keras(found["keras"]),
        *_gpus(found["gpus"], found["cuda"], found["driver_cuda"]),
    ]


def horovod(asked: Future[dict]) -> list[Finding]:
    """Whether Horovod imports with this TensorFlow, and what it was built with."""
    try:
        found = asked.result()
    except ProbeError as error:
        if "No module named 'horovod'" in str(error):
            return [Finding("Horovod", "absent", "not installed", _BUILD, ("horovod",))]
        mends = {"libmpi": "pip install 'disttrain[mpi]'", "No module named 'tensorflow'": "install TensorFlow first"}
        mend = next((mend for word, mend in mends.items() if word in str(error)), "disttrain build-horovod")
        return [Finding("Horovod", "bad", f"does not import: {error}", mend, ("horovod",))]
    features = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in found["features"].items())
    said = f"{found['version']}: {features}"
    if not (found["features"]["MPI"] or found["features"]["Gloo"]):
        return [Finding("Horovod", "bad", said, "disttrain build-horovod", ("horovod",))]
    return [Finding("Horovod", "ok", said, "", ("horovod",))]


def fits(version: str, specifier: str) -> bool:
    """Whether a version of numbers fits a specifier such as ">=2.21,<2.22"; what is not understood fits."""
    for operator, limit in re.findall(r"(>=|<=|==|<|>)\s*([\d.]+)", specifier):
        difference = _compare(version, limit)
        if not {
            ">=": difference >= 0,
            "<=": difference <= 0,
            "==": difference == 0,
            "<": difference < 0,
            ">": difference > 0,
        }[operator]:
            return False
    return True


def requirement(of: str, package: str) -> str | None:
    """The versions of a package that another one asks for, its extras included; None where it asks for none."""
    try:
        asked = importlib.metadata.requires(of) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for line in asked:
        name, specifier = re.match(r"([A-Za-z0-9_.-]+)\s*(?:\[[^]]*\])?\s*\(?([^;)]*)", line).groups()
        if name == package:
            return specifier.strip()
    return None


def _compare(version: str, limit: str) -> int:
    left, right = ([int(n) for n in re.findall(r"\d+", text)] for text in (version, limit))
    length = max(len(left), len(right))
    left, right = (numbers + [0] * (length - len(numbers)) for numbers in (left, right))
    return (left > right) - (left < right)


def _version(name: str, package: str, version: str) -> Finding:
    wanted = requirement("disttrain", package) or ""
    if fits(version, wanted):
        return Finding(name, "ok", f"{version} ({wanted})", "", ALL)
    return Finding(name, "bad", f"{version}, {wanted} is wanted", f"pip install '{package}{wanted}'", ALL)


def _keras(found: dict[str, str]) -> list[Finding]:
    if "error" in found:
        backend = os.environ.get("KERAS_BACKEND", "tensorflow")
        mend = "export KERAS_BACKEND=tensorflow" if backend != "tensorflow" else "pip install --force-reinstall keras"
        return [Finding("Keras", "bad", f"does not import: {found['error']}", mend, ALL)]
    if found["backend"] != "tensorflow":
        said = f"{found['version']}, which runs on {found['backend']}"
        return [Finding("Keras", "bad", said, "export KERAS_BACKEND=tensorflow (or edit ~/.keras/keras.json)", ALL)]
    return [_version("Keras", "keras", found["version"])]


def _gpus(seen: int, wanted_cuda: str | None, driver_cuda: int) -> list[Finding]:
    broken = "nvidia-smi lists none"
    try:
        # One GPU a line: its name, the driver, its memory.
        cards = output(
            ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"], seconds=10
        ).splitlines()
    except ProbeError as error:
        cards, broken = [], str(error)
    driver = Path("/proc/driver/nvidia/version")
    if not cards and not driver.exists() and not seen:
        return [Finding("GPUs", "absent", "none, and no NVIDIA driver: trains on CPUs")]
    if not cards and not seen:
        return [Finding("GPUs", "warn", f"a driver is there, but {broken}", "reinstall or reload the NVIDIA driver")]
    rows = []
    if seen:
        rows.append(Finding("GPUs", "ok", f"{seen}: {'; '.join(cards)}" if cards else f"{seen}"))
    elif os.environ.get("CUDA_VISIBLE_DEVICES", "x") in ("", "-1"):
        rows.append(
            Finding("GPUs", "warn", f"{len(cards)}, hidden by CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES")
        )
    else:
        said = f"{'; '.join(cards)}, but TensorFlow sees none"
        rows.append(Finding("GPUs", "warn", said, "pip install 'disttrain[gpu]' (CUDA's libraries)"))
    return [*rows, *_cuda(wanted_cuda, driver_cuda)]


def _cuda(wanted: str | None, driver: int) -> list[Finding]:
    if not wanted:
        mend = "pip install --force-reinstall 'tensorflow[and-cuda]'"
        return [Finding("CUDA", "warn", "this TensorFlow was built without CUDA", mend)]
    rows = []
    # Any driver of the same major version runs it.
    can, major = driver // 1000, int(wanted.split(".")[0])
    said = f"driver: up to {can}.{driver % 1000 // 10}; TensorFlow: {wanted}"
    if can < major:
        rows.append(Finding("CUDA driver", "warn", said, f"install a driver for CUDA {major}"))
    else:
        rows.append(Finding("CUDA driver", "ok", said))
    return [*rows, *(_cuda_package(name, package) for name, package in _CUDA_PACKAGES.items())]


def _cuda_package(name: str, package: str) -> Finding:
    wanted = requirement("tensorflow", package) or ""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "warn", f"not from pip; TensorFlow wants {wanted}", "pip install 'disttrain[gpu]'")
    if fits(version, wanted):
        return Finding(name, "ok", f"{version} (TensorFlow wants {wanted})")
    return Finding(name, "warn", f"{version}, TensorFlow wants {wanted}", f"pip install '{package}{wanted}'")
