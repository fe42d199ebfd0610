"""`disttrain run`: the same script on one machine or many."""

from __future__ import annotations

import json
import re
import sys
import time
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from disttrain.launcher.command import Job
    from disttrain.launcher.supervisor import Outcome

_COLORS = ("cyan", "magenta", "green", "yellow", "blue", "bright_cyan", "bright_magenta", "bright_green")


@click.command(
    context_settings={"allow_interspersed_args": False},
    short_help="Start a program as several ranks, on one machine or many.",
)
@click.option(
    "-np", "ranks", type=click.IntRange(min=1), help="Ranks. Default: every slot of the hosts, or of Slurm's job."
)
@click.option("-H", "--hosts", help="Hosts and how many ranks each takes, as h1:2,h2:2. Default: this machine.")
@click.option(
    "--hostfile", type=click.Path(dir_okay=False), help="The same from a file, a line 'name slots=N' for each."
)
@click.option(
    "--launcher",
    type=click.Choice(["auto", "local", "horovodrun", "mpirun", "srun"]),
    default="auto",
    show_default=True,
    help="auto: srun in a Slurm job, else mpirun if it is installed, else horovodrun, else local (no MPI; for multiworker).",
)
@click.option("--interface", help="Network interface between hosts. Default: the one that leads to the first of them.")
@click.option(
    "--restarts", type=click.IntRange(min=0), default=0, show_default=True, help="Start again after a failure."
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=20,
    show_default=True,
    help="Seconds to save in after Ctrl-C or SIGTERM.",
)
@click.option(
    "--start-timeout",
    type=click.FloatRange(min=1),
    default=120,
    show_default=True,
    help="Seconds until all ranks are there.",
)
@click.option(
    "--output", type=click.Choice(["all", "rank0"]), default="all", show_default=True, help="Whose output is shown."
)
@click.option("--dry-run", is_flag=True, help="Show the command line that would be run, and end.")
@click.argument("program", nargs=-1, required=True)
def run(
    ranks: int | None,
    hosts: str | None,
    hostfile: str | None,
    launcher: str,
    interface: str | None,
    restarts: int,
    grace: float,
    start_timeout: float,
    output: str,
    dry_run: bool,
    program: tuple[str, ...],
) -> None:
    """Starts PROGRAM as several ranks: disttrain run -np 4 -H h1:2,h2:2 -- python train.py

    Ends with 0 only if every rank came to its end and rank 0 said so; else it names the rank and the host that failed first,
    and ends with that rank's exit code, or with 75 where a host was lost or the ranks have saved and can go on.
    """
    from disttrain.launcher import preflight
    from disttrain.launcher.command import Job, choose_hosts, choose_launcher, commands, resolve
    from disttrain.launcher.hosts import parse_hosts

    named = choose_hosts(parse_hosts(hosts) if hosts else None, hostfile)
    launcher = choose_launcher(launcher, named)
    job = Job(resolve(list(program)), ranks or _all_slots(launcher, named), named, launcher, interface)
    if dry_run:
        for command in commands(job, {}):
            click.echo(str(command))
        return
    preflight.check(job)
    sys.exit(_attempts(job, restarts, grace, start_timeout, all_ranks=output == "all"))


def _all_slots(launcher: str, hosts: list) -> int:
    import os

    from disttrain.errors import ConfigError

    slots = sum(host.slots for host in hosts)
    if not slots and launcher == "srun":
        slots = int(os.environ.get("SLURM_NTASKS") or 0)
    if not slots:
        raise ConfigError("how many ranks? Say -np N, or name hosts with their slots, as -H h1:2,h2:2")
    return slots


def _attempts(job: Job, restarts: int, grace: float, start_timeout: float, *, all_ranks: bool) -> int:
    from disttrain.launcher.supervisor import attempt

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    for number in range(restarts + 1):
        start = time.monotonic()
        with _Screen(console, job.ranks, all_ranks=all_ranks) as screen:
            outcome = attempt(job, number, screen, start_seconds=start_timeout, grace_seconds=grace)
        if outcome.code == 0 or outcome.interrupted or number == restarts:
            break
        _explain(console, outcome, shown=all_ranks)
        console.print(f"[bold]disttrain: starting again, {number + 1} of {restarts}[/]")
    if outcome.code == 0:
        on = f"{len(outcome.hosts)} hosts" if len(outcome.hosts) > 1 else outcome.hosts[0]
        console.print(
            f"[bold]disttrain: {job.ranks} ranks on {on} came to their end[/], {time.monotonic() - start:.0f} s"
        )
    else:
        _explain(console, outcome, shown=all_ranks)
    return outcome.code


def _explain(console: Console, outcome: Outcome, *, shown: bool) -> None:
    if outcome.lines and not shown:
        for line in outcome.lines:
            console.print(f"  {escape(line)}")
    last = f". Its last line: {outcome.lines[-1].strip()}" if outcome.lines else ""
    console.print(f"[bold red]disttrain: error:[/] {escape(outcome.reason + last)}")


class _Screen:
    """Lines of the ranks, each with its number, and one progress bar, that of rank 0."""

    def __init__(self, console: Console, ranks: int, *, all_ranks: bool):
        self._all, self._console = all_ranks, console
        self._width = len(str(ranks - 1))
        self._prefixed = ranks > 1 and all_ranks
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: int | None = None

    def __enter__(self) -> _Screen:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def output(self, rank: int, stream: str, text: str) -> None:
        if rank and not self._all:
            return
        text = re.split(r"\r(?=.)", text)[-1].rstrip("\r")
        prefix = f"[{rank:>{self._width}}] " if self._prefixed else ""
        if self._console.is_terminal:
            color = _COLORS[rank % len(_COLORS)]
            self._console.print(f"[{color}]{escape(prefix)}[/]{escape(text)}")
        else:
            click.echo(prefix + text, err=stream == "stderr")

    def progress(self, rank: int, text: str) -> None:
        if rank:
            return
        said = json.loads(text)
        if self._task is None or self._bar.tasks[self._task].description != said["title"]:
            self._task = self._bar.add_task(said["title"], total=said["total"], numbers="")
        self._bar.update(self._task, completed=said["done"], numbers=said["numbers"])
