"""Connections of a library that waits in them, and that has no way to be told that it waits in vain."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path


class Connections:
    """Sockets of this process that were opened within `opened`, to be cut from another thread."""

    def __init__(self):
        self._inodes: dict[int, int] = {}

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """What is opened within it is what `cut` cuts."""
        before = _sockets()
        yield
        self._inodes = dict(_sockets().items() - before.items())

    def cut(self) -> None:
        """Whoever waits in one of them is told that the other end has closed it."""
        for number, inode in self._inodes.items():
            with contextlib.suppress(OSError):
                copy = socket.socket(fileno=os.dup(number))
                # The library may have closed it by itself, and its number may be another's by now.
                if os.fstat(copy.fileno()).st_ino == inode:
                    copy.shutdown(socket.SHUT_RDWR)
                copy.close()


def _sockets() -> dict[int, int]:
    """Inodes of the sockets of this process, by file descriptor."""
    found = {}
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            status = os.stat(int(path.name))
            if stat.S_ISSOCK(status.st_mode):
                found[int(path.name)] = status.st_ino
    return found
