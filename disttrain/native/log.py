"""Reading the logs of compilers, CMake, pip and mpirun."""

from __future__ import annotations

import re
from pathlib import Path

_ERROR = re.compile(
    r"error:|CMake Error|undefined reference|DO NOT MATCH|No such file or directory|No space left|\b\w+Error: ", re.I
)
# What pip, make and Python say of an error that another has named before them.
_ECHO = re.compile(
    r"subprocess-exited-with-error|metadata-generation-failed|failed-wheel-build|Failed (building|to build)|"
    r"CalledProcessError|exited with error|make(\[\d+\])?: \*\*\*|warning: "
)


def last_error(log: Path) -> str:
    """The last line that tells what went wrong, as a sentence; where none does, the last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    found = [number for number, line in enumerate(lines) if _ERROR.search(line) and not _ECHO.search(line)]
    if not lines:
        return "it said nothing."
    if not found:
        return _sentence(lines[-1])
    said = lines[found[-1]]
    if said.startswith("CMake Error") and found[-1] + 1 < len(lines):  # CMake names the place, and the error below it
        said += f" {lines[found[-1] + 1]}"
    return _sentence(said)


def percent(log: Path) -> int:
    """How far make says it has come."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 100_000))  # commands are long, and the log is read ten times a second
        found = re.findall(rb"\[ *(\d+)%\]", file.read())
    return int(found[-1]) if found else 0


def _sentence(line: str) -> str:
    line = line if len(line) <= 300 else f"{line[:300]}…"
    return line if line.endswith((".", "!", "…")) else f"{line}."
