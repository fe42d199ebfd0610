"""`disttrain doctor`: what is here, what is wrong with it, and the mend."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from disttrain.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from disttrain.launcher.doctor import Finding

_STYLES = {"ok": "green", "warn": "yellow", "bad": "bold red", "absent": "dim"}


@click.command(short_help="What is here, what is wrong with it, and the mend beside it.")
@click.option("-H", "--hosts", help="Hosts to look at, too, and their slots: h1:2,h2:2.")
@click.option(
    "--hostfile", type=click.Path(path_type=Path), help="The same from a file: a line 'name slots=N' for each."
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "local", "mirrored", "multiworker", "horovod", "mpi"]),
    default="auto",
    show_default=True,
    help="Exit with 0 if this one can run here, else with 1.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout instead of the table.")
def doctor(hosts: str | None, hostfile: Path | None, backend: str, as_json: bool) -> None:
    """Looks at TensorFlow, GPUs, Horovod, MPI, launchers and this machine; with -H or --hostfile also at ssh to the hosts, at
    what is installed there, and at the network between them; and times a small all-reduce.

    The exit code says whether the backend can run: 0, or 1 where something that it needs is bad or absent."""
    from rich.console import Console

    import disttrain
    from disttrain.launcher.doctor import ALL, can_run, choose_backend, examine
    from disttrain.launcher.hosts import parse_hosts, read_hostfile

    if hosts is not None and hostfile:
        raise ConfigError("-H and --hostfile: give one of the two")
    named = parse_hosts(hosts) if hosts is not None else read_hostfile(hostfile) if hostfile else []
    # A request to end takes the way of Ctrl-C, so that no probe is left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with Console(stderr=True).status("looking around") as status:
        findings = examine(named, status.update)
    taken = choose_backend(backend, named)
    able = {name: can_run(findings, name) for name in ALL}
    if as_json:
        document = {
            "disttrain": disttrain.__version__,
            "hosts": [host._asdict() for host in named],
            "backend": {"asked": backend, "taken": taken, "can_run": able[taken]},
            "backends": able,
            "findings": [finding._asdict() for finding in findings],
        }
        click.echo(json.dumps(document, indent=2))
    else:
        console = Console(highlight=False)
        console.print(table(findings))
        console.print(_verdict(findings, able, taken))
    sys.exit(0 if able[taken] else 1)


def table(findings: list[Finding]) -> Table:
    """The rows, the mend beside what is wrong."""
    from rich.table import Table
    from rich.text import Text

    drawn = Table(expand=False)
    for heading in ("", "what", "found", "mend"):
        drawn.add_column(heading, overflow="fold")
    for finding in findings:
        status = Text(finding.status, _STYLES[finding.status])
        drawn.add_row(status, Text(finding.name), Text(finding.found), Text(finding.mend))
    return drawn


def _verdict(findings: list[Finding], able: dict[str, bool], taken: str) -> str:
    yes, no = (", ".join(name for name in able if able[name] is can) for can in (True, False))
    missing = dict.fromkeys(f.name for f in findings if taken in f.needed_by and f.status in ("bad", "absent"))
    asked = (
        f"[bold]{taken} can run here[/]"
        if able[taken]
        else f"[bold red]{taken} cannot run here: {', '.join(missing)}[/]"
    )
    return f"What can run here: [green]{yes or 'nothing'}[/]. What cannot: [red]{no or 'nothing'}[/].\n{asked}"
