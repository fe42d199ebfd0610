"""Network interfaces of this machine, and which of them leads to another one."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import struct
from typing import NamedTuple

from disttrain.errors import ConfigError

_SIOCGIFADDR, _SIOCGIFNETMASK = 0x8915, 0x891B


class Interface(NamedTuple):
    """An interface with an IPv4 address."""

    name: str
    address: str
    network: ipaddress.IPv4Network


def interfaces() -> list[Interface]:
    """Those that have an IPv4 address, loopback among them."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                address, mask = (_ask(probe, name, request) for request in (_SIOCGIFADDR, _SIOCGIFNETMASK))
                network = ipaddress.IPv4Network(f"{address}/{mask}", strict=False)
                found.append(Interface(name, address, network))
    return found


def towards(host: str, name: str | None = None) -> Interface | None:
    """The interface called `name`, or the one from which this machine reaches `host`; None where that is not known.

    Raises:
      ConfigError: there is no interface of that name.
    """
    known = interfaces()
    if name:
        for interface in known:
            if interface.name == name:
                return interface
        raise ConfigError(
            f"there is no network interface {name!r} with an IPv4 address here: {', '.join(x.name for x in known)}"
        )
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # For UDP this sends nothing: the kernel only looks up the route.
        probe.connect((host, 9))
        address = probe.getsockname()[0]
        return next((interface for interface in known if interface.address == address), None)
    return None


def _ask(probe: socket.socket, name: str, request: int) -> str:
    answer = fcntl.ioctl(probe.fileno(), request, struct.pack("256s", name.encode()[:15]))
    return socket.inet_ntoa(answer[20:24])
