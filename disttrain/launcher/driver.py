"""horovodrun for elastic jobs, with its options: `python -m disttrain.launcher.driver`.

When a rank fails, Horovod's driver takes its whole host away, ends the other ranks there, and where it was the last host ends
the job. Here the others stay where they are, and the rank is started again in its slot. A host of which no rank is left is
still taken away for a while, and so is one on which the same slot fails again and again.
"""

from __future__ import annotations

import time
from collections import defaultdict

from horovod.runner import gloo_run, launch
from horovod.runner.elastic import driver, registration, worker

# A slot is filled again so often in so many seconds: others wait for its rank each time, which may fail at once.
_TIMES, _SECONDS = 3, 600.0


class Registry(registration.WorkerStateRegistry):
    """Knows which ranks of a round have failed, and which have come to the next one."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._failed: dict[tuple[str, int], list[float]] = defaultdict(list)
        self.again: set[tuple[str, int]] = set()  # slots, by host and number, that have to be filled again

    def _on_workers_recorded(self):
        now, failed = time.monotonic(), self.get(registration.FAILURE)
        for slot in failed:
            self._failed[slot] = [then for then in self._failed[slot] if now - then < _SECONDS] + [now]
        # A rank that was ready to meet and failed then counts as both.
        kept = {host for host, _ in self.get(registration.READY) - failed}
        self.again = {slot for slot in failed if slot[0] in kept and len(self._failed[slot]) <= _TIMES}
        failed -= self.again  # or their hosts would be taken away
        super()._on_workers_recorded()


class Driver(driver.ElasticDriver):
    """Starts ranks in the slots that are new, and in those that a failed rank has left empty."""

    def register_worker_server(self, host, slot, addresses, secret_key):
        super().register_worker_server(host, slot, addresses, secret_key)
        # Changes of hosts are told to rank 0 once. If that one was being started, it has not heard of them.
        with self._wait_hosts_cond:
            self._notify_workers_host_changes(self._host_manager.current_hosts, worker.HostUpdateResult.added)

    def _update_host_assignments(self, current_hosts):
        pending = super()._update_host_assignments(current_hosts)
        again, self._worker_registry.again = self._worker_registry.again, set()
        slots = [slot for host in self._host_assignments.values() for slot in host]
        return pending + [s for s in slots if (s.hostname, s.local_rank) in again and s not in pending]


def main() -> None:
    """Runs horovodrun."""
    driver.WorkerStateRegistry, gloo_run.ElasticDriver = Registry, Driver
    launch.run_commandline()


if __name__ == "__main__":
    main()
