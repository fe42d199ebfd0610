"""`disttrain build-horovod`: an engine that has to be compiled."""

from __future__ import annotations

import signal
import sys

import click


@click.command("build-horovod", short_help="Build, install and check Horovod for the TensorFlow that is here.")
@click.option("--gpu", is_flag=True, help="Also collectives on GPUs, by NCCL; needs a CUDA toolkit (nvcc) and NCCL.")
@click.option("--jobs", type=click.IntRange(min=1), help="Compilers at a time; default: one for each usable core.")
def build_horovod(gpu: bool, jobs: int | None) -> None:
    """Builds Horovod 0.28.1 for the installed TensorFlow 2.21, with MPI and Gloo, installs it beside TensorFlow and lets two
    ranks add up a tensor.

    The wheel is kept under ~/.cache/disttrain (or $XDG_CACHE_HOME/disttrain): about five minutes on two cores the first time,
    no time afterwards. What it needs: pip install 'disttrain[horovod]', a C++ compiler and make."""
    from rich.console import Console
    from rich.markup import escape

    from disttrain.native.horovod_build import VERSION
    from disttrain.native.horovod_build import build_horovod as build

    # A request to end has to reach the compilers too, by the way that Ctrl-C takes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console(soft_wrap=True, highlight=False)
    with console.status("looking for Horovod") as status:
        outcome = build(gpu, jobs, say=lambda line: console.print(line, markup=False), show=status.update)
    done = "built and installed" if outcome.built else "installed" if outcome.installed else "here already"
    console.print(f"[bold]Horovod {VERSION} is {done}[/]; the wheel: {escape(str(outcome.wheel))}")
