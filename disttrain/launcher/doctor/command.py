"""Running other programs: each with a limit of its own, and with nothing of it left behind."""

from __future__ import annotations

import base64
import contextlib
import importlib.resources
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from disttrain.errors import DisttrainError

_GRACE = 3.0  # seconds between the request to end and the end


class ProbeError(DisttrainError):
    """A command that did not start, took too long or failed, in one sentence; with the mend if one is known."""

    def __init__(self, said: str, mend: str = ""):
        super().__init__(said)
        self.mend = mend


def output(command: list[str], seconds: float, environment: Mapping[str, str] | None = None) -> str:
    """What a command writes to stdout.

    Raises:
      ProbeError: there is no such program, it took more than `seconds`, or it failed, with the last line that it wrote.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        raise ProbeError(f"{command[0]} cannot be run: {error.strerror}") from None
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise ProbeError(f"{_name(command)} did not answer within {seconds:g} s and was stopped") from None
    finally:
        end(process)
    if process.returncode:
        raise ProbeError(
            f"{_name(command)} {_how(process.returncode)}: {_reason(err) or _reason(out) or 'it said nothing'}"
        )
    return out


def answer(command: list[str], seconds: float, environment: Mapping[str, str] | None = None) -> Any:
    """The JSON on the last line of what a command writes to stdout; what comes before is its libraries' talk.

    Raises:
      ProbeError: as `output`; or the last line is not JSON.
    """
    said = last_line(output(command, seconds, environment))
    try:
        return json.loads(said)
    except ValueError:
        raise ProbeError(f"{_name(command)} ended without an answer: {said or 'it said nothing'}") from None


def facts(name: str, seconds: float) -> Any:
    """What a script of `inside/` finds out, run by this Python in a process of its own."""
    return answer(script(name), seconds, os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"})


def script(name: str, *arguments: str) -> list[str]:
    """The command line that runs a script of `inside/`. It carries the script itself, in letters that no shell changes, so that
    it works on hosts where disttrain is not."""
    source = importlib.resources.files("disttrain.launcher.doctor.inside").joinpath(f"{name}.py").read_bytes()
    text = base64.b64encode(source).decode()
    run = f"import base64;exec(compile(base64.b64decode('{text}'),'doctor {name}','exec'))"
    return [sys.executable, "-u", "-c", run, *arguments]


def end(process: subprocess.Popen) -> None:
    """Ends a process that leads a session, with all that it has started. It is asked first: mpirun ends its ranks, on other
    hosts too."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
    until = time.monotonic() + _GRACE
    while (living := _session(process.pid)) and time.monotonic() < until:
        for pid in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    process.wait()


def last_line(text: str) -> str:
    """The last line with a word on it; mpirun puts what it says between rules."""
    return next((line.strip() for line in reversed(text.splitlines()) if any(map(str.isalnum, line))), "")


def _session(leader: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended since
            # The name in brackets may hold anything; state, parent, group and session come after it.
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


def _name(command: list[str]) -> str:
    return "Python" if command[0] == sys.executable else Path(command[0]).name


def _reason(said: str) -> str:
    """Python's error where there is one: mpirun says more after it."""
    errors = re.findall(r"^\w*(?:Error|Exception)\b.*", said, re.MULTILINE)
    return errors[-1] if errors else last_line(said)


def _how(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
