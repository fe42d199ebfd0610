"""The hosts of `-H` and what is between them."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from disttrain.launcher.doctor.agent import Agent
from disttrain.launcher.doctor.command import ProbeError, answer, script
from disttrain.launcher.doctor.finding import PROCESSES, Finding
from disttrain.launcher.doctor.inside import agent as here
from disttrain.launcher.doctor.mpi import program, root_variables
from disttrain.launcher.hosts import Host, is_local, ssh_agent

_PACKAGES = ("disttrain", "tensorflow", "keras", "horovod", "mpi4py", "openmpi")
_SKEW = 1.0  # seconds; logs are hard to read beyond, and certificates and file times go wrong
_STREAM_SECONDS = 0.5
_ALLREDUCE_SECONDS = 30.0
_LARGEST, _SMALLEST = 64 * 2**20, 2**20  # bytes of the all-reduce
_RING_SECONDS = 0.5  # what it should take on the link
_FAR_FROM_BOUND = 1.5
# Open MPI's own choice is up to three times as slow, and ranks that outnumber cores stand in each other's way.
_RING = ("--mca", "coll_tuned_use_dynamic_rules", "1", "--mca", "coll_tuned_allreduce_algorithm", "4")
_YIELD = ("--mca", "mpi_yield_when_idle", "1")

Agents = dict[str, Agent]


@contextlib.contextmanager
def agents_on(hosts: list[Host]) -> Iterator[tuple[Agents, list[Finding]]]:
    """Agents on all hosts that can be reached, by name, and the rows about ssh."""
    agents, rows = {}, []
    local = dict(_each([host.name for host in hosts], is_local))
    ssh = ssh_agent()[0]
    if not all(local.values()) and not program(ssh):
        rows.append(Finding("ssh", "absent", f"{ssh} is not here", "apt-get install openssh-client", PROCESSES))
        local = {host: True for host, here in local.items() if here}
    for host, agent in _each(list(local), lambda host: Agent(host, local[host])):
        if isinstance(agent, ProbeError):
            rows.append(Finding("ssh", "bad", f"{host}: {agent}", agent.mend, PROCESSES))
        else:
            agents[host] = agent
    reached = [name for name, agent in agents.items() if not agent.local]
    if reached:
        rows.insert(0, Finding("ssh", "ok", f"{', '.join(reached)}: no password asked", "", PROCESSES))
    try:
        yield agents, rows
    finally:
        for agent in agents.values():
            agent.close()


def versions(agents: Agents) -> list[Finding]:
    """Python and packages on each host against those here."""
    if not agents:
        return []
    found, mine, rows = _all(agents, "versions", _PACKAGES), here.versions(_PACKAGES), []
    for host, theirs in found.items():
        for name, version in theirs.items():
            if version != mine[name]:
                said = f"{name} is {version or 'absent'} on {host}, {mine[name] or 'absent'} here"
                needed = {"horovod": ("horovod",), "mpi4py": ("mpi",)}.get(name, PROCESSES)
                rows.append(Finding("versions", "bad", said, _same(name, mine[name], host), needed))
    same = ", ".join(f"{name} {version}" for name, version in mine.items() if version)
    return rows or [Finding("versions", "ok", f"the same on {', '.join(found)}: {same}", "", PROCESSES)]


def clocks(agents: Agents) -> list[Finding]:
    """How far the hosts' clocks are from this one's."""
    rows, said = [], []
    for host, measured in _each(
        [name for name, agent in agents.items() if not agent.local], lambda name: agents[name].skew()
    ):
        if isinstance(measured, ProbeError):
            rows.append(Finding("clocks", "bad", str(measured), measured.mend))
            continue
        skew, off = measured
        text = f"{host} {skew * 1000:+.1f} ms (±{off * 1000:.1f})"
        if abs(skew) - off > _SKEW:
            rows.append(Finding("clocks", "warn", text, f"run chrony or another NTP client on {host}"))
        else:
            said.append(text)
    return rows + ([Finding("clocks", "ok", ", ".join(said))] if said else [])


def routes(agents: Agents) -> list[Finding]:
    """Which interface reaches which host, from each of them."""
    names = list(agents)
    if len(names) < 2:
        return _interfaces()
    rows, used = [], {}
    for host, found in _all(agents, "routes", names).items():
        for other, route in found.items():
            if other == host:
                continue
            if "error" in route:
                said = f"{other} has no address or route on {host}: {route['error']}"
                rows.append(Finding("routes", "bad", said, f"add {other} to DNS or to /etc/hosts of {host}", PROCESSES))
            elif route["address"].startswith("127."):
                said = f"{other} is {route['address']}, the loopback, on {host}"
                mend = f"take {other} off that line of /etc/hosts on {host}"
                rows.append(Finding("routes", "bad", said, mend, PROCESSES))
            else:
                used.setdefault(host, set()).add(route["interface"] or route["source"])
    if rows:
        return rows
    said = "; ".join(f"{host} by {', '.join(sorted(names))}" for host, names in used.items())
    several = [host for host, found in _all(agents, "interfaces").items() if len(_outward(found)) > 1]
    if several:
        said += f"; {', '.join(several)} {'has' if len(several) == 1 else 'have'} others, and ranks may take those"
        return [Finding("routes", "warn", said, _choice(set().union(*used.values())))]
    return [Finding("routes", "ok", said)]


def link(agents: Agents) -> tuple[float | None, list[Finding]]:
    """Bytes a second of the slowest link, by a TCP stream from each host to the next, as in a ring."""
    names = list(agents)
    if len(names) < 2:
        return None, []
    ports = _all(agents, "listen")
    following = dict(zip(names, names[1:] + names[:1], strict=True))

    def stream(name: str) -> float:
        to = following[name]
        agents[name].call("send", to, ports[to], _STREAM_SECONDS)
        return agents[to].call("received")  # when all of it is there, which takes a while longer

    # No host is in two streams at a time: the last one of an odd number would meet the first.
    pairs = len(names) // 2 * 2
    rounds = [names[0:pairs:2], names[1:pairs:2], names[pairs:]]
    rates = dict(outcome for senders in rounds for outcome in _each(senders, stream))
    failed = [(host, error) for host, error in rates.items() if isinstance(error, ProbeError)]
    if failed:
        host, error = failed[0]
        said = f"no TCP from {host} to {following[host]} ({error})"
        mend = "open TCP ports above 1024 between the hosts, MPI and Gloo take any of them"
        return None, [Finding("link", "bad", said, mend, PROCESSES)]
    slowest = min(rates, key=rates.get)
    said = f"{_rate(rates[slowest])}, the slowest of {len(rates)} ({slowest} to {following[slowest]})"
    return rates[slowest], [Finding("link", "ok", said)]


def all_reduce(hosts: list[Host], rate: float | None) -> list[Finding]:
    """Times a small all-reduce under mpirun: one rank on each of several hosts, or two on one. No hosts: on this machine."""
    name, needed_by = "all-reduce", ("mpi",)
    if not program("mpirun"):
        return [Finding(name, "absent", "not measured: there is no mpirun")]
    ranks = max(2, len(hosts))
    share = 2 * (ranks - 1) / ranks  # of the bytes, what each rank sends around the ring
    size = int(min(_LARGEST, max(_SMALLEST, (rate or 0) * _RING_SECONDS / share))) if len(hosts) > 1 else _LARGEST
    try:
        found = _run_ranks(hosts, ranks, size)
    except ProbeError as error:
        mend = "see the rows above; then by hand: mpirun -np 2 hostname"
        return [Finding(name, "bad", f"{ranks} ranks under mpirun: {error}", mend, needed_by)]
    if found["ranks"] != ranks or found["hosts"] < len(hosts):
        said = f"{ranks} ranks were started on {max(1, len(hosts))} hosts, and are {found['ranks']} on {found['hosts']}"
        mend = "mpirun and mpi4py must be of one MPI, and the hosts' own names differ"
        return [Finding(name, "bad", said, mend, needed_by)]
    latency, milliseconds = found["latency"] * 1e6, found["seconds"] * 1e3
    said = f"{ranks} ranks: {latency:.0f} µs for 4 bytes, {milliseconds:.0f} ms for {size / 2**20:.0f} MiB"
    if not rate:
        return [Finding(name, "ok", said, "", needed_by)]
    times = found["seconds"] / (share * size / rate)
    said += f", {times:.2f} times the ring bound"
    if times > _FAR_FROM_BOUND:
        return [Finding(name, "warn", said, "is the network busy, or are there fewer cores than ranks?", needed_by)]
    return [Finding(name, "ok", said, "", needed_by)]


def _run_ranks(hosts: list[Host], ranks: int, size: int) -> dict[str, float]:
    each = 1 if len(hosts) > 1 else ranks
    where = ["--host", ",".join(f"{host.name}:{each}" for host in hosts)] if hosts else ["--map-by", ":OVERSUBSCRIBE"]
    command = [program("mpirun"), "-np", str(ranks), *where, "--bind-to", "none", *_RING, *_YIELD]
    agent = shlex.join(ssh_agent())
    variables = {"PRTE_MCA_plm_ssh_agent": agent, "OMPI_MCA_plm_rsh_agent": agent, **root_variables()}
    return answer([*command, *script("allreduce", str(size))], _ALLREDUCE_SECONDS, os.environ | variables)


def _interfaces() -> list[Finding]:
    """Those of this machine."""
    found = here.interfaces()
    said = ", ".join(f"{name} {address}" for name, address in found.items()) or "none"
    if not _outward(found):
        return [Finding("interfaces", "ok", f"{said}: no way to other hosts, and none is needed on one machine")]
    if len(_outward(found)) > 1:
        return [Finding("interfaces", "ok", said, "with several hosts, name them: disttrain doctor -H h1,h2")]
    return [Finding("interfaces", "ok", said)]


def _choice(interfaces: set[str]) -> str:
    names = ",".join(sorted(interfaces))
    return f"export OMPI_MCA_btl_tcp_if_include={names} NCCL_SOCKET_IFNAME={names} HOROVOD_GLOO_IFACE={names}"


def _outward(interfaces: dict[str, str]) -> list[str]:
    return [name for name, address in interfaces.items() if not address.startswith("127.")]


def _same(name: str, version: str | None, host: str) -> str:
    if name == "Python":
        return f"install Python {version} on {host}, at the same path"
    if name == "horovod" and version:
        return f"disttrain build-horovod on {host}"
    return f"on {host}: pip install {name}=={version}" if version else f"on {host}: pip uninstall {name}"


def _rate(rate: float) -> str:
    return f"{rate * 8e-9:.2f} Gbit/s" if rate > 125e6 else f"{rate * 8e-6:.1f} Mbit/s"


def _all(agents: Agents, name: str, *arguments: Any) -> dict[str, Any]:
    """What each agent answers. Raises for the first that does not."""
    found = dict(_each(list(agents), lambda host: agents[host].call(name, *arguments)))
    for said in found.values():
        if isinstance(said, ProbeError):
            raise said
    return found


def _each(names: list[str], work: Callable[[str], Any]) -> Iterator[tuple[str, Any]]:
    """Does the work for all at the same time; name by name what came of it, a `ProbeError` where it failed."""

    def attempt(name: str) -> Any:
        try:
            return work(name)
        except ProbeError as error:
            return error

    with ThreadPoolExecutor(max(1, len(names))) as pool:
        yield from zip(names, pool.map(attempt, names), strict=True)
