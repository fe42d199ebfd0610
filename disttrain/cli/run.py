"""`disttrain run`: the same script on one machine or many."""

from __future__ import annotations

import contextlib
import json
import os
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
    from disttrain.launcher.discovery import Elastic
    from disttrain.launcher.supervisor import Outcome

# Failures that an elastic job survives even where the script still lists the host that was lost.
_ELASTIC_RESTARTS = 10
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
    help="auto: srun in a Slurm job, else mpirun if it is installed, else horovodrun, else local (no MPI; for multiworker); "
    "horovodrun first where hosts come and go.",
)
@click.option("--interface", help="Network interface between hosts. Default: the one that leads to the first of them.")
@click.option(
    "--restarts",
    type=click.IntRange(min=0),
    help="Start again after a failure, so often. Default: 0; 10 where hosts come and go.",
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
@click.option("-x", "names", multiple=True, metavar="NAME", help="Another variable that ranks on other hosts get, too.")
@click.option(
    "--host-discovery-script",
    type=click.Path(dir_okay=False),
    help="Hosts come and go, and the ranks with them: prints those that there are, a line 'name:slots' for each.",
)
@click.option(
    "--slots-per-host", type=click.IntRange(min=1), default=1, help="Of hosts that the script names without slots."
)
@click.option(
    "--min-np", type=click.IntRange(min=1), default=1, help="Ranks to go on with at least, while hosts come and go."
)
@click.option("--max-np", type=click.IntRange(min=1), help="Ranks at most, while hosts come and go. Default: -np.")
@click.option("--dry-run", is_flag=True, help="Show the command line that would be run, and end.")
@click.argument("program", nargs=-1, required=True)
def run(
    ranks: int | None,
    hosts: str | None,
    hostfile: str | None,
    launcher: str,
    interface: str | None,
    restarts: int | None,
    grace: float,
    start_timeout: float,
    output: str,
    names: tuple[str, ...],
    host_discovery_script: str | None,
    slots_per_host: int,
    min_np: int,
    max_np: int | None,
    dry_run: bool,
    program: tuple[str, ...],
) -> None:
    """Starts PROGRAM as several ranks: disttrain run -np 4 -H h1:2,h2:2 -- python train.py

    Ends with 0 only if every rank came to its end and rank 0 said so; else it names the rank and the host that failed first,
    and ends with that rank's exit code, or with 75 where a host was lost or the ranks have saved and can go on.
    """
    from disttrain.launcher.command import Job, choose_hosts, choose_launcher, commands, resolve
    from disttrain.launcher.hosts import parse_hosts

    elastic_job = _elastic(host_discovery_script, slots_per_host, min_np, max_np or ranks)
    if elastic_job:
        if hosts or hostfile:
            raise click.UsageError("the hosts are those of --host-discovery-script; leave out -H and --hostfile")
        named = elastic_job.wait(start_timeout)
        ranks = None
    else:
        named = choose_hosts(parse_hosts(hosts) if hosts else None, hostfile)
    launcher = choose_launcher(launcher, named, elastic=elastic_job is not None)
    ranks = ranks or _all_slots(launcher, named)
    job = Job(resolve(list(program)), ranks, named, launcher, interface, names, elastic_job)
    if dry_run:
        for command in commands(job, {}):
            click.echo(str(command))
        return
    if restarts is None:
        restarts = _ELASTIC_RESTARTS if elastic_job else 0
    sys.exit(_attempts(job, restarts, grace, start_timeout, all_ranks=output == "all"))


def _elastic(script: str | None, slots: int, least: int, most: int | None) -> Elastic | None:
    from disttrain.launcher.discovery import Elastic

    if script is None:
        return None
    if most is None:
        raise click.UsageError("--host-discovery-script wants --max-np or -np")
    if least > most:
        raise click.UsageError(f"--min-np {least} is more than --max-np {most}")
    return Elastic(os.path.abspath(script), slots, least, most)


def _all_slots(launcher: str, hosts: list) -> int:
    from disttrain.errors import ConfigError

    slots = sum(host.slots for host in hosts)
    if not slots and launcher == "srun":
        slots = int(os.environ.get("SLURM_NTASKS") or 0)
    if not slots:
        raise ConfigError("how many ranks? Say -np N, or name hosts with their slots, as -H h1:2,h2:2")
    return slots


def _attempts(job: Job, restarts: int, grace: float, start_timeout: float, *, all_ranks: bool) -> int:
    from disttrain.errors import DisttrainError
    from disttrain.launcher import preflight
    from disttrain.launcher.attempt import attempt
    from disttrain.launcher.discovery import Growth

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    number, left, elastic = 0, restarts, job.elastic
    while True:
        if elastic:
            job = _placed(job, elastic, start_timeout)
        else:
            preflight.check(job)
        start = time.monotonic()
        restarts_to_grow = elastic and not job.survives
        resize = Growth(elastic, job.ranks) if restarts_to_grow else contextlib.nullcontext(lambda: False)
        with _Screen(console, elastic.most if elastic else job.ranks, all_ranks=all_ranks) as screen, resize as more:
            times = {"start_seconds": start_timeout, "grace_seconds": grace}
            outcome = attempt(job, number, screen, resize=more, **times)
        if outcome.code == 0 or outcome.interrupted:
            break
        # Where hosts have changed, that was why, and no fault of the program.
        changed = False
        if elastic:
            try:
                changed = sorted(elastic.wait(start_timeout)) != sorted(job.hosts)
            except DisttrainError as error:
                console.print(f"[bold red]disttrain: error:[/] {escape(str(error))}")
                break
        if not changed and left == 0:
            break
        left -= not changed
        _explain(console, outcome, shown=all_ranks)
        console.print(f"[bold]disttrain: starting again[/]{'' if changed else f', {restarts - left} of {restarts}'}")
        number += 1
    if outcome.code == 0:
        on = f"{len(outcome.hosts)} hosts" if len(outcome.hosts) > 1 else outcome.hosts[0]
        console.print(
            f"[bold]disttrain: {outcome.ranks} ranks on {on} came to their end[/], {time.monotonic() - start:.0f} s"
        )
    else:
        _explain(console, outcome, shown=all_ranks)
    return outcome.code


def _placed(job: Job, elastic: Elastic, seconds: float) -> Job:
    """The job on the hosts that there are; those that are listed and do not answer are waited for."""
    from disttrain.errors import BackendError
    from disttrain.launcher import preflight
    from disttrain.launcher.discovery import ranks_on

    until = time.monotonic() + seconds
    while True:
        hosts = elastic.wait(seconds)
        job = job._replace(hosts=hosts, ranks=ranks_on(hosts))
        try:
            preflight.check(job)
            return job
        except BackendError:
            if time.monotonic() > until:
                raise
            time.sleep(1)


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
        # What goes to a file or a pipe goes there, bar or no bar.
        # Nobody may read any more, or in another alphabet: no reason to end the job.
        with contextlib.suppress(OSError, UnicodeError):
            if self._console.is_terminal and (stream == "stderr" or sys.stdout.isatty()):
                color = _COLORS[rank % len(_COLORS)]
                self._console.print(f"[{color}]{escape(prefix)}[/]{escape(text)}")
            else:
                click.echo((prefix + text).encode(errors="replace"), err=stream == "stderr")

    def note(self, text: str) -> None:
        with contextlib.suppress(OSError, UnicodeError):
            self._console.print(f"[bold]disttrain:[/] {escape(text)}")

    def progress(self, rank: int, text: str) -> None:
        if rank:
            return
        try:
            said = json.loads(text)
        except ValueError:  # the program itself has written there
            return
        if self._task is None or self._bar.tasks[self._task].description != said["title"]:
            self._task = self._bar.add_task(said["title"], total=said["total"], numbers="")
        self._bar.update(self._task, completed=said["done"], numbers=said["numbers"])
