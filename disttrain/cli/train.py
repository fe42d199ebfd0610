"""`disttrain train`: whole trainings on real data."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

# What each example trains with where the command line does not say otherwise.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 20, "batch_size": 64, "lr": 3e-3},
    "charlm": {"steps": 200, "batch_size": 16, "lr": 2e-3},
    "finetune": {"epochs": 10, "batch_size": 64, "lr": 2e-3},
}


def _common(command: Callable) -> Callable:
    name = command.__name__
    defaults = _DEFAULTS[name]
    length = f"{defaults['epochs']} epochs" if "epochs" in defaults else f"{defaults['steps']} steps"
    positive = click.IntRange(min=1)
    options = [
        click.option(
            "--backend", default="auto", show_default=True, help="auto, local, mirrored, horovod, mpi or multiworker."
        ),
        click.option("--replicas", type=positive, help="GPUs where there are any, else logical CPU devices."),
        click.option(
            "--batch-size",
            type=positive,
            default=defaults["batch_size"],
            show_default=True,
            help="Global: examples of one optimizer step, over all replicas and micro-batches.",
        ),
        click.option(
            "--accumulate", type=positive, default=1, show_default=True, help="Micro-batches on each replica."
        ),
        click.option("--epochs", type=positive, help=f"How long to train; default {length}."),
        click.option("--steps", type=positive, help="Optimizer steps, instead of epochs."),
        click.option("--lr", type=float, default=defaults["lr"], show_default=True, help="Learning rate."),
        click.option(
            "--clip-norm", type=float, default=1.0, show_default=True, help="Of the global gradient; 0: no clipping."
        ),
        click.option(
            "--precision",
            type=click.Choice(["float32", "mixed_bfloat16", "mixed_float16"]),
            default="float32",
            show_default=True,
            help="Dtype policy of the model.",
        ),
        click.option(
            "--checkpoint-every", type=positive, help="Steps between checkpoints, in the folder of the results."
        ),
        click.option(
            "--resume",
            type=click.Choice(["auto", "never"]),
            default="never",
            show_default=True,
            help="auto: go on from the newest checkpoint; save at the end and on SIGTERM, too, and end with 75 then.",
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Of weights, shuffling and dropout."),
        click.option(
            "--out",
            type=click.Path(path_type=Path),
            default=Path("runs") / name,
            show_default=True,
            help="Folder for the results.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.group()
def train() -> None:
    """Train a model on real data that is on every machine."""


@train.command()
@_common
def digits(**options: Any) -> None:
    """Handwritten digits (scikit-learn's 1,797 images) with a small convolutional network."""
    _run("digits", options)


@train.command()
@_common
@click.option("--text", type=click.Path(path_type=Path), help="Text to learn; default: the standard library's sources.")
def charlm(**options: Any) -> None:
    """A byte-level transformer on any text."""
    _run("charlm", options)


@train.command()
@_common
def finetune(**options: Any) -> None:
    """Digits 0 to 4; then all but the head is frozen and learns 5 to 9."""
    _run("finetune", options)


def _run(name: str, options: dict[str, Any]) -> None:
    if options["epochs"] and options["steps"]:
        raise click.UsageError("--epochs and --steps: give one of the two")
    if not options["epochs"] and not options["steps"]:
        options |= {k: v for k, v in _DEFAULTS[name].items() if k in ("epochs", "steps")}
    from disttrain.cli.quiet import import_tensorflow

    import_tensorflow()
    from importlib import import_module

    from rich.console import Console
    from rich.logging import RichHandler

    from disttrain.errors import DataError
    from disttrain.examples.config import TrainConfig
    from disttrain.observe.summary import make_folder, write_summary

    console = Console(stderr=True)
    # In a file or under `disttrain run` a line is a line, however long.
    handler = RichHandler(console=console, show_path=False) if console.is_terminal else logging.StreamHandler()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("disttrain").setLevel(logging.INFO)
    config = TrainConfig(**{**options, "clip_norm": options["clip_norm"] or None})
    folder = make_folder(config.out)
    model, numbers = import_module(f"disttrain.examples.{name}").train(config)
    if numbers.pop("rank") != 0:
        return
    model_path = folder / f"{name}.keras"
    model.save(model_path)
    summary = write_summary(folder, {"example": name, **numbers, "config": config.as_dict()})
    _report(numbers, model_path, summary)
    if numbers.get("unsaved"):
        raise DataError(
            f"{numbers['unsaved']}, though the training is done: its model is {model_path}, but it cannot be made longer"
        )


def _report(numbers: dict[str, Any], model: Path, summary: Path) -> None:
    from rich.console import Console

    said = ", ".join(f"{name} {value:.4f}" for name, value in numbers["validation"].items())
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"{numbers['steps']} steps on {numbers['replicas']} replicas ({numbers['backend']}) in {numbers['seconds']:.1f} s, "
        f"{numbers['examples_per_second']:,.0f} examples/s"
    )
    console.print(f"[bold]held out: {said}[/]")
    console.print(f"model: {model}\nsummary: {summary}")
