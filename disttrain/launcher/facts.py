"""What must be the same on all hosts: which Python and which libraries are there."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys

_LIBRARIES = ("disttrain", "tensorflow", "keras", "horovod", "mpi4py")


def facts() -> dict[str, str]:
    """Name -> version, "missing" where it is not installed. Nothing is imported."""
    return {"Python": platform.python_version(), **{name: _version(name) for name in _LIBRARIES}}


def differences(here: dict[str, str], there: dict[str, str], where: str) -> list[str]:
    """A phrase for each fact that is not the same, for a person."""
    return [
        f"{name} is {there.get(name, 'missing')} on {where} and {version} here"
        for name, version in here.items()
        if there.get(name, "missing") != version
    ]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


if __name__ == "__main__":
    sys.stdout.write(json.dumps(facts()) + "\n")
