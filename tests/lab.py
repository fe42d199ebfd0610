"""Several hosts on one machine: network namespaces with addresses, host names, an sshd and links of their own.

Needs root, openssh-server and iproute2. `why_not()` says what is missing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from launch import Started

_SSH_PORT = 2222


def why_not() -> str | None:
    """Why there can be no lab here; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "tc", "nsenter", "unshare", "sshd", "ssh", "ssh-keygen") if not _which(name)]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: apt-get install iproute2 openssh-server)"
    probe = f"dtprobe{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False).returncode:
        return "network namespaces cannot be made here"
    _do("ip", "netns", "del", probe)
    return None


class Lab:
    """Hosts h1, h2, ... on one switch, which reach each other by ssh. A context manager."""

    def __init__(self, hosts: int):
        self.names = [f"h{i + 1}" for i in range(hosts)]
        self._prefix = f"dt{os.getpid()}"
        self._folder = Path(tempfile.mkdtemp(prefix="disttrain-lab-"))
        self._sshd: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Lab:
        try:
            self._write_files()
            self._do("ip", "netns", "add", self._space("sw"))
            self._do("ip", "-n", self._space("sw"), "link", "add", "br0", "type", "bridge")
            self._do("ip", "-n", self._space("sw"), "link", "set", "br0", "up")
            for i, name in enumerate(self.names, 1):
                self._up(name, f"10.77.0.{i}")
            self._wait_for_sshd()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for name in self.names:
            # sshd's sessions, too: behind a link that was cut one does not know that the other end has gone.
            for pid in self._all(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for sshd in self._sshd.values():
            sshd.kill()
            sshd.wait()
        for name in (*self.names, "sw"):
            if Path("/run/netns", self._space(name)).exists():
                self._do("ip", "netns", "del", self._space(name))
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def ssh(self) -> str:
        """The ssh command by which the hosts reach each other, for $DISTTRAIN_SSH."""
        return f"ssh -F {self._folder}/ssh_config"

    def start(self, name: str, *command: str, environment: dict[str, str] | None = None) -> Started:
        """Starts a command on a host, in a session of its own; stdout and stderr are one pipe."""
        return Started(
            self.on(name, *command),
            env=os.environ | {"DISTTRAIN_SSH": self.ssh} | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def on(self, name: str, *command: str) -> list[str]:
        """The command line that runs a command on a host, without ssh."""
        return ["nsenter", "-t", str(self._sshd[name].pid), "-n", "-u", "-m", f"--wdns={Path.cwd()}", *command]

    def shape(self, rate: str, burst: str = "32kb") -> None:
        """Gives every link a rate, in both directions, as tc writes it: "100mbit"."""
        for name in self.names:
            for space, device in ((name, "eth0"), ("sw", f"p{name}")):
                options = ["rate", rate, "burst", burst, "latency", "100ms"]
                self._do("tc", "-n", self._space(space), "qdisc", "replace", "dev", device, "root", "tbf", *options)

    def unshape(self) -> None:
        """Gives the links back their own speed."""
        for name in self.names:
            for space, device in ((name, "eth0"), ("sw", f"p{name}")):
                self._do("tc", "-n", self._space(space), "qdisc", "del", "dev", device, "root")

    def cut(self, name: str) -> None:
        """Takes the host's link down."""
        self._do("ip", "-n", self._space("sw"), "link", "set", f"p{name}", "down")

    def mend(self, name: str) -> None:
        self._do("ip", "-n", self._space("sw"), "link", "set", f"p{name}", "up")

    def processes(self, name: str, word: str = "") -> dict[int, str]:
        """Processes of a host, by id, but for its sshd: those whose command line has `word` in it."""
        return {pid: line for pid, line in self._all(name).items() if "sshd" not in line and word in line}

    def _all(self, name: str) -> dict[int, str]:
        space = Path("/run/netns", self._space(name))
        if not space.exists():
            return {}
        inode, found = space.stat().st_ino, {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (folder / "ns/net").stat().st_ino == inode and (folder / "stat").read_text().split(") ")[1][
                    0
                ] != "Z":
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def wait_until_empty(self, seconds: float) -> dict[str, dict[int, str]]:
        """What is left on the hosts after at most so many seconds; empty if nothing is."""
        until = time.monotonic() + seconds
        while True:
            left = {name: found for name in self.names if (found := self.processes(name))}
            if not left or time.monotonic() > until:
                return left
            time.sleep(0.2)

    # Setting up --------------------------------------------------------------------------------------------------------

    def _write_files(self) -> None:
        for key in ("id", "hostkey"):
            self._do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self._folder / key))
        shutil.copy(self._folder / "id.pub", self._folder / "authorized_keys")
        hosts = [f"10.77.0.{i} {name}" for i, name in enumerate(self.names, 1)]
        (self._folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts]) + "\n")
        (self._folder / "ssh_config").write_text(
            f"Host *\n  Port {_SSH_PORT}\n  User root\n  IdentityFile {self._folder}/id\n  IdentitiesOnly yes\n"
            "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
        )
        (self._folder / "sshd_config").write_text(
            f"Port {_SSH_PORT}\nHostKey {self._folder}/hostkey\nPidFile none\n"
            f"AuthorizedKeysFile {self._folder}/authorized_keys\nPermitRootLogin prohibit-password\n"
            "StrictModes no\nUsePAM no\nUseDNS no\nMaxStartups 100\nMaxSessions 100\n"
        )
        Path("/run/sshd").mkdir(exist_ok=True)

    def _up(self, name: str, address: str) -> None:
        here, switch, port = self._space(name), self._space("sw"), f"p{name}"
        self._do("ip", "netns", "add", here)
        self._do("ip", "-n", here, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", switch)
        self._do("ip", "-n", here, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            self._do("ip", "-n", here, "link", "set", device, "up")
        self._do("ip", "-n", switch, "link", "set", port, "master", "br0", "up")
        sshd = f"exec {_which('sshd')} -D -f {self._folder}/sshd_config -E {self._folder}/{name}.log"
        setup = f"hostname {name}; mount --bind {self._folder}/hosts /etc/hosts; {sshd}"
        # Not by `ip netns exec`, which hides what else is mounted.
        words = ["nsenter", f"--net=/run/netns/{here}", "unshare", "--uts", "--mount", "sh", "-c", setup]
        self._sshd[name] = subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)

    def _wait_for_sshd(self) -> None:
        for name in self.names:
            for _ in range(100):
                log = self._folder / f"{name}.log"
                if log.exists() and "listening" in log.read_text():
                    break
                assert self._sshd[name].poll() is None, f"sshd of {name} has ended"
                time.sleep(0.05)
            else:
                raise AssertionError(f"sshd of {name} does not listen: {log.read_text() if log.exists() else ''}")

    def _space(self, name: str) -> str:
        return f"{self._prefix}{name}"

    def _do(self, *command: str) -> None:
        _do(*command)


def _do(*command: str) -> None:
    done = subprocess.run([_which(command[0]), *command[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def _which(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
