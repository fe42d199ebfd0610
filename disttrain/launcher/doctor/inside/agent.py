"""What the doctor leaves on each host while it looks: it answers requests, a line each, until its stdin is closed."""

import importlib.metadata
import json
import platform
import queue
import socket
import struct
import sys
import threading
import time
from fcntl import ioctl

_SIOCGIFADDR = 0x8915
_LIMIT = 5.0  # seconds in which a connection between two hosts has to be there
_received = queue.Queue()


def clock():
    """Seconds since the epoch."""
    return time.time()


def versions(packages):
    """Of Python and of the packages; None for one that is not installed."""
    found = {"Python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def interfaces():
    """Name -> IPv4 address of the interfaces that have one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                request = ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has none
                continue
            found[name] = socket.inet_ntoa(request[20:24])
    return found


def routes(names):
    """For each host its address, or why it has none here, and by which interface packets to it leave."""
    by_address = {address: name for name, address in interfaces().items()}
    found = {}
    for name in names:
        try:
            address = socket.gethostbyname(name)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((address, 9))  # sends nothing
                source = probe.getsockname()[0]
        except OSError as error:
            found[name] = {"error": error.strerror or str(error)}
            continue
        found[name] = {"address": address, "source": source, "interface": by_address.get(source)}
    return found


def listen():
    """Opens a port that swallows one stream, and returns its number."""
    server = socket.create_server(("", 0))
    server.settimeout(_LIMIT)
    threading.Thread(target=_swallow, args=(server,), daemon=True).start()
    return server.getsockname()[1]


def _swallow(server):
    with server, server.accept()[0] as stream:
        stream.settimeout(_LIMIT)
        stream.recv(1 << 20)
        begun = last = time.perf_counter()
        count = 0
        while part := stream.recv(1 << 20):
            count, last = count + len(part), time.perf_counter()
        _received.put(count / (last - begun))


def send(name, port, seconds):
    """Sends zeros for so long."""
    data, until = bytes(1 << 16), time.perf_counter() + seconds
    with socket.create_connection((name, port), timeout=_LIMIT) as stream:
        while time.perf_counter() < until:
            stream.sendall(data)


def received():
    """Bytes a second of the stream that came in."""
    return _received.get(timeout=_LIMIT)


def main():
    """Answers until there are no more requests."""
    does = {f.__name__: f for f in (clock, versions, interfaces, routes, listen, send, received)}
    for request in sys.stdin:
        call, name, *arguments = json.loads(request)
        try:
            answer = {"call": call, "answer": does[name](*arguments)}
        except Exception as error:
            answer = {
                "call": call,
                "error": f"{name}: {getattr(error, 'strerror', None) or str(error) or type(error).__name__}",
            }
        sys.stdout.write(f"doctor {json.dumps(answer)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
