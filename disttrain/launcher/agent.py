"""What `disttrain run` starts in the place of each rank: `python -m disttrain.launcher.agent PROGRAM ...`.

mpirun, horovodrun and srun each have their own idea of what it means that a job has ended; Open MPI calls one a success whose
host was lost. So a small process stands between them and every rank. It keeps a line to `disttrain run`, starts the program
when all ranks are there, passes on what it prints and how it ends, and ends it when the launcher is gone, so that nothing is
left behind on any host.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from disttrain.errors import EXIT_FOLLOWED, BackendError, ConfigError
from disttrain.launcher.facts import facts
from disttrain.launcher.line import BEAT_SECONDS, LOST_SECONDS, Line, connect
from disttrain.world import PROGRESS_FD, World, world

# Set by the launcher: where it listens, and a secret.
ADDRESS, TOKEN = "DISTTRAIN_LAUNCHER", "DISTTRAIN_LAUNCHER_TOKEN"

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_CHUNK = 1 << 16
# How long the launcher may take to let this process go after its program has ended.
_LET_GO_SECONDS = 20
# How long what the program has left behind may go on talking.
_PIPES_SECONDS = 2
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main(program: list[str]) -> int:
    """Runs the program as this rank; returns its exit code, 128 + n where signal n ended it."""
    if ADDRESS not in os.environ:  # a command line that `disttrain run --dry-run` has printed, run by hand
        os.execvp(program[0], program)
    found = world() or World("nobody", 0, 1, 0, False)
    addresses, _, port = os.environ.pop(ADDRESS).rpartition(":")
    line = connect(addresses.split(","), int(port))
    line.send(
        "hello",
        token=os.environ.pop(TOKEN),
        rank=found.rank,
        size=found.size,
        launcher=found.launcher,
        host=socket.gethostname(),
        pid=os.getpid(),
        facts=facts(),
    )
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    return _Agent(line, program).run()


class _Agent:
    """The line, the program, and one loop that waits for both."""

    def __init__(self, line: Line, program: list[str]):
        self._line, self._command = line, program
        self._parent = os.getppid()
        self._program: subprocess.Popen | None = None
        self._code: int | None = None
        self._program_over = float("inf")
        self._let_go, self._kill_at = False, float("inf")
        self._streams = 0
        self._selector = selectors.DefaultSelector()
        self._selector.register(line, selectors.EVENT_READ, self._hear)
        self._signals, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup)
        for number in _FORWARDED:
            signal.signal(number, lambda *_: None)
        self._selector.register(self._signals, selectors.EVENT_READ, self._forward)

    def run(self) -> int:
        told, ended = False, 0.0
        while not self._let_go:
            for key, _ in self._selector.select(BEAT_SECONDS):
                key.data()
            now = time.monotonic()
            self._say(self._line.beat)
            if now > self._kill_at:
                self._signal_program(signal.SIGKILL)
            # More patient than the launcher, which may stand still for a while before a reader that does not read.
            if self._line.silent(2 * LOST_SECONDS):
                self._launcher_is_gone()
                _end_daemon()
            if (
                os.getppid() != self._parent
            ):  # Slurm does not miss a lost slurmstepd, and its ranks would be out of reach
                self._launcher_is_gone()
            # A daemon that the program has started may hold its pipes open for ever.
            quiet = not self._streams or now - self._program_over > _PIPES_SECONDS
            if self._code is not None and quiet and not told:
                told, ended = True, now
                self._say(lambda: self._line.send("exit", code=self._code))
            if told and now - ended > _LET_GO_SECONDS:
                break
        # Whatever the program has left in its group ends with it.
        self._signal_program(signal.SIGKILL)
        code = EXIT_FOLLOWED if self._code is None else self._code
        return code if code >= 0 else 128 - code

    # What comes in -----------------------------------------------------------------------------------------------------

    def _hear(self) -> None:
        try:
            messages = self._line.read()
        except (OSError, ValueError):
            messages = None
        if messages is None:
            self._launcher_is_gone()
            return
        for message in messages:
            if message["kind"] == "go":
                self._start(message["environment"])
            elif message["kind"] == "signal":
                self._signal_program(message["number"])
            elif message["kind"] == "stop":
                self._signal_program(signal.SIGTERM)
                self._kill_at = time.monotonic() + message["grace"]
                if self._program is None:
                    self._let_go = True
            elif message["kind"] == "bye":
                self._let_go = True

    def _start(self, environment: dict[str, str]) -> None:
        read, write = os.pipe()
        try:
            self._program = subprocess.Popen(
                self._command,
                env=os.environ | environment | {PROGRESS_FD: str(write), "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[write],
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        except OSError as error:
            text = f"{self._command[0]} cannot be started on {socket.gethostname()}: {error.strerror}"
            self._say(lambda: self._line.send("output", stream="stderr", text=text))
            self._code = 127
            return
        finally:
            os.close(write)
        for name, descriptor in (
            ("stdout", self._program.stdout.fileno()),
            ("stderr", self._program.stderr.fileno()),
            ("progress", read),
        ):
            self._streams += 1
            self._selector.register(descriptor, selectors.EVENT_READ, self._reader(name, descriptor))
        ended = os.pidfd_open(self._program.pid)
        self._selector.register(ended, selectors.EVENT_READ, lambda: self._program_ended(ended))

    def _reader(self, name: str, descriptor: int) -> Callable[[], None]:
        """Passes on what comes from the descriptor, line by line."""
        rest = b""

        def read() -> None:
            nonlocal rest
            data = os.read(descriptor, _CHUNK)
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > _CHUNK:  # no end of line in sight
                lines, rest = [*lines, rest], b""
            if not data:
                lines, rest = [*lines, *filter(None, [rest])], b""
                self._selector.unregister(descriptor)
                self._streams -= 1
            for text in lines:
                self._say(lambda text=text: self._line.send("output", stream=name, text=text.decode(errors="replace")))

        return read

    def _program_ended(self, descriptor: int) -> None:
        self._selector.unregister(descriptor)
        os.close(descriptor)
        self._code, self._program_over = self._program.wait(), time.monotonic()
        self._signal_program(signal.SIGKILL)
        _end_orphans()

    def _forward(self) -> None:
        """A signal that came to this process (from Slurm, from mpirun) is meant for the program."""
        for number in os.read(self._signals, 64):
            if number in _FORWARDED:
                self._say(lambda number=number: self._line.send("signal", number=number))
                self._signal_program(number)
                if self._program is None:
                    self._code, self._let_go = -number, True

    # What goes out -----------------------------------------------------------------------------------------------------

    def _say(self, send: Callable[[], None]) -> None:
        try:
            send()
        except OSError:
            self._launcher_is_gone()

    def _signal_program(self, number: int) -> None:
        if self._program is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._program.pid, number)

    def _launcher_is_gone(self) -> None:
        """Nobody would ever know of this rank again."""
        self._signal_program(signal.SIGKILL)
        self._let_go = True


def _end_orphans() -> None:
    """What the program has started in a session of its own is this process's child when the program is gone."""
    for _ in range(100):  # each that ends may leave children of its own
        known = Path(f"/proc/self/task/{os.getpid()}/children")  # not every kernel has it
        children = known.read_text().split() if known.exists() else []
        if not children:
            return
        for child in map(int, children):
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def _end_daemon() -> None:
    """Open MPI's daemon on this host waits minutes for a network that is cut, since it has words that nobody acknowledges."""
    parent = os.getppid()
    with contextlib.suppress(OSError):
        if Path(f"/proc/{parent}/comm").read_text().strip() == "prted":
            os.kill(parent, signal.SIGKILL)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (BackendError, ConfigError) as error:
        sys.exit(f"disttrain: error: {error}")
