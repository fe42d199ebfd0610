"""Nobody waits for ever: every rank keeps a line to rank 0, apart from the engine's own traffic.

A collective cannot tell a slow rank from a dead one, and a process that hangs in it cannot raise. So each rank says every
second over a TCP line of its own which collective it has come to; rank 0 compares, and when a rank has raised, died,
left, stopped or fallen behind, it tells all the others, who say so in one line and end.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import logging
import os
import secrets
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from disttrain.errors import BackendError

log = logging.getLogger("disttrain")

# Exit code of a rank that ends because of another one.
EXIT_CODE = 1
_CONNECT_SECONDS = 20
# A rank may leave while others are still on their way out of the last collective.
_LEAVING_SECONDS = 3


class Watchdog:
    """The line of one rank, and on rank 0 the place where all lines end.

    Args:
      rank, size: of this process in the group; one line for each process.
      exchange: gathers one object from every rank, in the order of ranks.
      stall_timeout: seconds after which a rank that does not answer, or that others wait for, ends the job.
    """

    def __init__(self, rank: int, size: int, exchange: Callable[[Any], list], stall_timeout: float):
        self.rank, self.stall_timeout = rank, stall_timeout
        self._count, self._depth, self._what, self._since = 0, 0, "the start", time.monotonic()
        self._lock, self._closing, self._rank0_left = threading.Lock(), False, False
        self._tick = min(1.0, stall_timeout / 4)
        host = socket.gethostname()
        one_host = len(set(exchange(host))) == 1
        server = _Server(size, stall_timeout, self._tick, one_host) if rank == 0 else None
        addresses, port, token = exchange(server and server.address)[0]
        self._line = _connect(addresses, port)
        self._send(kind="hello", token=token, name=f"rank {rank} (host {host}, process {os.getpid()})")
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

    def close(self) -> None:
        """Says good-bye; from now on this rank may end without taking the others with it."""
        if not self._closing:
            self._closing = True
            with contextlib.suppress(OSError):
                self._send(kind="bye")

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
        lines, heard = _Lines(self._line), time.monotonic()
        self._line.settimeout(self._tick)
        while not self._closing:
            try:
                self._beat()
                messages = lines.read()
            except OSError:
                messages = None
            now = time.monotonic()
            if messages is None:
                if not self._rank0_left and not self._closing:
                    self._end("rank 0 has ended without a word (killed?)")
                self._await_nobody(now)
                time.sleep(self._tick)
                continue
            heard = now if messages else heard
            for message in messages:
                if message["kind"] == "bye":
                    self._rank0_left = True
                elif message["kind"] == "verdict":
                    self._end(message["text"])
            if now - heard > self.stall_timeout:
                self._end(f"rank 0 has not answered for {self.stall_timeout:g} s, {self._where()}")

    def _beat(self) -> None:
        with self._lock:
            state = {"count": self._count, "inside": self._depth > 0, "what": self._what, "since": self._since}
        self._send(kind="beat", seconds=time.monotonic() - state.pop("since"), **state)

    def _await_nobody(self, now: float) -> None:
        if self._depth > 0 and now - self._since > _LEAVING_SECONDS:
            self._end(f"rank 0 has left, {self._where()}")

    def _where(self) -> str:
        return f"rank {self.rank} waits in {self._what}" if self._depth else f"rank {self.rank} is past {self._what}"

    def _end(self, text: str) -> None:
        if not self._closing:
            log.error("rank %d ends: %s", self.rank, text)
            _flush()
            os._exit(EXIT_CODE)

    def _hook(self) -> None:
        """An exception that nobody catches ends all ranks, after its traceback was printed."""
        before = sys.excepthook

        def hook(kind, value, traceback):
            before(kind, value, traceback)
            _flush()
            with contextlib.suppress(OSError):
                self._send(kind="raised", text=f"{kind.__name__}: {value}".splitlines()[0][:300])
            # Not by way of MPI_Finalize and the like, which would wait for the others.
            time.sleep(self._tick)
            os._exit(EXIT_CODE)

        sys.excepthook = hook
        atexit.register(self.close)


class _Server:
    """On rank 0: hears all ranks and judges."""

    def __init__(self, size: int, stall_timeout: float, tick: float, one_host: bool):
        self._size, self._timeout, self._tick = size, stall_timeout, tick
        self._token = secrets.token_hex(16)
        self._listener = socket.create_server(("127.0.0.1" if one_host else "", 0), backlog=size)
        addresses = ["127.0.0.1"] if one_host else _addresses()
        self.address = (addresses, self._listener.getsockname()[1], self._token)
        self._ranks: dict[int, _Rank] = {}
        threading.Thread(target=self._serve, name="disttrain-watchdog-server", daemon=True).start()

    def _serve(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._listener, selectors.EVENT_READ, None)
        judged = 0.0
        while True:
            for key, _ in selector.select(self._tick):
                if key.data is None:
                    line, _ = self._listener.accept()
                    line.setblocking(False)
                    selector.register(line, selectors.EVENT_READ, _Lines(line))
                elif not self._hear(key.fileobj, key.data):
                    selector.unregister(key.fileobj)
            if time.monotonic() - judged > self._tick:
                judged = time.monotonic()
                self._tell({"kind": "beat"})
                text = self._verdict(judged)
                if text:
                    self._tell({"kind": "verdict", "text": text})
                    return

    def _hear(self, line: socket.socket, lines: _Lines) -> bool:
        """Takes in what came over a line; False when it has ended."""
        try:
            messages = lines.read()
        except OSError:
            messages = None
        if messages is None:
            for rank in self._ranks.values():
                rank.gone = rank.gone or rank.line is line
            return False
        for message in messages:
            if message["kind"] == "hello" and secrets.compare_digest(message["token"], self._token):
                self._ranks[message["rank"]] = _Rank(message["name"], line)
            known = self._ranks.get(message["rank"])
            if known and known.line is line:
                known.hear(message)
        if any(m["kind"] == "bye" and m["rank"] == 0 for m in messages):
            self._tell({"kind": "bye"})
        return True

    def _tell(self, message: dict) -> None:
        data = json.dumps(message).encode() + b"\n"
        for rank in self._ranks.values():
            with contextlib.suppress(OSError):
                rank.line.sendall(data)

    def _verdict(self, now: float) -> str | None:
        """What is wrong, in the order of certainty; None if nothing is."""
        ranks = [self._ranks[r] for r in sorted(self._ranks)]
        waiting = [r for r in ranks if r.inside and not r.left and not r.gone]
        front = max(waiting, key=lambda r: r.count, default=None)
        for rank in ranks:
            if rank.raised:
                return f"{rank.name} raised {rank.raised}"
            if rank.gone and not rank.left:
                return f"{rank.name} has ended without a word (killed?); it was {rank.place()}"
            if rank.left and front and front.count > rank.count and front.waited(now) > _LEAVING_SECONDS:
                return f"{rank.name} has left, and {front.name} waits for it in {front.what}"
        for rank in ranks:
            if not rank.left and now - rank.heard > self._timeout:
                others = f"; {front.name} waits in {front.what}" if front else ""
                return f"{rank.name} has not answered for {self._timeout:g} s; it was {rank.place()}{others}"
        if front and front.waited(now) > self._timeout:
            behind = [r for r in ranks if r.count < front.count]
            if behind:
                said = "; ".join(f"{r.name} has not come there, it was {r.place()}" for r in behind)
                return f"{front.name} has waited for {self._timeout:g} s in {front.what}: {said}"
        return None


class _Rank:
    """What rank 0 knows of a rank."""

    def __init__(self, name: str, line: socket.socket):
        self.name, self.line = name, line
        self.left = self.gone = self.inside = False
        self.raised: str | None = None
        self.count, self.what = 0, "the start"
        self.heard = self.since = time.monotonic()

    def hear(self, message: dict) -> None:
        self.heard = time.monotonic()
        if message["kind"] == "bye":
            self.left = True
        elif message["kind"] == "raised":
            self.raised = message["text"]
        elif message["kind"] == "beat":
            self.count, self.inside, self.what = message["count"], message["inside"], message["what"]
            self.since = self.heard - message["seconds"]

    def waited(self, now: float) -> float:
        return now - self.since

    def place(self) -> str:
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
    """IPv4 addresses of this host's interfaces, other than loopback."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                SIOCGIFADDR = 0x8915
                request = struct.pack("256s", name.encode()[:15])
                found.append(socket.inet_ntoa(fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24]))
    return [a for a in found if not a.startswith("127.")] or ["127.0.0.1"]


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
