"""The outcomes as a table for the terminal, as Markdown for the README, and as data."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from rich.table import Table
from rich.text import Text

import disttrain
from disttrain.lesson.case import NOT_INSTALLED, PROMISE, Outcome

MEASURE = "error of the update: ‖Δw - Δw_ref‖ / ‖Δw_ref‖; at 1 it is as far off as the update is long"


def plain(text: str) -> str:
    """The text without Markdown's backticks."""
    return text.replace("`", "")


def number(error: float) -> str:
    """An error as people read it: 0.84, or 2e-7 where it is rounding."""
    return f"{error:.2f}" if error >= 0.01 else f"{error:.0e}".replace("e-0", "e-")


def peer_result(outcome: Outcome) -> str:
    """The peer's error, or what kept it from having one."""
    return outcome.peer_failure or number(outcome.peer_error)


def lesson(outcome: Outcome) -> str:
    """What went wrong. Only that it was not run, where it was not; and no sentence that this run has belied."""
    if outcome.kind == NOT_INSTALLED:
        return outcome.peer_message
    if outcome.kind != outcome.case.expected:
        said = outcome.peer_message or f"the update is {outcome.kind}"
        return f"Not what is known of these versions ({outcome.case.expected}): {said.replace('|', '/')}"
    return outcome.case.lesson


def terminal_table(outcomes: Sequence[Outcome]) -> Table:
    """One row for each case: who, why it went wrong, how wrong, and ours."""
    table = Table(title="Is it the update that one device would make?", caption=MEASURE, show_lines=True)
    table.add_column("what is done, and what goes wrong")
    table.add_column("its error", justify="right", no_wrap=True)
    table.add_column("disttrain", justify="right", no_wrap=True)
    for outcome in outcomes:
        table.add_row(
            Text.assemble((plain(outcome.case.name), "bold"), "\n", plain(lesson(outcome))),
            Text(peer_result(outcome), style=_peer_style(outcome)),
            Text(number(outcome.error), style="green" if outcome.error <= PROMISE else "bold red"),
        )
    return table


def _peer_style(outcome: Outcome) -> str:
    return {"right": "green", NOT_INSTALLED: "dim"}.get(outcome.kind, "bold red")


def markdown(outcomes: Sequence[Outcome]) -> str:
    """The same table, to be pasted into the README."""
    lines = ["| the peer | its error | disttrain | what goes wrong |", "|---|---|---|---|"]
    for outcome in outcomes:
        result = f"`{peer_result(outcome)}`" if outcome.kind == "raises" else peer_result(outcome)
        lines.append(f"| {outcome.case.name} | {result} | {number(outcome.error)} | {lesson(outcome)} |")
    notes = ", ".join(f"{name} {version}" for name, version in versions().items())
    return "\n".join([*lines, "", f"Measured by `disttrain why` with {notes}.", ""])


def as_data(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Everything, for programs."""
    return {"promise": PROMISE, "versions": versions(), "cases": [_row(outcome) for outcome in outcomes]}


def _row(outcome: Outcome) -> dict[str, Any]:
    return {
        "case": outcome.case.key,
        "name": plain(outcome.case.name),
        "peer_error": outcome.peer_error,
        "peer_failure": outcome.peer_failure,
        "peer_message": outcome.peer_message,
        "disttrain_error": outcome.error,
        "lesson": plain(lesson(outcome)),
    }


def versions() -> dict[str, str]:
    """What it was measured with."""
    return {
        "disttrain": disttrain.__version__,
        "TensorFlow": tf.__version__,
        "Keras": keras.__version__,
        "NumPy": np.__version__,
        "Python": platform.python_version(),
    }
