"""What a probe has to say, and how probes are run so that none hides the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

from disttrain.launcher.doctor.command import ProbeError

ALL = ("local", "mirrored", "multiworker", "horovod", "mpi")
PROCESSES = ("multiworker", "horovod", "mpi")  # one process for each replica, on several hosts if need be


class Finding(NamedTuple):
    """One row.

    Attributes:
      name: what was looked at.
      status: "ok"; "warn", it works and could be better; "bad", it is there and does not work; "absent".
      found: what is there.
      mend: what to do about it; empty where nothing is to be done.
      needed_by: the backends that cannot run where this is bad or absent.
    """

    name: str
    status: Literal["ok", "warn", "bad", "absent"]
    found: str
    mend: str = ""
    needed_by: tuple[str, ...] = ()


Probe = Callable[[], list[Finding]]


def can_run(findings: Iterable[Finding], backend: str) -> bool:
    """Whether nothing that this backend needs is bad or absent."""
    return not any(backend in finding.needed_by and finding.status in ("bad", "absent") for finding in findings)


def run_probes(probes: dict[str, Probe], needed_by: tuple[str, ...] = ()) -> list[Finding]:
    """Runs probes at the same time and returns what they found, in the order of the probes.

    A probe that fails becomes a row of its own, which says what failed and is needed by `needed_by`."""
    with ThreadPoolExecutor(len(probes)) as pool:
        running = [pool.submit(_guarded, name, probe, needed_by) for name, probe in probes.items()]
        return [finding for probe in running for finding in probe.result()]


def _guarded(name: str, probe: Probe, needed_by: tuple[str, ...]) -> list[Finding]:
    try:
        return probe()
    except ProbeError as error:
        return [Finding(name, "bad", str(error), error.mend, needed_by)]
    except Exception as error:  # whatever it is, the other rows are still worth having
        said = f"the probe itself failed: {type(error).__name__}: {error}"
        return [Finding(name, "bad", said, "please report it", needed_by)]
