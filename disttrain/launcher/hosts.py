"""Which hosts there are and how many ranks each takes; how to run a command on one of them."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from disttrain.errors import ConfigError

# A name or an IPv4 address. It must not begin with a dash, which ssh and mpirun would take for an option.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

_LOOKUP_SECONDS = 3.0


class Host(NamedTuple):
    """A machine, and how many ranks may run on it."""

    name: str
    slots: int


def parse_hosts(text: str) -> list[Host]:
    """Reads `-H`: "h1:2,h2" is two slots on h1 and one on h2.

    A name that is there twice is one host with the slots of both, as mpirun counts: schedulers write a name once for
    each of its slots.

    Raises:
      ConfigError: there is no host, a name is not one, or a number of slots is not a whole number of 1 or more.
    """
    hosts = _merge(_host(entry.strip(), f"-H {text!r}") for entry in text.split(",") if entry.strip())
    if not hosts:
        raise ConfigError(f"-H {text!r} names no host: write -H host1:2,host2:2")
    return hosts


def read_hostfile(path: str | os.PathLike[str]) -> list[Host]:
    """Reads a file with a host on each line, as "name slots=N" (Open MPI, MPI Operator), "name:N" or "name" alone, which is
    one slot. What follows a # is a comment. A name that is there twice: see `parse_hosts`.

    Raises:
      ConfigError: the file cannot be read or names no host, or a line is not as above.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"hostfile {path} cannot be read ({said}): name a file with a host on each line") from None
    entries = [(number, line.partition("#")[0].strip()) for number, line in enumerate(lines, 1)]
    hosts = _merge(_host(entry, f"hostfile {path}, line {number}") for number, entry in entries if entry)
    if not hosts:
        raise ConfigError(f"hostfile {path} names no host: write a line 'name slots=N' for each")
    return hosts


def is_local(name: str) -> bool:
    """Whether this name is this machine's. A name that cannot be looked up within some seconds is not."""
    if name in ("localhost", socket.gethostname()):
        return True
    try:
        # In a process of its own, since Python cannot limit how long a resolver takes.
        said = subprocess.run(
            ["getent", "ahostsv4", name], capture_output=True, text=True, check=True, timeout=_LOOKUP_SECONDS
        ).stdout
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((said.split()[0], 0))  # which the kernel allows for addresses of this machine alone
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def ssh_agent() -> list[str]:
    """The ssh command without a host: $DISTTRAIN_SSH, or $PRTE_MCA_plm_ssh_agent, which is Open MPI's, or plain ssh.

    It never asks for a password, and gives up on a host that does not answer."""
    named = os.environ.get("DISTTRAIN_SSH") or os.environ.get("PRTE_MCA_plm_ssh_agent") or "ssh"
    return [*shlex.split(named), "-o", "BatchMode=yes", "-o", "ConnectTimeout=5"]


def ssh_command(host: str, *command: str) -> list[str]:
    """The command line that runs `command` on `host`, its words as they are here."""
    return [*ssh_agent(), host, shlex.join(command)]


def _host(entry: str, where: str) -> Host:
    match = re.fullmatch(r"(\S+?)(?:\s+slots\s*=\s*(\S+)|:(\S+))?", entry)
    name, slots = (match[1], match[2] or match[3] or "1") if match else (entry, "1")
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: {entry!r} is not a host: write 'name', 'name:N' or, in a file, 'name slots=N'")
    if not (slots.isascii() and slots.isdigit()) or int(slots) < 1:
        raise ConfigError(f"{where}: {slots!r} slots on {name}: a whole number of 1 or more is wanted")
    return Host(name, int(slots))


def _merge(hosts: Iterable[Host]) -> list[Host]:
    slots: dict[str, int] = {}
    for name, number in hosts:
        slots[name] = slots.get(name, 0) + number
    return [Host(*item) for item in slots.items()]
