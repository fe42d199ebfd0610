"""The line between the launcher and what it has started beside each rank: JSON objects over TCP, one on a line."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import Any

from disttrain.errors import BackendError

# Each end says at least so often that it is there; without a word for the longer time it is taken for lost.
BEAT_SECONDS = 1.0
LOST_SECONDS = 10.0
_CONNECT_SECONDS = 30
_CHUNK = 1 << 16


class Line:
    """One end. Sending waits until the other end takes it; reading takes what is there.

    Attributes:
      heard: time.monotonic() of the last message.
    """

    def __init__(self, connection: socket.socket):
        self._connection, self._rest = connection, b""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(LOST_SECONDS)
        self.heard = self._said = time.monotonic()

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, kind: str, **message: Any) -> None:
        """Raises OSError where the other end is gone or takes nothing."""
        self._said = time.monotonic()
        self._connection.sendall(json.dumps({"kind": kind, **message}).encode() + b"\n")

    def beat(self) -> None:
        """Says that this end is there, where it has said nothing for a while. Raises what `send` raises."""
        if time.monotonic() - self._said >= BEAT_SECONDS:
            self.send("beat")

    def read(self) -> list[dict[str, Any]] | None:
        """Messages that have come, beats left out; None where the other end has closed. To be called when there is something.

        Raises:
          OSError: the line is broken.
          ValueError: what came is not a message.
        """
        data = self._connection.recv(_CHUNK)
        if not data:
            return None
        self.heard = time.monotonic()
        *whole, self._rest = (self._rest + data).split(b"\n")
        return [message for message in map(json.loads, whole) if message["kind"] != "beat"]

    def silent(self, seconds: float = LOST_SECONDS) -> bool:
        """Whether nothing has come for so long that the other end must be taken for lost."""
        return time.monotonic() - self.heard > seconds

    def close(self) -> None:
        self._connection.close()


def connect(addresses: list[str], port: int) -> Line:
    """A line to the first of the addresses that answers.

    Raises:
      BackendError: none does.
    """
    until = time.monotonic() + _CONNECT_SECONDS
    while time.monotonic() < until:
        for address in addresses:
            with contextlib.suppress(OSError):
                return Line(socket.create_connection((address, port), timeout=2))
        time.sleep(0.2)
    raise BackendError(
        f"{socket.gethostname()} cannot reach the launcher at {' or '.join(addresses)}, port {port}: a firewall between the "
        "hosts? Ranks must reach the host that started them on any TCP port"
    )
