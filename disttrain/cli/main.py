"""`disttrain`: one command with subcommands. Nothing heavy is imported before it is known what to run."""

from __future__ import annotations

import sys
from types import TracebackType

import click
from rich.console import Console

import disttrain
from disttrain.cli.bench import bench
from disttrain.cli.build_horovod import build_horovod
from disttrain.cli.doctor import doctor
from disttrain.cli.k8s import k8s
from disttrain.cli.run import run
from disttrain.cli.train import train
from disttrain.cli.why import why
from disttrain.errors import DisttrainError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(disttrain.__version__, "-V", "--version", prog_name="disttrain")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Distributed training for TensorFlow and Keras 3, with the gradient in plain sight."""


cli.add_command(train)
cli.add_command(run)
cli.add_command(why)
cli.add_command(bench)
cli.add_command(build_horovod)
cli.add_command(doctor)
cli.add_command(k8s)


def main() -> None:
    """Runs the command line. An error that disttrain knows is one line and exit code 1."""
    # By way of the hook, not of sys.exit: where there are several ranks, the others are told.
    sys.excepthook = _one_line
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)


def _one_line(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if not isinstance(error, DisttrainError) or "--debug" in sys.argv:
        sys.__excepthook__(kind, error, traceback)
        return
    said = str(error).replace("[", "\\[")
    Console(stderr=True, soft_wrap=True).print(f"[bold red]disttrain: error:[/] {said}", highlight=False)
