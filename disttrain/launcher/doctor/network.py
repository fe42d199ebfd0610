"""The hosts of `-H` and what is between them."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from disttrain.launcher.doctor.agent import Agent
from disttrain.launcher.doctor.command import ProbeError, last_line, output, script
from disttrain.launcher.doctor.finding import PROCESSES, Finding
from disttrain.launcher.doctor.mpi import program, root_variables
from disttrain.launcher.hosts import Host, is_local, ssh_agent

_PACKAGES = ("disttrain", "tensorflow", "keras", "horovod", "mpi4py", "openmpi")
_SKEW = 1.0  # seconds; logs are hard to read beyond, and certificates and file times go wrong
_STREAM_SECONDS = 0.5
_ALLREDUCE_SECONDS = 60.0
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
    if any(not is_local(host.name) for host in hosts) and not program(ssh_agent()[0]):
        rows.append(
            Finding("ssh", "absent", f"{ssh_agent()[0]} is not here", "apt-get install openssh-client", PROCESSES)
        )
        hosts = [host for host in hosts if is_local(host.name)]
    for host, agent in _each([host.name for host in hosts], Agent):
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
    found = _all(agents, "versions", _PACKAGES)
    with contextlib.closing(Agent("localhost")) as here:
        mine = here.call("versions", _PACKAGES)
    rows = []
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
        return _interfaces(names or ["localhost"], agents)
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
    everywhere = set().union(*used.values())
    said = "; ".join(f"{host} by {', '.join(sorted(names))}" for host, names in used.items())
    there = _all(agents, "interfaces")
    several = [host for host, found in there.items() if len(_outward(found)) > 1]
    if len(everywhere) == 1 and several:
        name = everywhere.pop()
        mend = f"{_choice(name)} (ranks may take another)"
        return [Finding("routes", "warn", f"{said}; there are several interfaces on {', '.join(several)}", mend, ())]
    return [Finding("routes", "ok", said)]


def link(agents: Agents) -> tuple[float | None, list[Finding]]:
    """Bytes a second of the slowest link, by TCP streams from each host to the next at the same time, as in a ring."""
    names = list(agents)
    if len(names) < 2:
        return None, []
    ports = _all(agents, "listen")
    following = dict(zip(names, names[1:] + names[:1], strict=True))

    def stream(name: str) -> float | None:
        to = following[name]
        agents[name].call("send", to, ports[to], _STREAM_SECONDS)

    failed = [(host, error) for host, error in _each(names, stream) if isinstance(error, ProbeError)]
    if failed:
        host, error = failed[0]
        said = f"{host} to {following[host]}: {error}"
        mend = "open TCP ports above 1024 between the hosts, MPI and Gloo take any of them"
        return None, [Finding("link", "bad", said, mend, PROCESSES)]
    rates = {host: rate for host, rate in _all(agents, "received").items() if rate}
    slowest = min(rates, key=rates.get)
    before = {to: name for name, to in following.items()}
    said = f"{_rate(rates[slowest])}, the slowest of {len(rates)} ({before[slowest]} to {slowest})"
    return rates[slowest], [Finding("link", "ok", said)]


def all_reduce(hosts: list[Host], rate: float | None) -> list[Finding]:
    """Times a small all-reduce: one rank on each host, or two here, under mpirun."""
    name, ranks = "all-reduce", max(2, len(hosts))
    mpirun = program("mpirun")
    if not mpirun:
        return [Finding(name, "absent", "not measured: there is no mpirun")]
    share = 2 * (ranks - 1) / ranks
    size = _LARGEST if not rate else int(min(_LARGEST, max(_SMALLEST, rate * _RING_SECONDS / share)))
    where = (
        ["--host", ",".join(f"{host.name}:1" for host in hosts)] if len(hosts) > 1 else ["--map-by", ":OVERSUBSCRIBE"]
    )
    command = [mpirun, "-np", str(ranks), *where, "--bind-to", "none", *_RING, *_YIELD, *script("allreduce", str(size))]
    agent = shlex.join(ssh_agent())
    variables = {"PRTE_MCA_plm_ssh_agent": agent, "OMPI_MCA_plm_rsh_agent": agent, **root_variables()}
    try:
        found = json.loads(last_line(output(command, _ALLREDUCE_SECONDS, os.environ | variables)))
    except (ProbeError, ValueError) as error:
        return [
            Finding(
                name,
                "bad",
                f"{ranks} ranks under mpirun: {error}",
                "see the rows above; then by hand: mpirun -np 2 hostname",
                ("mpi",),
            )
        ]
    if found["ranks"] != ranks or found["hosts"] < len(hosts):
        said = f"mpirun started {ranks} ranks on {len(hosts)} hosts, mpi4py saw {found['ranks']} on {found['hosts']}"
        return [
            Finding(name, "bad", said, "mpirun and mpi4py must be of the same MPI; host names must differ", ("mpi",))
        ]
    latency, milliseconds = found["latency"] * 1e6, found["seconds"] * 1e3
    said = f"{ranks} ranks: {latency:.0f} µs for 4 bytes, {milliseconds:.0f} ms for {size / 2**20:.0f} MiB"
    if not rate:
        return [Finding(name, "ok", said, "", ("mpi",))]
    times = found["seconds"] / (share * size / rate)
    said += f", {times:.2f} times the ring bound"
    if times > _FAR_FROM_BOUND:
        return [Finding(name, "warn", said, "is the network busy, or are there fewer cores than ranks?", ("mpi",))]
    return [Finding(name, "ok", said, "", ("mpi",))]


def _interfaces(names: list[str], agents: Agents) -> list[Finding]:
    """On one host: what there is."""
    if agents:
        found = agents[names[0]].call("interfaces")
    else:
        with contextlib.closing(Agent("localhost")) as here:
            found = here.call("interfaces")
    said = ", ".join(f"{name} {address}" for name, address in found.items()) or "none"
    if not _outward(found):
        return [Finding("interfaces", "warn", f"{said}: no other host can be reached", "none is needed on one machine")]
    if len(_outward(found)) > 1:
        return [Finding("interfaces", "ok", said, f"for several hosts choose one: {_choice(min(_outward(found)))}")]
    return [Finding("interfaces", "ok", said)]


def _choice(interface: str) -> str:
    return (
        f"export OMPI_MCA_btl_tcp_if_include={interface} HOROVOD_GLOO_IFACE={interface} NCCL_SOCKET_IFNAME={interface}"
    )


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
    for answer in found.values():
        if isinstance(answer, ProbeError):
            raise answer
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
