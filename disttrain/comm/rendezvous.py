"""How workers that know one address alone, that of rank 0, find all others: torchrun's MASTER_ADDR and MASTER_PORT."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import time

from disttrain.errors import BackendError

_SECONDS = 120


def meet(rank: int, size: int) -> list[str]:
    """The addresses of all workers as host:port, in the order of ranks; each has taken a free port of its own.

    They meet at MASTER_PORT + 1 of MASTER_ADDR: at MASTER_PORT there is torchrun itself.

    Raises:
      BackendError: some have not come within two minutes.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ.get("MASTER_PORT") or 29500) + 1
    return _gather(port, host, size) if rank == 0 else _join(rank, host, port)


def _gather(port: int, host: str, size: int) -> list[str]:
    """Rank 0: hears everybody's address and tells all of them."""
    addresses, until = {0: f"{host}:{_free_port()}"}, time.monotonic() + _SECONDS
    with contextlib.ExitStack() as lines, socket.create_server(("", port), backlog=size) as server:
        waiting = []
        while len(addresses) < size:
            server.settimeout(max(0.01, until - time.monotonic()))
            try:
                line, (address, _) = server.accept()
            except TimeoutError:
                missing = ", ".join(str(rank) for rank in range(size) if rank not in addresses)
                raise BackendError(
                    f"rank {missing} of {size} has not come to {host}, port {port}, within {_SECONDS} s: is it running?"
                ) from None
            lines.enter_context(line).settimeout(2)
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # a stranger
                told = json.loads(line.makefile().readline())
                addresses[int(told["rank"])] = f"{address}:{int(told['port'])}"
                waiting.append(line)
        everybody = [addresses[rank] for rank in range(size)]
        for line in waiting:
            line.sendall(json.dumps(everybody).encode() + b"\n")
    return everybody


def _join(rank: int, host: str, port: int) -> list[str]:
    until = time.monotonic() + _SECONDS
    while time.monotonic() < until:
        with contextlib.suppress(OSError, ValueError), socket.create_connection((host, port), timeout=_SECONDS) as line:
            line.sendall(json.dumps({"rank": rank, "port": _free_port()}).encode() + b"\n")
            return json.loads(line.makefile().readline())
        time.sleep(0.1)
    raise BackendError(
        f"rank 0 cannot be reached at {host}, port {port} (MASTER_ADDR, MASTER_PORT + 1): is it running, and is there a firewall?"
    )


def _free_port() -> int:
    """Below the range from which the kernel takes ports for whoever connects, or it might give it away meanwhile."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port
