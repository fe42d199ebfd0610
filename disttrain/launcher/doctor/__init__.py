"""What is here, what is wrong with it, and the mend: `disttrain doctor`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from disttrain.launcher.doctor import machine, mpi, network, software
from disttrain.launcher.doctor.command import facts
from disttrain.launcher.doctor.finding import ALL, PROCESSES, Finding, can_run, run_probes
from disttrain.launcher.hosts import Host

__all__ = ["ALL", "Finding", "can_run", "choose_backend", "examine"]

_IMPORT_SECONDS = 60.0  # TensorFlow takes four from a warm disk, and many times that from a cold or distant one


def examine(hosts: list[Host], show: Callable[[str], None] = lambda line: None) -> list[Finding]:
    """Looks at this machine and at the hosts, and measures what is between them. `show` gets told what it is at.

    Nothing that is wrong raises; it becomes a `Finding`."""
    with ThreadPoolExecutor() as pool, network.agents_on(hosts) as (agents, ssh):
        ranks = sum(host.slots for host in hosts if host.name in agents and agents[host.name].local) or 1
        show("importing TensorFlow, Horovod and mpi4py")
        names = ("tensorflow_facts", "horovod_facts", "mpi_facts")
        tensorflow, horovod, mpi4py = (pool.submit(facts, name, _IMPORT_SECONDS) for name in names)
        mpirun = pool.submit(mpi.mpirun_version)
        found = run_probes(
            {
                "Python": software.python,
                "TensorFlow": partial(software.tensorflow, tensorflow),
                "Horovod": partial(software.horovod, horovod),
                "mpi4py": partial(mpi.library, mpi4py, mpirun, horovod),
                "launchers": partial(mpi.launchers, mpirun, bool(hosts)),
                "cores": partial(machine.cores, ranks),
                "memory": partial(machine.memory, ranks),
                "shared memory": machine.shared_memory,
                "open files": machine.descriptors,
                "ssh": lambda: ssh,
            }
        )
        if hosts:
            show("looking at the hosts")
            # One after the other: an agent answers one request at a time.
            found += run_probes({"versions": partial(network.versions, agents)}, PROCESSES)
            found += run_probes({"clocks": partial(network.clocks, agents)}, PROCESSES)
        found += run_probes({"routes": partial(network.routes, agents)}, PROCESSES if hosts else ())
        show("timing the network and an all-reduce")
        return found + run_probes({"all-reduce": partial(_measure, hosts, agents)}, PROCESSES if hosts else ())


def choose_backend(backend: str, hosts: list[Host]) -> str:
    """What "auto" means here, as `disttrain.init` would choose it for the ranks on these hosts."""
    if backend != "auto":
        return backend
    if sum(host.slots for host in hosts) > 1:
        return "horovod" if importlib.util.find_spec("horovod") else "mpi"
    return "multiworker" if os.environ.get("TF_CONFIG") else "local"


def _measure(hosts: list[Host], agents: network.Agents) -> list[Finding]:
    # A host that cannot be reached would keep mpirun waiting; its own row says so.
    reached = [host for host in hosts if host.name in agents]
    if hosts and not reached:
        return [Finding("all-reduce", "absent", "not measured: no host can be reached")]
    rate, rows = network.link(agents)
    if any(row.status == "bad" for row in rows):
        return [*rows, Finding("all-reduce", "absent", "not measured: ranks would wait for each other in vain")]
    return rows + network.all_reduce(reached, rate)
