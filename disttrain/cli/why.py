"""`disttrain why`: the lesson as a command."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from disttrain.errors import DisttrainError

if TYPE_CHECKING:
    from rich.console import Console

    from disttrain.lesson.case import Outcome


@click.command(short_help="What goes wrong where the gradient is hidden, measured here and now.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/why"),
    show_default=True,
    help="Folder for why.png, why.md, why.json, and why.log with the engines' own warnings.",
)
def why(out: Path) -> None:
    """Trains two replicas the way that hides the gradient (Keras fit, minimize, Horovod's wrapped optimizer) and with
    disttrain, on the same data, and shows how far each update is from the one that a single device makes."""
    from rich.console import Console

    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    # Replicas are logical CPU devices, on a machine with GPUs too: anyone can run this, and no TF32 blurs the measure.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ["KERAS_BACKEND"] = "tensorflow"
    with _stderr_to(out / "why.log"):
        outcomes = _run(console)
        files = _write(outcomes, out)
        _show(console, outcomes, files)
    _check(outcomes)


def _run(console: Console) -> list[Outcome]:
    with console.status("starting TensorFlow") as status:
        from disttrain.lesson.cases import CASES, run_cases
        from disttrain.lesson.report import plain

        outcomes: list[Outcome] = []
        running = run_cases()
        for number, case in enumerate(CASES, 1):
            status.update(f"{number} of {len(CASES)}: {plain(case.name)}")
            outcomes.append(next(running))
        return outcomes


def _write(outcomes: list[Outcome], out: Path) -> list[Path]:
    from disttrain.lesson import plot, report

    png, table, data = (out / name for name in ("why.png", "why.md", "why.json"))
    plot.save(outcomes, png)
    table.write_text(report.markdown(outcomes), encoding="utf-8")
    data.write_text(json.dumps(report.as_data(outcomes), indent=2) + "\n", encoding="utf-8")
    return [png, table, data]


def _show(console: Console, outcomes: list[Outcome], files: list[Path]) -> None:
    from disttrain.lesson.report import terminal_table

    console.print(terminal_table(outcomes))
    console.print("Written:", *files, soft_wrap=True, highlight=False)


def _check(outcomes: list[Outcome]) -> None:
    from disttrain.lesson.case import PROMISE

    broken = [f"{o.case.key} {o.error:.2g}" for o in outcomes if not o.error <= PROMISE]
    if broken:
        raise DisttrainError(f"disttrain's own error is above {PROMISE:g}: {', '.join(broken)}. Please report it.")


@contextlib.contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    """Keeps warnings and the engine's C++ log lines, which come before any log level is read, off the screen."""
    sys.stderr.flush()
    saved = os.dup(2)
    with path.open("wb") as log:
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)
