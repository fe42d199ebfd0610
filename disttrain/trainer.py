"""The loop around the step: epochs, progress, evaluation and a summary."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from disttrain.errors import ConfigError, DataError
from disttrain.gradients.program import Program
from disttrain.gradients.tape import count_examples
from disttrain.observe.progress import Progress
from disttrain.step import TrainStep
from disttrain.types import Loss, StepOutput, as_loss


class Trainer:
    """Runs a `TrainStep` over a data set.

    Args:
      step: the step.
      progress: whether the chief shows a progress bar; nobody else ever does.
    """

    def __init__(self, step: TrainStep, *, progress: bool = True):
        self.step, self.comm = step, step.comm
        self._shows_progress = progress and self.comm.is_chief
        self._evaluate = Program(self._sums_of_batch)

    def fit(
        self,
        dataset: Iterable,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        validation: Iterable | None = None,
        title: str = "training",
    ) -> dict[str, Any]:
        """Trains.

        Args:
          dataset: global batches, a `tf.data.Dataset` or any iterable that can be gone through once for each epoch.
            Should workers have more or fewer of them, those that are done take part with no examples until all are.
          epochs: how often (default 1). One of `epochs` and `steps`, not both.
          steps: optimizer steps instead; the data set is gone through as often as that takes.
          validation: global batches for `evaluate`, after the last step.
          title: shown before the progress bar.

        Returns:
          steps, skipped (steps that were not applied), epochs, examples, seconds, examples_per_second (without the first
          step, which traces and compiles), grad_norm (of the last step), train and, where asked for, validation: name ->
          mean over the last epoch, "loss" among them.

        Raises:
          ConfigError: both epochs and steps are given, or one is not a whole number of 1 or more.
          DataError: the data set is empty.
        """
        if epochs is not None and steps is not None:
            raise ConfigError(f"epochs={epochs} and steps={steps}: give one of the two")
        for name, value in (("epochs", epochs), ("steps", steps)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name}={value!r}: a whole number of 1 or more is wanted")
        batches = self.comm.distribute(dataset)
        run = _Run()
        with Progress(title, self._total(batches, epochs, steps), enabled=self._shows_progress) as progress:
            while run.epochs < (epochs or 1) if steps is None else run.steps < steps:
                self._epoch(batches, run, progress, steps)
        summary = run.summary()
        if validation is not None:
            summary["validation"] = self.evaluate(validation)
        return summary

    def evaluate(self, dataset: Iterable) -> dict[str, float]:
        """Weighted means of the loss and the metrics over a whole data set, in inference mode.

        `loss_fn` must take `training=False`, as those of `disttrain.losses` do.

        Raises:
          DataError: the data set is empty, or has no weight.
        """
        mine = _Means()
        for batch in self.comm.distribute(dataset):
            # Summed here and reduced once, at the end: workers may have different numbers of batches.
            for sums in self._evaluate(self.comm.local_shares(batch)):
                mine.add({name: (float(total), float(weight)) for name, (total, weight) in sums.items()})
        everyone = _Means()
        for means in self.comm.all_gather_object(mine):
            everyone.add(means.sums)
        return everyone.means()

    def _epoch(self, batches: Iterable, run: _Run, progress: Progress, steps: int | None) -> None:
        run.means = _Means()
        lengths = self.comm.all_gather_object(_length(batches))
        if len(lengths) > 1 and (None in lengths or len(set(lengths)) > 1):
            batches = itertools.chain(batches, itertools.repeat(None))
        seen = run.steps
        for batch in batches:
            out = self.step(batch)
            if out.live == 0:
                break
            run.add(out)
            progress.advance(out, run.speed())
            if steps is not None and run.steps >= steps:
                break
        if run.steps == seen:
            raise DataError("the data set yields no batches")
        run.epochs += 1

    @staticmethod
    def _total(batches: Iterable, epochs: int | None, steps: int | None) -> int | None:
        if steps is not None:
            return steps
        length = _length(batches)
        return None if length is None else length * (epochs or 1)

    def _sums_of_batch(self, shares: list[Any]) -> list[dict[str, tuple[tf.Tensor, tf.Tensor]]]:
        return self.comm.local_values(self.comm.run(self._sums_of_share, (shares,)))

    def _sums_of_share(self, shares: list[Any]) -> dict[str, tuple[tf.Tensor, tf.Tensor]]:
        share = shares[self.comm.replica_id() - self.comm.rank]

        def sums(share) -> dict[str, tuple[tf.Tensor, tf.Tensor]]:
            loss: Loss = as_loss(self.step.loss_fn(self.step.model, share, training=False))
            return {"loss": (loss.total, loss.weight), **loss.metrics}

        sums = tf.function(sums, autograph=False)
        outline = sums.get_concrete_function(tf.nest.map_structure(tf.type_spec_from_value, share)).structured_outputs
        zeros = tf.nest.map_structure(lambda x: tf.zeros(x.shape), outline)
        return tf.cond(count_examples(share) > 0, lambda: sums(share), lambda: zeros)


def _length(batches: Iterable) -> int | None:
    """Number of batches, where it is known."""
    try:
        return len(batches)
    except TypeError:
        return None


class _Means:
    """Sums and weights by name, divided at the end."""

    def __init__(self):
        self.sums: dict[str, list[float]] = {}

    def add(self, pairs: dict[str, tuple[float, float]]) -> None:
        for name, (total, weight) in pairs.items():
            sums = self.sums.setdefault(name, [0.0, 0.0])
            sums[0] += total
            sums[1] += weight

    def __bool__(self):
        return bool(self.sums)

    def means(self) -> dict[str, float]:
        if not self.sums or self.sums["loss"][1] <= 0:
            raise DataError("there is nothing to average: the data set is empty or has no weight")
        return {name: total / weight for name, (total, weight) in self.sums.items() if weight > 0}


class _Run:
    """What a call of `fit` has done so far."""

    def __init__(self):
        self.steps = self.skipped = self.epochs = 0
        self.examples = 0.0
        self.means = _Means()
        self._start = time.perf_counter()
        self._after_first: tuple[float, float] | None = None

    def add(self, out: StepOutput) -> None:
        self.steps += 1
        self.skipped += not out.applied
        self.examples += float(out.examples)
        self._after_first = self._after_first or (time.perf_counter(), self.examples)
        if out.applied:
            weight = float(out.weight)
            named = {"loss": out.loss, **out.metrics}
            self.means.add({name: (float(x) * weight, weight) for name, x in named.items()})
        self._last = out

    def speed(self) -> float:
        """Examples per second; 0.0 until the second step is done."""
        since, before = self._after_first or (0.0, 0.0)
        return (self.examples - before) / max(time.perf_counter() - since, 1e-9)

    def summary(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            "epochs": self.epochs,
            "examples": int(self.examples),
            "seconds": round(time.perf_counter() - self._start, 3),
            "examples_per_second": round(self.speed(), 1),
            "grad_norm": float(self._last.grad_norm),
            # Empty where the last epoch applied no step: a run is not to be lost for want of an average.
            "train": self.means.means() if self.means else {},
        }
