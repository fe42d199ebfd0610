"""The lesson as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from disttrain.lesson.case import NOT_INSTALLED, PROMISE, Outcome
from disttrain.lesson.report import MEASURE, number, plain

PEER, OURS, INK, FAINT = "#c4483a", "#2b6c9e", "#222222", "#8a8a8a"
LABELS, LEFT, RIGHT = 4e-14, 1e-8, 5.0  # an error of exactly zero has no place on a log axis: its bar ends at LEFT
HEIGHT = 0.38


def save(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draws a pair of bars for each case, the peer's above disttrain's, and saves them as PNG."""
    style = {"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "xtick.color": FAINT}
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(10, 1.8 + 0.58 * len(outcomes)))
        for row, outcome in enumerate(outcomes):
            _draw(axes, row, outcome)
        _dress(axes, len(outcomes))
        _head(figure, axes)
        figure.savefig(path, dpi=150, facecolor="white", bbox_inches="tight", pad_inches=0.25)
        plt.close(figure)


def _draw(axes: Axes, row: int, outcome: Outcome) -> None:
    above, below = row - HEIGHT / 2, row + HEIGHT / 2
    axes.text(LABELS, above, plain(outcome.case.who), ha="left", va="center", color=FAINT, size=9)
    axes.text(LABELS, below, plain(outcome.case.what), ha="left", va="center")
    if outcome.peer_error is not None:
        _bar(axes, above, outcome.peer_error, PEER)
    elif outcome.kind == NOT_INSTALLED:
        _words(axes, above, outcome.peer_failure, color=FAINT, style="italic")
    else:
        _words(axes, above, f"✗ {outcome.peer_failure}", color=PEER, weight="bold")
    _bar(axes, below, outcome.error, OURS)


def _bar(axes: Axes, y: float, error: float, color: str) -> None:
    end = max(error, LEFT)
    axes.barh(y, end - LEFT, HEIGHT * 0.9, left=LEFT, color=color)
    axes.text(end * 1.15, y, number(error), va="center", color=color, size=9)


def _words(axes: Axes, y: float, words: str, **style: str) -> None:
    """Takes a bar's place; on white, so that the line of the promise does not run through it."""
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    axes.text(LEFT * 1.15, y, words, va="center", bbox=behind, **style)


def _dress(axes: Axes, rows: int) -> None:
    axes.set_xscale("log")
    axes.set_xlim(LEFT, RIGHT)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_yticks([])
    axes.tick_params(axis="x", which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for row in range(1, rows):
        axes.plot([LABELS, RIGHT], [row - 0.5] * 2, color="#efefef", linewidth=0.8, clip_on=False, zorder=0)
    axes.axvline(PROMISE, color=INK, linestyle=(0, (4, 3)), linewidth=1)
    axes.text(PROMISE, -0.66, "disttrain's promise: 1e-6", ha="center", va="bottom", size=9)
    axes.text(LABELS, rows + 0.05, f"{MEASURE} (log scale)", va="top", color=FAINT, size=9)


def _head(figure: Figure, axes: Axes) -> None:
    """Title and legend, at the left edge of the labels."""
    figure.subplots_adjust(left=0.4)
    axes.text(LABELS, -1.75, "Is it the update that one device would make?", size=15, weight="bold")
    axes.text(LABELS, -1.2, "■ the peer", color=PEER)
    axes.text(LABELS * 60, -1.2, "■ disttrain on the same batch", color=OURS)
