"""`disttrain bench`: speed and memory, as ratios within one run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console


@click.group()
def bench() -> None:
    """Measure speed and memory against what one would write by hand."""


def _out(what: str) -> Callable:
    """The option that says where the results go."""
    folder = click.Path(path_type=Path)
    return click.option("--out", type=folder, default=Path("runs/bench"), show_default=True, help=what)


def _keep(path: Path, results: Any, console: Console) -> None:
    """Writes what was measured, and says where."""
    path.write_text(json.dumps(results, indent=2) + "\n")
    console.print(f"results: {path}")


@bench.command()
@click.option(
    "--model", "models", multiple=True, type=click.Choice(["mlp", "cnn", "transformer"]), help="Default: all three."
)
@click.option("--rounds", type=click.IntRange(min=5), default=40, show_default=True, help="Timed steps of each kind.")
@click.option("--engine", type=click.Choice(["horovod", "mpi"]), help="In several processes, against Horovod by hand.")
@click.option("--ranks", type=click.IntRange(min=2), default=2, show_default=True, help="Processes, with --engine.")
@click.option("--memory/--no-memory", default=True, show_default=True, help="Also measure the memory of accumulation.")
@_out("Folder for step.json.")
def step(models: tuple[str, ...], rounds: int, engine: str | None, ranks: int, memory: bool, out: Path) -> None:
    """TrainStep against a hand-written tf.function loop; accumulation against one big batch."""
    from disttrain.cli.quiet import import_tensorflow

    import_tensorflow()
    from rich.console import Console
    from rich.table import Table

    from disttrain.bench.memory import compare_memory
    from disttrain.bench.step import compare_step, compare_step_on
    from disttrain.observe.summary import make_folder

    folder = make_folder(out)
    console = Console()
    results: dict[str, list] = {"step": [], "memory": []}
    table = Table(
        "model", "jit", "by hand, ms", "TrainStep, ms", "ratio", title="time of one step (medians, interleaved)"
    )
    with console.status("timing") as status:
        for model in models or ("mlp", "cnn", "transformer"):
            status.update(f"timing {model}")
            rows = compare_step_on(engine, ranks, model, rounds, folder) if engine else compare_step(model, rounds)
            for row in rows:
                results["step"].append(row)
                table.add_row(
                    model, row["jit"], f"{row['hand_ms']:.2f}", f"{row['ours_ms']:.2f}", f"{row['ratio']:.3f}"
                )
    console.print(table)
    if memory and not engine:
        with console.status("measuring memory"):
            results["memory"] = compare_memory()
        table = Table(
            "accumulate", "peak above start, MiB", "of the big batch", title="memory of one step, CNN, 2,048 images"
        )
        for row in results["memory"]:
            table.add_row(str(row["accumulate"]), f"{row['peak_mib']:.0f}", f"{row['ratio']:.2f}")
        console.print(table)
    _keep(folder / "step.json", results, console)


@bench.command()
@click.option("--millions", type=click.IntRange(min=1), default=100, show_default=True, help="Parameters of the model.")
@click.option("--saves", type=click.IntRange(min=2), default=7, show_default=True, help="Checkpoints that are timed.")
@_out("Folder for checkpoint.json, and for the checkpoints meanwhile.")
def checkpoint(millions: int, saves: int, out: Path) -> None:
    """How long a training is held up while a checkpoint is written."""
    from disttrain.cli.quiet import import_tensorflow

    import_tensorflow()
    import tempfile

    from rich.console import Console
    from rich.table import Table

    from disttrain.bench.checkpoint import compare_checkpoint
    from disttrain.observe.summary import make_folder

    folder = make_folder(out)
    console = Console()
    with console.status("timing"), tempfile.TemporaryDirectory(dir=folder) as checkpoints:
        row = compare_checkpoint(millions, saves, Path(checkpoints))
    table = Table("held up", "ms", "of a step", title=f"transformer, {row['parameters'] / 1e6:.1f} M parameters, Adam")
    for label, name in (("by the call", "call"), ("in the steps meanwhile", "steps_during"), ("together", "held_up")):
        table.add_row(label, f"{row[name] * row['step_ms']:.1f}", f"{row[name]:.4f}")
    console.print(table)
    console.print(
        f"a step: {row['step_ms']:.0f} ms without a write ({row['spread']:.0%} between quarters), "
        f"{row['steps']} steps during {saves} writes\n"
        f"a write: {row['write_s']:.1f} s for {row['bytes'] / 1e6:.0f} MB, {row['mb_per_s']:.0f} MB/s"
    )
    _keep(folder / "checkpoint.json", row, console)


@bench.command()
@click.option(
    "--engine",
    "engines",
    multiple=True,
    type=click.Choice(["horovod", "mpi"]),
    default=["horovod", "mpi"],
    help="Default: both.",
)
@click.option("--ranks", type=click.IntRange(min=2), default=2, show_default=True, help="Processes.")
@click.option("--rounds", type=click.IntRange(min=5), default=20, show_default=True, help="Timed calls of each engine.")
@_out("Folder for allreduce.json.")
def allreduce(engines: tuple[str, ...], ranks: int, rounds: int, out: Path) -> None:
    """160 gradients, 100 MB: each engine against MPI_Allreduce alone."""
    from rich.console import Console
    from rich.table import Table

    from disttrain.bench.allreduce import compare_allreduce
    from disttrain.observe.summary import make_folder

    folder = make_folder(out)
    console = Console()
    with console.status("timing"):
        rows = compare_allreduce(list(engines), ranks, rounds, folder)
    table = Table("engine", "ms", "MPI alone, ms", "ratio", title=f"all-reduce of 160 gradients, 100 MB, {ranks} ranks")
    for row in rows:
        table.add_row(row["engine"], f"{row['ms']:.0f}", f"{row['raw_ms']:.0f}", f"{row['ratio']:.2f}")
    console.print(table)
    _keep(folder / "allreduce.json", rows, console)


@bench.command("input")
@click.option(
    "--source",
    "kinds",
    multiple=True,
    type=click.Choice(["arrays", "tfrecords", "images"]),
    default=["arrays", "tfrecords", "images"],
    help="Default: all three.",
)
@click.option(
    "--rounds", type=click.IntRange(min=1), default=7, show_default=True, help="Epochs of 32 steps, each way."
)
@_out("Folder for input.json.")
def read_input(kinds: tuple[str, ...], rounds: int, out: Path) -> None:
    """Steps fed from arrays, TFRecords and image files against steps on one batch in memory."""
    from disttrain.cli.quiet import import_tensorflow

    import_tensorflow()
    from rich.console import Console
    from rich.table import Table

    from disttrain.bench.input import compare_input
    from disttrain.observe.summary import make_folder

    folder = make_folder(out)
    console, rows = Console(), []
    table = Table(
        "source",
        "batch in memory, ms",
        "fed, ms",
        "ratio",
        "reading alone, ms",
        title="time of one step, CNN, 128 images of 32 x 32 (medians, interleaved)",
    )
    with console.status("timing"):
        for row in compare_input(kinds, rounds):
            rows.append(row)
            times = (f"{row[name]:.1f}" for name in ("held_ms", "fed_ms"))
            table.add_row(row["source"], *times, f"{row['ratio']:.3f}", f"{row['alone_ms']:.1f}")
    console.print(table)
    _keep(folder / "input.json", rows, console)
