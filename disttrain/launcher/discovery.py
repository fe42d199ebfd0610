"""Hosts that come and go, as a script says that prints one on each line: "name" or "name:slots".

Horovod's elastic driver (`driver`) keeps the ranks that survive. With another launcher an elastic job is a chain of attempts, as
with PyTorch's: when a rank is lost, or when there is room for more, the ranks are started anew on the hosts that there are then,
and go on from their checkpoint, which may be that of another number of ranks.
"""

from __future__ import annotations

import subprocess
import threading
import time
from typing import NamedTuple

from disttrain.errors import BackendError, ConfigError
from disttrain.launcher.hosts import Host, parse_hosts

_SCRIPT_SECONDS = 20
_POLL_SECONDS = 2.0
# What has just come may go again, and what has gone is still listed for a while.
_SETTLE_SECONDS = 4.0


class Elastic(NamedTuple):
    """How many ranks a job may have, and where.

    Attributes:
      script: its path.
      slots: of a host that the script names without any.
      least, most: numbers of ranks.
    """

    script: str
    slots: int
    least: int
    most: int

    def discover(self) -> list[Host]:
        """The hosts that there are now, with as many slots as the job may use.

        Raises:
          ConfigError: the script cannot be run, fails, or prints something else.
        """
        try:
            done = subprocess.run(
                [self.script],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_SCRIPT_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigError(f"--host-discovery-script {self.script} cannot be run ({error})") from None
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no word"])[-1]
            raise ConfigError(f"--host-discovery-script {self.script} ended with {done.returncode} ({last})")
        names = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        known = (
            parse_hosts(",".join(name if ":" in name else f"{name}:{self.slots}" for name in names)) if names else []
        )
        return _at_most(known, self.most)

    def wait(self, seconds: float) -> list[Host]:
        """The hosts, when there are enough of them.

        Raises:
          BackendError: there are too few for so long.
        """
        until = time.monotonic() + seconds
        while (found := ranks_on(hosts := self.discover())) < self.least:
            if time.monotonic() > until:
                names = ", ".join(host.name for host in hosts) or "none"
                raise BackendError(
                    f"there is room for {found} ranks (hosts: {names}), and --min-np is {self.least}: waited for {seconds:g} s"
                )
            time.sleep(_POLL_SECONDS)
        return hosts


class Growth:
    """Watches, in a thread of its own, whether there is room for more ranks than now. A context manager."""

    def __init__(self, elastic: Elastic, ranks: int):
        self._elastic, self._ranks, self._over = elastic, ranks, threading.Event()
        self._more = False
        self._thread = threading.Thread(target=self._watch, name="disttrain-discovery", daemon=True)

    def __call__(self) -> bool:
        return self._more

    def __enter__(self) -> Growth:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        since = None
        while not self._over.wait(_POLL_SECONDS):
            try:
                more = ranks_on(self._elastic.discover()) > self._ranks
            except ConfigError:  # the next attempt will say it
                more = False
            since = (since or time.monotonic()) if more else None
            self._more = since is not None and time.monotonic() - since > _SETTLE_SECONDS


def ranks_on(hosts: list[Host]) -> int:
    """Slots of all hosts together."""
    return sum(host.slots for host in hosts)


def _at_most(hosts: list[Host], ranks: int) -> list[Host]:
    kept = []
    for host in hosts:
        slots = min(host.slots, ranks - ranks_on(kept))
        kept += [Host(host.name, slots)] if slots else []
    return kept
