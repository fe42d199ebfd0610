"""The loop around the step: epochs, progress, evaluation, checkpoints and a summary."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from disttrain import elastic
from disttrain.checkpoint import Checkpointer, Preemption, Saved
from disttrain.comm import pipeline
from disttrain.errors import BackendError, ConfigError, DataError, Preempted
from disttrain.gradients.program import Program
from disttrain.gradients.tape import count_examples
from disttrain.observe.health import Health
from disttrain.observe.progress import Progress
from disttrain.step import TrainStep
from disttrain.types import Loss, StepOutput, as_loss

log = logging.getLogger("disttrain")


class Trainer:
    """Runs a `TrainStep` over a data set. In an elastic job it goes on while workers come and go; see `disttrain.elastic`.

    Args:
      step: the step.
      progress: whether the chief shows a progress bar; nobody else ever does.
      checkpoint: saves as often as it says, at the end, and when a signal asks the training to end (SIGTERM, SIGUSR1, Ctrl-C);
        and `fit` goes on from what it finds there. Bit for bit on the same ranks, if `jit` is not "auto" or had chosen.
    """

    def __init__(self, step: TrainStep, *, progress: bool = True, checkpoint: Checkpointer | None = None):
        self.step, self.comm, self._checkpoint, self._shows_progress = step, step.comm, checkpoint, progress
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

        Warns, once of each, of a rank that holds up the others by more than 10 % of a step, and of data that is waited for
        more than 10 % of the time: looked at every ten seconds or ten steps, whichever is later, and at the end.

        Args:
          dataset: global batches: a `disttrain.data.Batches`, a `tf.data.Dataset` (all ranks must get the same: shuffle it
            by a seed), or any iterable that can be gone through once for each epoch. Should workers have more or fewer of
            them, those that are done take part with no examples until all are. A training that goes on from a checkpoint
            passes over the batches of its epoch that it has seen, in the order in which that epoch was shuffled: of a
            `tf.data.Dataset` that is newly made, as the process before had it. Where that cannot be found again, it warns.
          epochs: how often (default 1). One of `epochs` and `steps`, not both.
          steps: optimizer steps instead; the data set is gone through as often as that takes.
          validation: global batches for `evaluate`, after the last step.
          title: shown before the progress bar.

        Returns:
          steps, skipped (steps that were not applied), epochs, examples, seconds, examples_per_second (without the first
          step, which traces and compiles), grad_norm (of the last step), train and, where asked for, validation: name ->
          mean over the last epoch, "loss" among them. Of this process's steps, without those that traced or compiled:
          input_share, the share of the time that ranks wait for data (the one in the middle), and ranks, for each its rank,
          host, steps, and per step the mean step_seconds, waited_seconds in the all-reduce (part of these; the rank that
          waits least is the slowest), input_seconds and between_seconds (saving, showing).
          With checkpoints also unsaved: why the last one could not be written, or nothing. What was trained is in the model
          all the same.

        Raises:
          ConfigError: both epochs and steps are given, or one is not a whole number of 1 or more; or there is a checkpoint
            that must not be gone on from.
          DataError: the data set is empty; it is not the same on all ranks, or a `tf.data.Dataset` whose order not all ranks
            know; or the checkpoint is of another training.
          Preempted: a signal asked the training to end, and its checkpoint is saved. On all ranks, after the same step; it ends
            the process with exit code 75 unless it is caught. In an elastic job on the ranks alone that were asked, if there
            are others; or this worker has no place any more.
          BackendError: in an elastic job all workers that knew its state are gone, and there is no checkpoint.
        """
        if epochs is not None and steps is not None:
            raise ConfigError(f"epochs={epochs} and steps={steps}: give one of the two")
        for name, value in (("epochs", epochs), ("steps", steps)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name}={value!r}: a whole number of 1 or more is wanted")
        run, total = _Run(), self._total(dataset, epochs, steps)

        def train() -> dict[str, Any]:
            self._take_up(dataset, run)
            health = Health(self.comm.rank, self.comm.all_gather_object)
            shown = self._shows_progress and self.comm.is_chief
            with Progress(title, total, run.steps, enabled=shown) as progress:
                while run.epochs < (epochs or 1) if steps is None else run.steps < steps:
                    self._epoch(dataset, run, health, progress, steps, preemption)
            unsaved = self._save_and_wait(run) if self._checkpoint and run.moved else ""
            summary = run.summary() | health.summary() | ({"unsaved": unsaved} if self._checkpoint else {})
            if validation is not None:  # asked to end by now, it is better brought to its end than begun again
                summary["validation"] = self.evaluate(validation)
            if unsaved and self.comm.is_chief:
                log.error("the training is done, but %s: save the model elsewhere", unsaved)
            return summary

        with Preemption() if self._checkpoint else contextlib.nullcontext(Preemption()) as preemption:
            return elastic.survive(self.comm, train, lambda: run.catch_up(self.step.last))

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

    def _epoch(
        self,
        dataset: Iterable,
        run: _Run,
        health: Health,
        progress: Progress,
        steps: int | None,
        preemption: Preemption,
    ) -> None:
        dataset = _of_epoch(dataset, run.epochs, run.batches)
        batches, run.begun = run.begun or self.comm.distribute(dataset), None
        known = self.comm.all_gather_object((_length(batches), _fingerprint(dataset)))
        lengths, fingerprints = zip(*known, strict=True)
        _check_same_data(fingerprints)
        if len(lengths) > 1 and (None in lengths or len(set(lengths)) > 1):
            batches = itertools.chain(batches, itertools.repeat(None))
        for batch in health.reading(batches):
            out = self.step(batch, stop=bool(preemption.requested))
            if out.live == 0:
                break
            run.add(out)
            health.add(out)
            progress.advance(out, run.speed())
            if out.stop:
                self._end_early(run, preemption)
            if out.regroup:
                raise elastic.HostsChanged
            if steps is not None and run.steps >= steps:
                break
            if self._checkpoint and self._checkpoint.due(run.steps):
                self._save(run)
        if run.batches == 0:
            raise DataError("the data set yields no batches")
        if steps is None or run.steps < steps:
            run.next_epoch()

    # Where to begin ----------------------------------------------------------------------------------------------------

    def _take_up(self, dataset: Iterable, run: _Run) -> None:
        """Goes on from where the furthest rank of an elastic job is, else from the checkpoint, else begins."""
        if self.comm.elastic:
            pipeline.check_seeds(dataset)  # also where there is one rank: others may come
            if pipeline.shuffles_again(dataset):
                raise DataError(
                    "the data set has another order in every iteration, of which a worker that joins an elastic job has made "
                    "none: use dt.data.Batches, or shuffle(..., reshuffle_each_iteration=False)"
                )
        mine, told, run.begun = None, [None], None
        if run.holds:
            mine = {"run": run.state(), "moved": run.moved}  # by `moved` all save at the end, or none
            mine |= {"step": self.step.settings, "micro_batches": self.step.micro_batches}
        if self.comm.elastic:
            told = self.comm.all_gather_object(mine)
        furthest = max((state for state in told if state), key=lambda state: state["run"]["steps"], default=None)
        if furthest:
            self._follow(furthest, told.index(furthest), dataset, run)
        elif saved := self._newest():
            self._go_on(saved, dataset, run)
        elif run.moved:
            raise BackendError("all ranks that knew where the training was are gone, and there is no checkpoint of it")
        run.holds = True

    def _follow(self, state: dict[str, Any], root: int, dataset: Iterable, run: _Run) -> None:
        """All take the state of rank `root`. Those that are behind hold nothing until they have all of it."""
        run.holds = run.holds and run.steps == state["run"]["steps"]
        if self.step.started:
            self.step.regroup(root=root)
        else:
            self._start_step(dataset, root)
        self.step.settings, self.step.micro_batches = state["step"], state["micro_batches"]
        run.restore(state["run"])
        run.moved = run.moved or state["moved"]
        if self.comm.is_chief:
            log.info("going on after step %d; ranks: %d", run.steps, self.comm.size)

    def _start_step(self, dataset: Iterable, root: int = 0) -> Iterable:
        """Its variables exist once it has started, for which it wants to see what a batch is like. Returns an epoch's batches."""
        batches = iter(self.comm.distribute(_of_epoch(dataset, 0, 0)))
        seen = list(itertools.islice(batches, 1))
        self.step.start(seen[0] if seen else None, root=root)
        return itertools.chain(seen, batches)

    # Checkpoints -------------------------------------------------------------------------------------------------------

    def _newest(self) -> Saved | None:
        """What rank 0 finds is what all go on from."""
        if self._checkpoint is None:
            return None
        with self.comm.busy("the verification of checkpoints"):
            newest = self._checkpoint.latest() if self.comm.is_chief else None
        return self.comm.all_gather_object(newest)[0]

    def _go_on(self, saved: Saved, dataset: Iterable, run: _Run) -> None:
        run.restore(saved.state["run"])
        pipeline.pass_over(dataset, run.epochs)
        epoch = self._start_step(dataset)
        if pipeline.shuffles_again(dataset):  # to the pipeline, this was the epoch: the next one has another order
            run.begun = itertools.islice(epoch, run.batches, None)
        if self.comm.is_chief:
            with self.comm.busy("reading a checkpoint"):
                self._checkpoint.load(saved, self.step.state)
        self.comm.broadcast(self.step.state)
        self.step.settings = saved.state["step"]
        if self.comm.is_chief:
            log.info("going on from %s: step %d, epoch %d", saved.folder, run.steps, run.epochs)
            self._warn_of_order(dataset, run)

    @staticmethod
    def _warn_of_order(dataset: Iterable, run: _Run) -> None:
        lost = run.epochs > 0 and not pipeline.can_pass_over(dataset)
        if lost or pipeline.drawn_by_chance(dataset):
            log.warning(
                "the data set is not in the order again that it had in the epoch to go on in (%s): some of its examples may be "
                "seen twice, others never. dt.data.Batches always knows the order of an epoch",
                "a stage after shuffle, such as repeat, hides it" if lost else "shuffle has no seed",
            )

    def _save(self, run: _Run) -> None:
        if self.comm.is_chief:
            state = {"run": run.state(), "step": self.step.settings}
            with self.comm.busy("writing a checkpoint"):  # the one before, that is
                self._checkpoint.save(run.steps, self.step.state, state)

    def _save_and_wait(self, run: _Run) -> str:
        """Returns on all ranks when it is on the disk; or why it is not."""
        self._save(run)
        with self.comm.busy("writing a checkpoint"):
            failed = self._checkpoint.wait()
        return self.comm.all_gather_object(failed)[0]

    def _end_early(self, run: _Run, preemption: Preemption) -> None:
        """All ranks come here after the same step, and none leaves before the checkpoint is on the disk."""
        failed = self._save_and_wait(run)
        elastic.let_go(self.comm, lambda: bool(preemption.requested))
        if failed:
            raise DataError(f"asked to end, and {failed}: the training can go on from an older one alone")
        said = f"asked to end ({preemption.requested or 'on another rank'}): saved after step {run.steps}"
        if self.comm.is_chief:
            log.warning("%s in %s; start again to go on", said, self._checkpoint.directory)
        raise Preempted(said)

    @staticmethod
    def _total(dataset: Iterable, epochs: int | None, steps: int | None) -> int | None:
        if steps is not None:
            return steps
        length = _length(dataset)
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


def _of_epoch(dataset: Iterable, epoch: int, seen: int) -> Iterable:
    """The batches of an epoch but for the first `seen`."""
    batches = dataset.epoch(epoch) if hasattr(dataset, "epoch") else dataset
    if not seen:
        return batches
    return batches.skip(seen) if hasattr(batches, "skip") else itertools.islice(batches, seen, None)


def _fingerprint(dataset: Iterable) -> str | None:
    """What must be the same on all ranks, in words."""
    return getattr(dataset, "same_on_all_ranks", None) or pipeline.described(dataset)


def _check_same_data(fingerprints: Sequence[str | None]) -> None:
    """Raises an error, the same on all ranks, where one has other data: batches are shared out by number."""
    common = Counter(fingerprints).most_common(1)[0][0]
    odd = [rank for rank, seen in enumerate(fingerprints) if seen != common]
    if odd:
        raise DataError(
            f"the ranks' data differ: rank {odd[0]} has {fingerprints[odd[0]]}, and rank {fingerprints.index(common)} has "
            f"{common}. Give all ranks the same files, batch size and seed"
        )


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
    """What a call of `fit` has done so far, in earlier processes that it goes on from, too."""

    def __init__(self):
        self.steps = self.skipped = self.epochs = self.batches = 0  # whole epochs, and batches of the one after them
        self.examples, self.grad_norm = 0.0, 0.0
        self.moved, self.last = False, None
        self.holds = False  # whether the variables here are those of these steps
        self.begun: Iterable | None = None  # what is left of the epoch, where looking at its first batch has begun it
        self.means = _Means()
        self._start, self._seconds_before = time.perf_counter(), 0.0
        self._after_first: tuple[float, float] | None = None

    def state(self) -> dict[str, Any]:
        """For a checkpoint: JSON."""
        names = ("steps", "skipped", "epochs", "batches", "examples", "grad_norm")
        # Copied: it is written while training goes on.
        means = {name: list(pair) for name, pair in self.means.sums.items()}
        return {name: getattr(self, name) for name in names} | {"means": means, "seconds": self._seconds()}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` returned."""
        for name, value in state.items():
            if name not in ("means", "seconds"):
                setattr(self, name, value)
        self.means.sums = state["means"]
        self._start, self._seconds_before = time.perf_counter(), state["seconds"]

    def next_epoch(self) -> None:
        self.epochs += 1
        self.batches = 0

    def add(self, out: StepOutput) -> None:
        if self.batches == 0:
            self.means = _Means()
        self.steps += 1
        self.batches += 1
        self.moved, self.last = True, out
        self.skipped += not out.applied
        self.examples += float(out.examples)
        self._after_first = self._after_first or (time.perf_counter(), self.examples)
        if out.applied:
            weight = float(out.weight)
            named = {"loss": out.loss, **out.metrics}
            self.means.add({name: (float(x) * weight, weight) for name, x in named.items()})
        self.grad_norm = float(out.grad_norm)

    def catch_up(self, last: StepOutput | None) -> None:
        """Counts a step that has happened, and after which a rank was lost before the step could be told of."""
        if last is not None and last is not self.last:
            self.add(last)

    def speed(self) -> float:
        """Examples per second; 0.0 until the second step is done."""
        if self._after_first is None:
            return 0.0
        since, before = self._after_first
        return (self.examples - before) / max(time.perf_counter() - since, 1e-9)

    def _seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._start

    def summary(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            "epochs": self.epochs + (self.batches > 0),
            "examples": int(self.examples),
            "seconds": round(self._seconds(), 3),
            "examples_per_second": round(self.speed(), 1),
            "grad_norm": self.grad_norm,
            # Empty where the last epoch applied no step: a run is not to be lost for want of an average.
            "train": self.means.means() if self.means else {},
        }
