"""Checks before a start, so that what is missing on a host is one sentence in seconds and not a hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from disttrain.errors import BackendError, ConfigError
from disttrain.launcher.command import Job
from disttrain.launcher.facts import differences, facts
from disttrain.launcher.hosts import Host, ssh_command

_SECONDS = 20


def check(job: Job) -> None:
    """Enough slots; every other host answers and has the same versions.

    Raises:
      ConfigError: more ranks than slots.
      BackendError: a host does not answer, or differs; all of them are named.
    """
    slots = sum(host.slots for host in job.hosts)
    if job.hosts and job.ranks > slots:
        raise ConfigError(
            f"-np {job.ranks}: the hosts have {slots} slots together ({', '.join(f'{h.name}:{h.slots}' for h in job.hosts)}): "
            "give them more, as -H name:slots"
        )
    others = job.others if job.launcher in ("mpirun", "horovodrun") else []
    if not others:
        return
    with ThreadPoolExecutor(min(32, len(others))) as pool:
        faults = [fault for fault in pool.map(_fault_of, others) if fault]
    if faults:
        raise BackendError("; ".join(faults))


def _fault_of(host: Host) -> str | None:
    search = [f"PYTHONPATH={os.environ['PYTHONPATH']}"] if "PYTHONPATH" in os.environ else []
    command = ssh_command(host.name, "env", *search, sys.executable, "-m", "disttrain.launcher.facts")
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"host {host.name} does not answer by ssh within {_SECONDS} s"
    except OSError as error:
        return f"ssh cannot be started ({command[0]}: {error.strerror}): install an ssh client"
    last = (done.stderr.strip().splitlines() or ["no word"])[-1]
    if done.returncode == 255:  # ssh's own
        return (
            f"host {host.name} cannot be reached by ssh ({last}): `ssh {host.name} true` must work without a password"
        )
    if done.returncode:
        return f"host {host.name} cannot run {sys.executable} -m disttrain.launcher.facts ({last}): install disttrain there, too"
    different = differences(facts(), json.loads(done.stdout.splitlines()[-1]), host.name)
    return f"{'; '.join(different)}: install the same versions on all hosts" if different else None
