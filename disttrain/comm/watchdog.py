"""Nobody waits for ever: every rank keeps a line to rank 0, apart from the engine's own traffic.

A collective cannot tell a slow rank from a dead one, and a process that hangs in it cannot raise. So each rank says every
second over a TCP line of its own which collective it has come to; rank 0 compares, and when a rank has raised, died,
left, stopped or fallen behind, it tells all the others, who say so in one line and end.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import math
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow as tf

from disttrain.errors import EXIT_FOLLOWED, BackendError
from disttrain.interfaces import interfaces
from disttrain.world import tell_launcher

log = logging.getLogger("disttrain")

_CONNECT_SECONDS = 20
# A rank may leave while others are still on their way out of the last collective.
_LEAVING_SECONDS = 3
_READING_SECONDS = 0.3
# An engine that notices by itself that a rank is gone does so at once.
_ENGINE_SECONDS = 0.5
# What engines raise where another rank has gone in the middle of a collective. None of them says which.
_ENGINE_ERRORS = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.InternalError,
    tf.errors.UnavailableError,
    tf.errors.UnknownError,
)


class Watchdog:
    """The line of one rank, and on rank 0 the place where all lines end.

    Args:
      rank: of this process in the group; one line for each process.
      exchange: gathers one object from every rank, in the order of ranks.
      stall_timeout: seconds after which a rank that does not answer, or that others wait for, ends the job.
      survive: where the others go on without a rank that is lost: makes the collective fail in which this one waits for it.
        A rank that has stopped or fallen behind is then seen to its end, alone.
    """

    def __init__(
        self,
        rank: int,
        exchange: Callable[[Any], list],
        stall_timeout: float,
        survive: Callable[[], None] | None = None,
    ):
        self.rank, self.stall_timeout, self._survive = rank, stall_timeout, survive
        self._cut_at = float("inf")
        self._count, self._depth, self._what, self._since = 0, 0, "the start", time.monotonic()
        self._busy: list[str] = []
        self._lock, self._told, self._said_bye = threading.Lock(), threading.Event(), threading.Event()
        self._closing = self._raising = False
        self._tick = min(1.0, stall_timeout / 4)
        self._processes = exchange(_Process(rank, socket.gethostname(), _machine(), os.getpid()))
        self._me, self._rank0 = self._processes[rank], self._processes[0]
        self._server = _Server(self._processes, stall_timeout, self._tick, survive is not None) if rank == 0 else None
        addresses, port, token = exchange(self._server and self._server.address)[0]
        self._line = _connect(addresses, port)
        self._send(kind="hello", token=token)
        threading.Thread(target=self._listen, name="disttrain-watchdog", daemon=True).start()
        self._hook()

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Within it, this rank is in a collective, or on its way there: `what` says which, for a person."""
        self._note(+1, what)
        try:
            yield
        finally:
            self._note(-1, what)

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Within it, the others may wait for this rank as long as it answers: `what` says for what, for a person."""
        with self._lock:
            self._busy.append(what)
        try:
            yield
        finally:
            with self._lock:
                self._busy.remove(what)

    def close(self) -> None:
        """Says good-bye; from now on this rank may end without taking the others with it."""
        if self._closing or os.getpid() != self._me.pid:  # a fork has nothing to say
            return
        self._closing = True
        with contextlib.suppress(OSError):
            self._beat()
            self._send(kind="bye")
        self._said_bye.set()
        if self._server:
            # All lines end with this process: the others must know first that it is no accident.
            self._server.told_good_bye.wait(_LEAVING_SECONDS)

    def _note(self, change: int, what: str) -> None:
        with self._lock:
            outermost = self._depth == (0 if change > 0 else 1)
            self._depth += change
            if outermost:
                self._count += change > 0
                self._what, self._since = what, time.monotonic()

    def _send(self, **message: Any) -> None:
        self._line.sendall(json.dumps({"rank": self.rank, **message}).encode() + b"\n")

    def _listen(self) -> None:
        """Says where this rank is, hears what rank 0 has to say, and ends the process if it must."""
        lines = _Lines(self._line)
        heard = looked = time.monotonic()
        rank0_count = None  # collectives that rank 0 came to before it left
        self._line.settimeout(self._tick)
        while not self._closing:
            with contextlib.suppress(OSError):
                self._beat()
            try:
                messages = lines.read()
            except OSError:
                messages = None
            now = time.monotonic()
            for message in messages or ():
                if message["kind"] == "bye":
                    rank0_count = message["count"]
                elif message["kind"] == "lost":
                    self._expect_failure(now)
                elif message["kind"] == "verdict":
                    self._told.set()
                    self._judge(message["text"], message["culprits"], stopped=message["stopped"])
            # A process that itself stood still cannot tell whether others did.
            heard = now if messages or now - looked > self.stall_timeout / 2 else heard
            looked = now
            if self._survive and messages is None and rank0_count is None:
                self._expect_failure(now)
            if now > self._cut_at and not self._closing:
                self._survive()
                self._cut_at = float("inf")
            if rank0_count is not None:
                if self._depth > 0 and self._count > rank0_count and now - self._since > _LEAVING_SECONDS:
                    self._end(f"{self._rank0} has left, {self._where()}")
            elif messages is None and not self._survive:
                self._end(f"{self._rank0} has ended without a word (killed?), {self._where()}")
            elif now - heard > self.stall_timeout and messages is not None:
                said = f"{self._rank0} has not answered for {self.stall_timeout:g} s, {self._where()}"
                self._judge(said, [0], stopped=True)
            if messages is None:
                time.sleep(self._tick)
        # The good-byes of others wake this thread in the very moment in which `close` says this rank's.
        self._said_bye.wait()
        self._line.close()

    def _beat(self) -> None:
        with self._lock:
            state = {"count": self._count, "inside": self._depth > 0, "what": self._what, "since": self._since}
            state["busy"] = self._busy[-1] if self._busy else ""
        self._send(kind="beat", seconds=time.monotonic() - state.pop("since"), **state)

    def _where(self) -> str:
        return f"{self._me} {'waits in' if self._depth else 'is past'} {self._what}"

    def _judge(self, text: str, culprits: list[int], *, stopped: bool) -> None:
        """Ends this process, and those that have stopped; or where the others survive, the culprits alone."""
        others = [self._processes[rank] for rank in culprits if rank != self.rank]
        if stopped or self._survive:
            for process in others:
                process.kill_from(self._me)
        if self._survive and self.rank not in culprits:
            tell_launcher({"stop": culprits})
            self._expect_failure(time.monotonic())
        else:
            self._end(text)

    def _expect_failure(self, now: float) -> None:
        """A rank is lost, of which the engine may know nothing for long: it is told so if it does not find out by itself."""
        self._cut_at = min(self._cut_at, now + _ENGINE_SECONDS)

    def _end(self, text: str) -> None:
        if not self._closing and not self._raising:
            log.error("rank %d ends: %s", self.rank, text)
            _flush()
            os._exit(EXIT_FOLLOWED)

    def _hook(self) -> None:
        """An exception that nobody catches ends all ranks, after its traceback was printed."""
        before = sys.excepthook

        def hook(kind, value, traceback):
            if self._closing or os.getpid() != self._me.pid:
                before(kind, value, traceback)
                return
            if issubclass(kind, _ENGINE_ERRORS) and not self._survive:
                # Most likely another rank has gone. Rank 0 finds out which, and ends this process meanwhile.
                with self.waiting(self._what):
                    time.sleep(2 * _LEAVING_SECONDS)
            self._raising = True
            before(kind, value, traceback)
            _flush()
            # A launcher reads the outputs of ranks in any order: the traceback is to come before what others say of it.
            time.sleep(_READING_SECONDS)
            with contextlib.suppress(OSError):
                self._send(kind="raised", text=f"{kind.__name__}: {value}".splitlines()[0].rstrip(": ")[:300])
                self._told.wait(_LEAVING_SECONDS)
            # Not by way of MPI_Finalize and the like, which would wait for the others.
            os._exit(1)

        sys.excepthook = hook
        atexit.register(self.close)


class _Process(NamedTuple):
    """Where a rank runs."""

    rank: int
    host: str
    machine: str
    pid: int

    def __str__(self):
        return f"rank {self.rank} (host {self.host}, process {self.pid})"

    def kill_from(self, other: _Process) -> None:
        """Ends the process if it is on the machine of `other`: one that was stopped does not hear that all is over."""
        if self.machine == other.machine:
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)


class _Server:
    """On rank 0: hears all ranks and judges."""

    def __init__(self, processes: list[_Process], stall_timeout: float, tick: float, survive: bool):
        self._timeout, self._tick, self._survive = stall_timeout, tick, survive
        self._ranks = [_Rank(process) for process in processes]
        self._token = secrets.token_hex(16)
        one_host = len({process.host for process in processes}) == 1
        self._listener = socket.create_server(("127.0.0.1" if one_host else "", 0), backlog=len(processes))
        addresses = ["127.0.0.1"] if one_host else _addresses()
        self.address = (addresses, self._listener.getsockname()[1], self._token)
        self.told_good_bye, self._certain = threading.Event(), False
        threading.Thread(target=self._serve, name="disttrain-watchdog-server", daemon=True).start()

    def _serve(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._listener, selectors.EVENT_READ, None)
        judged = time.monotonic()
        patient_until = 0.0
        while not all(rank.gone for rank in self._ranks):
            for key, _ in selector.select(self._tick):
                if key.data is None:
                    line, _ = self._listener.accept()
                    line.setblocking(False)
                    selector.register(line, selectors.EVENT_READ, _Lines(line))
                elif not self._hear(key.fileobj, key.data):
                    selector.unregister(key.fileobj)
            now = time.monotonic()
            if now - judged > self._timeout / 2:
                # This process itself stood still (with all others, perhaps): what it has heard is old.
                patient_until = now + self._timeout
            if self._certain or now - judged > self._tick:
                judged = now
                self._tell({"kind": "beat"})
                accident = None if self._survive else self._accident(now)
                verdict = accident or (now > patient_until and self._stall(now))
                if verdict:
                    text, culprits, stopped = verdict
                    self._tell({"kind": "verdict", "text": text, "culprits": culprits, "stopped": stopped})
                    if not self._survive:
                        return
                    patient_until = now + self._timeout
        self._listener.close()

    def _hear(self, line: socket.socket, lines: _Lines) -> bool:
        """Takes in what came over a line; False when it has ended."""
        try:
            messages = lines.read()
            for message in messages or []:
                self._take(line, message)
        except (OSError, ValueError, LookupError, TypeError):  # the last three: a stranger
            messages = None
        if messages is None:
            for rank in self._ranks:
                rank.gone = rank.gone or rank.line is line
                self._certain |= rank.gone and not rank.left
            if self._survive and self._certain:
                self._tell({"kind": "lost"})
        return messages is not None

    def _take(self, line: socket.socket, message: dict) -> None:
        rank = self._ranks[message["rank"]]
        if message["kind"] == "hello" and secrets.compare_digest(message["token"], self._token):
            rank.line = line
        if rank.line is line:
            rank.hear(message)
            self._certain |= rank.raised is not None
            if rank.left and rank.process.rank == 0:
                self._tell({"kind": "bye", "count": rank.count})
                self.told_good_bye.set()

    def _tell(self, message: dict) -> None:
        data = json.dumps(message).encode() + b"\n"
        # Rank 0 comes last: when it hears the verdict, this process ends.
        for rank in reversed(self._ranks):
            if rank.line:
                with contextlib.suppress(OSError):
                    rank.line.sendall(data)

    def _accident(self, now: float) -> tuple[str, list[int], bool] | None:
        """Who has raised, died, or left the others waiting; None if nobody has."""
        front = self._front()
        for rank in self._ranks:
            if rank.raised:
                return f"{rank.process} raised {rank.raised}", [], False
        for rank in self._ranks:
            if rank.gone and not rank.left:
                return f"{rank.process} has ended without a word (killed?); it was {rank.place()}", [], False
            if rank.left and front and front.count > rank.count and front.waited(now) > _LEAVING_SECONDS:
                return f"{rank.process} has left, and {front.process} waits for it in {front.what}", [], False
        return None

    def _stall(self, now: float) -> tuple[str, list[int], bool] | None:
        """Who has fallen behind, or has stopped and must be killed; None if nobody has."""
        front = self._front()
        for rank in self._ranks:
            if not (rank.left or rank.gone) and now - rank.heard > self._timeout:
                others = f"; {front.process} waits in {front.what}" if front and front is not rank else ""
                said = f"{rank.process} has not answered for {self._timeout:g} s; it was {rank.place()}{others}"
                return said, [rank.process.rank], True
        if front and front.waited(now) > self._timeout:
            behind = [r for r in self._ranks if r.count < front.count and not r.gone]
            # One that was busy has as long as ever from then on.
            if behind and now - max(r.busy_until for r in behind) > self._timeout:
                said = "; ".join(f"{r.process} has not come there, it was {r.place()}" for r in behind)
                waited = f"{front.process} has waited for {self._timeout:g} s in {front.what}: {said}"
                return waited, [r.process.rank for r in behind], False
        return None

    def _front(self) -> _Rank | None:
        """The rank that waits in the last collective that any has come to."""
        waiting = [r for r in self._ranks if r.inside and not r.left and not r.gone]
        return max(waiting, key=lambda r: r.count, default=None)


class _Rank:
    """What rank 0 knows of a rank."""

    def __init__(self, process: _Process):
        self.process = process
        self.line: socket.socket | None = None
        self.left = self.gone = self.inside = False
        self.raised: str | None = None
        self.count, self.what, self.busy = 0, "the start", ""
        self.heard = self.since = time.monotonic()
        self.busy_until = -math.inf

    def hear(self, message: dict) -> None:
        self.heard = time.monotonic()
        if message["kind"] == "bye":
            self.left = True
        elif message["kind"] == "raised":
            self.raised = message["text"]
        elif message["kind"] == "beat":
            self.count, self.inside, self.what = message["count"], message["inside"], message["what"]
            self.since = self.heard - message["seconds"]
            self.busy = message["busy"]
            self.busy_until = self.heard if self.busy else self.busy_until

    def waited(self, now: float) -> float:
        return now - self.since

    def place(self) -> str:
        if self.busy:
            return f"busy with {self.busy}"
        return f"in {self.what}" if self.inside else f"past {self.what}"


class _Lines:
    """Messages of a socket, one JSON object on a line."""

    def __init__(self, line: socket.socket):
        self._line, self._rest = line, b""

    def read(self) -> list[dict] | None:
        """What has come; None at the end of the line. Waits as long as the socket's timeout."""
        try:
            data = self._line.recv(1 << 16)
        except (TimeoutError, BlockingIOError):
            return []
        if not data:
            return None
        *whole, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(x) for x in whole]


def _machine() -> str:
    """The same for all processes that can signal each other by their ids: a boot, and a container in it.

    One with a network of its own counts as another machine: cut off from rank 0 it must not end that one.
    """
    try:
        spaces = os.readlink("/proc/self/ns/pid") + os.readlink("/proc/self/ns/net")
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + spaces
    except OSError:
        return secrets.token_hex(16)


def _connect(addresses: list[str], port: int) -> socket.socket:
    until = time.monotonic() + _CONNECT_SECONDS
    while time.monotonic() < until:
        for address in addresses:
            with contextlib.suppress(OSError):
                line = socket.create_connection((address, port), timeout=2)
                line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return line
        time.sleep(0.2)
    raise BackendError(
        f"rank 0 cannot be reached at {' or '.join(addresses)}, port {port}: a firewall between the hosts? "
        "Ranks must reach each other on any TCP port"
    )


def _addresses() -> list[str]:
    """IPv4 addresses of this host, other than loopback."""
    found = [interface.address for interface in interfaces()]
    return [address for address in found if not address.startswith("127.")] or ["127.0.0.1"]


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
