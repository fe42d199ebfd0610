"""`disttrain`: one command with subcommands. Nothing heavy is imported before it is known what to run."""

from __future__ import annotations

import sys

import click
from rich.console import Console

import disttrain
from disttrain.cli.bench import bench
from disttrain.cli.build_horovod import build_horovod
from disttrain.cli.train import train
from disttrain.cli.why import why
from disttrain.errors import DisttrainError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(disttrain.__version__, "-V", "--version", prog_name="disttrain")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Distributed training for TensorFlow and Keras 3, with the gradient in plain sight."""


cli.add_command(train)
cli.add_command(why)
cli.add_command(bench)
cli.add_command(build_horovod)


def main() -> None:
    """Runs the command line. An error that disttrain knows is one line and exit code 1."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except DisttrainError as error:
        if "--debug" in sys.argv:
            raise
        Console(stderr=True, soft_wrap=True).print(
            f"[bold red]disttrain: error:[/] {_escaped(str(error))}", highlight=False
        )
        sys.exit(1)


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")
