"""Running other programs so that nothing of them is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

_GRACE = 10.0  # seconds between the request to end and the end


def run(
    command: list[str],
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    limit: float | None = None,
    watch: Callable[[], None] | None = None,
) -> int:
    """Runs a command, its output appended to `log`, and returns its exit code. Where it takes more than `limit` seconds
    (`TimeoutError`) or the wait is broken off, it is ended with all its descendants."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
    end = None if limit is None else time.monotonic() + limit
    try:
        while process.poll() is None:
            if end is not None and time.monotonic() > end:
                raise TimeoutError(f"{command[0]} took more than {limit:g} s")
            if watch:
                watch()
            time.sleep(0.1)
    except BaseException:
        _end_session(process)
        raise
    return process.returncode


def _end_session(leader: subprocess.Popen) -> None:
    """Asks the leader's group first: mpirun ends its ranks, which have groups of their own, and clears up after them."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGTERM)
    end = time.monotonic() + _GRACE
    while (living := _session(leader.pid)) and time.monotonic() < end + _GRACE:
        if time.monotonic() > end:  # until none is left, since they may have had children meanwhile
            for process in living:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        time.sleep(0.02)
    leader.wait()


def _session(leader: int) -> list[int]:
    """The living processes of a session. Its id cannot be another's meanwhile: we have not yet waited for the leader."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The name in brackets may hold anything; state, parent, group and session come after it.
            state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has ended since
            continue
        if int(session) == leader and state not in "ZX":
            found.append(int(entry.name))
    return found
