"""The explicit step: gradients are computed, accumulated, all-reduced, checked, changed and applied in plain sight.

    micro-batches -> GradientTape -> accumulate -> all-reduce -> transform -> apply_gradients
      (worker)         (worker)       (worker)      (all)        (same on all)  (same on all)

Read `TrainStep._step` and the three methods below it: they are distributed training. Until the all-reduce everything is
a sum, because sums of uneven parts can be added and means cannot. After it, the sum is divided once by the weight of the
whole batch, and every replica holds the same gradient, bit for bit; only then may anything happen to it that is not linear.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import keras
import tensorflow as tf

from disttrain.comm.communicator import Communicator
from disttrain.errors import ConfigError, GradientError, LossError, NonFiniteError
from disttrain.gradients import sparse
from disttrain.gradients.accumulate import accumulate
from disttrain.gradients.jit import JitChoice
from disttrain.gradients.program import Program
from disttrain.gradients.tape import MicroBatch, ModelState, Sums
from disttrain.gradients.transforms import Transform, chain
from disttrain.gradients.transforms.select import Select
from disttrain.optim import keras_optimizer
from disttrain.optim.loss_scale import LossScale
from disttrain.types import Loss, StepOutput, Variable, as_loss, name_of


class TrainStep:
    """One optimizer step on one batch, shared out over replicas and cut into micro-batches.

    The update is the one that a single device would make which sees the batch as a whole.

    Args:
      model: a Keras model or layer in any form, or anything that `loss_fn` understands and that has
        `trainable_variables`. Made inside `comm.scope()`.
      optimizer: a Keras optimizer, made inside `comm.scope()`. Its own clipping acts on the averaged gradient.
      loss_fn: (model, batch) -> `Loss`, or per-example losses [examples]. See `disttrain.losses`.
      comm: from `disttrain.init`.
      accumulate: micro-batches that each replica's share of the batch is cut into; memory falls with it.
      variables: which variables train: a list, `transforms.freeze(...)` or `transforms.only(...)`; default all.
      before_reduce: transforms of this replica's own mean gradient, before the all-reduce.
      after_reduce: transforms of the averaged gradient. Clipping belongs here.
      on_none: what a variable that the loss does not reach means: "error", "zeros" (a zero gradient), or "skip" (the
        variable is left untouched).
      on_nonfinite: what NaN or infinity in the gradient or the loss means: "raise" `NonFiniteError`, or "skip" the
        update. Either way weights, optimizer state, statistics and counters stay as they were, on all replicas.
      jit: XLA for the tape and the accumulation: True, False, or "auto", which times both on the first steps and keeps
        the faster. The update is compiled apart from it, wherever the engine can.

    Raises:
      ConfigError: an option that is unknown, a model or optimizer made outside the scope, an optimizer that was built for
        other variables, or nothing to train.
    """

    def __init__(
        self,
        model: Any,
        optimizer: keras.optimizers.Optimizer,
        *,
        loss_fn: Callable[[Any, Any], Loss | tf.Tensor],
        comm: Communicator,
        accumulate: int = 1,
        variables: Sequence[Variable] | Select | None = None,
        before_reduce: Sequence[Transform] = (),
        after_reduce: Sequence[Transform] = (),
        on_none: Literal["error", "zeros", "skip"] = "error",
        on_nonfinite: Literal["raise", "skip"] = "raise",
        jit: bool | Literal["auto"] = "auto",
    ):
        _check_option("on_none", on_none, ("error", "zeros", "skip"))
        _check_option("on_nonfinite", on_nonfinite, ("raise", "skip"))
        _check_option("jit", jit, (True, False, "auto"))
        if not isinstance(accumulate, int) or accumulate < 1:
            raise ConfigError(f"accumulate={accumulate!r}: a whole number of 1 or more is wanted")
        self.model, self.loss_fn, self.comm, self.accumulate = model, loss_fn, comm, accumulate
        self.optimizer, self._loss_scaling = keras_optimizer.unwrap(optimizer)
        self.before_reduce, self.after_reduce = chain(*before_reduce), chain(*after_reduce)
        self.on_none, self.on_nonfinite, self._jit_setting = on_none, on_nonfinite, jit
        self._choice, self._prepared = variables, False
        if getattr(model, "built", True) and getattr(model, "variables", True):
            self._prepare()

    def __call__(self, batch: Any) -> StepOutput:
        """Does one step.

        Args:
          batch: an element of `comm.distribute(dataset)`, or a plain nest of tensors: this worker's share of the batch.

        Raises:
          DataError: tensors of the batch that differ in their number of examples.
          LossError: a loss that is a mean, labels that do not fit, or no weight on any replica.
          GradientError: the loss does not reach a variable, and `on_none="error"`.
          NonFiniteError: NaN or infinity, and `on_nonfinite="raise"`.
        """
        shares = self.comm.local_shares(batch)
        if not self._prepared:
            self._build_model(shares[0])
            self._prepare()
        shape = tuple(x.shape for x in tf.nest.flatten(shares))
        plan = self._jit.plan(shape)
        start = time.perf_counter()
        try:
            report = self._program(plan)(shares)
        except tf.errors.OpError as error:
            if not self._jit.give_up(plan, error):
                raise
            return self(batch)
        applied = bool(report["applied"])
        self._jit.record(plan, shape, time.perf_counter() - start)
        if not applied:
            self._explain(report)
        return StepOutput(
            loss=report["loss"],
            weight=report["weight"],
            grad_norm=report["grad_norm"],
            applied=applied,
            metrics=report["metrics"],
            step=int(report["step"]),
            examples=report["examples"],
        )

    # The step, in the order of the picture ---------------------------------------------------------------------------

    def _step(self, shares: list[Any], mode: str, fused: bool) -> dict[str, Any]:
        """The whole step, on all replicas of this worker."""
        local = self.comm.run(self._accumulate, (shares, mode))
        reached = self._reached(local)
        gradients, statistics, report = self.comm.run(self._all_reduce, (local, reached))
        report = self.comm.local_values(report)[0]
        # The number of rows in IndexedSlices differs from batch to batch, and XLA would compile anew each time.
        fused = fused and not any(isinstance(g, tf.IndexedSlices) for g in gradients)
        with keras_optimizer.no_second_reduce(self.optimizer):
            apply = functools.partial(self.comm.run, self._apply, (gradients, statistics, reached), fused=fused)
            tf.cond(report["applied"], apply, lambda: None)
        if self._loss_scale:
            self._loss_scale.update(report["finite"])
        return {**report, "step": self.optimizer.iterations.value}

    def _accumulate(self, shares: list[Any], mode: str) -> Sums:
        """This replica's share: GradientTape over every micro-batch, sums of gradients, losses and weights."""
        replica = self.comm.replica_id()
        micro_batch = MicroBatch(
            self.loss_fn,
            self.model,
            self.variables,
            self._state,
            loss_scale=self._loss_scale.scale.read_value() if self._loss_scale else None,
            mean=self._holds_whole_batch,
            compiled="inline" if self._lockstep else mode,
        )
        sums = accumulate(
            micro_batch,
            shares[replica - self.comm.rank],
            self.accumulate,
            self._state,
            first_index=replica * self.accumulate,
            may_be_empty=self.comm.size > 1,
            lockstep=self._lockstep,
        )
        self._moving = [self._state.statistics[i] for i in micro_batch.updated]
        return sums._replace(statistics=[sums.statistics[i] for i in micro_batch.updated])

    def _all_reduce(self, local: Sums, reached: list[bool]) -> tuple[list, list, dict]:
        """Adds up all replicas and divides once: the gradient of the whole batch, the same bits everywhere."""
        variables, gradients = self._with_gradient(reached), list(itertools.compress(local.gradients, reached))
        gradients = [tf.zeros(v.shape, v.dtype) if g is None else g for g, v in zip(gradients, variables, strict=True)]
        broken_here = self._broken_here(gradients, local.scalars["total"])
        if self.before_reduce:
            gradients = self._transform_own(gradients, variables, local.scalars)

        sums, broken_by_replica = self._sum_over_replicas(local._replace(gradients=gradients), broken_here)

        gradients = [tf.cast(g, v.dtype) for g, v in zip(sums.gradients, variables, strict=True)]
        gradients = [sparse.deduplicate(g) for g in self._divide(gradients, sums.scalars)]
        return gradients, sums.statistics, self._report(gradients, sums.scalars, broken_by_replica)

    def _apply(self, gradients: list, statistics: list, reached: list[bool]) -> None:
        """The same gradient on every replica: transform it, apply it, and move the model's own state on."""
        variables = self._with_gradient(reached)
        gradients = self.after_reduce(gradients, variables)
        pairs = [(tf.cast(g, v.dtype), v) for g, v in zip(gradients, variables, strict=True) if g is not None]
        self.optimizer.apply_gradients(pairs)
        for variable, value in zip(self._moving, statistics, strict=True):
            variable.assign(value)
        self._state.advance_seeds()

    # What they stand on ----------------------------------------------------------------------------------------------

    def _divide(self, gradients: list, scalars: dict) -> list:
        """Sums to means. Where the tape has already divided by the weight, at most the loss scale is left."""
        divisor = self._divisor(scalars)
        if divisor is None:
            return gradients
        return [sparse.map_values(lambda x: tf.math.divide_no_nan(x, tf.cast(divisor, x.dtype)), g) for g in gradients]

    def _divisor(self, scalars: dict) -> tf.Tensor | None:
        factors = [] if self._holds_whole_batch else [scalars["weight"]]
        factors += [self._loss_scale.scale.read_value()] if self._loss_scale else []
        return functools.reduce(tf.multiply, factors) if factors else None

    def _transform_own(self, gradients: list, variables: list, scalars: dict) -> list:
        """Shows `before_reduce` this replica's mean gradient, and turns what it returns into a sum again."""
        means = [sparse.deduplicate(g) for g in self._divide(gradients, scalars)]
        means = self.before_reduce(means, variables)
        factor = self._divisor(scalars)
        return [sparse.map_values(lambda x: x * tf.cast(factor, x.dtype), g) for g in means]

    def _sum_over_replicas(self, local: Sums, broken_here: tf.Tensor) -> tuple[Sums, tf.Tensor]:
        """One all-reduce for everything: weights, losses, metrics and flags ride along with the gradients."""
        if self.comm.size == 1:
            return local, broken_here
        examples, chief = local.scalars["examples"], self.comm.replica_id() == 0
        # Moments average by number of examples; a counter is taken from the first replica.
        shares = [s * tf.cast(examples, s.dtype) if s.dtype.is_floating else s * int(chief) for s in local.statistics]
        riders = tf.nest.flatten((local.scalars, broken_here, shares))
        reduced = self.comm.all_reduce([*local.gradients, *riders], "sum")
        gradients, riders = reduced[: len(local.gradients)], reduced[len(local.gradients) :]
        scalars, broken, shares = tf.nest.pack_sequence_as((local.scalars, broken_here, shares), riders)
        divide = tf.math.divide_no_nan
        statistics = [divide(s, tf.cast(scalars["examples"], s.dtype)) if s.dtype.is_floating else s for s in shares]
        return Sums(gradients, scalars, statistics), broken

    def _broken_here(self, gradients: list, total: tf.Tensor) -> tf.Tensor:
        """float32 [size]: 1 at this replica's place if its own gradients or loss are not finite."""
        if self.comm.size == 1:
            return tf.zeros([1])  # the check of the whole sees the same, and is spared a pass over the gradients
        finite = tf.math.is_finite(tf.add_n([total, *sparse.square_sums(gradients)]))
        return tf.one_hot(
            self.comm.replica_id(), self.comm.size, on_value=1.0 - tf.cast(finite, tf.float32), off_value=0.0
        )

    def _report(self, gradients: list, scalars: dict, broken_by_replica: tf.Tensor) -> dict[str, Any]:
        squares = tf.stack(sparse.square_sums(gradients))
        norm = tf.sqrt(tf.reduce_sum(squares))
        finite = tf.math.is_finite(norm) & tf.math.is_finite(scalars["total"])
        violations = tf.add_n([tf.constant(0.0), *scalars["checks"].values()])
        return {
            "loss": tf.math.divide_no_nan(scalars["total"], scalars["weight"]),
            "weight": scalars["weight"],
            "examples": scalars["examples"],
            "grad_norm": norm,
            "metrics": {name: tf.math.divide_no_nan(*pair) for name, pair in scalars["metrics"].items()},
            "applied": finite & (scalars["weight"] > 0) & tf.equal(violations, 0),
            "finite": finite,
            "checks": scalars["checks"],
            "broken_gradients": ~tf.math.is_finite(squares),
            "broken_replicas": broken_by_replica if self.comm.size > 1 else tf.stack([~finite]),
        }

    def _reached(self, local: Sums) -> list[bool]:
        """For each variable whether it takes part: a None on some replicas only is a zero there."""
        by_replica = [sums.gradients for sums in self.comm.local_values(local)]
        reached = [any(g is not None for g in gradients) for gradients in zip(*by_replica, strict=True)]
        unreached = [name_of(v) for v, there in zip(self.variables, reached, strict=True) if not there]
        if len(unreached) == len(reached) or (unreached and self.on_none == "error"):
            raise GradientError(
                f"the loss does not reach {', '.join(unreached)}: leave them out with variables=, "
                "or say on_none='zeros' or on_none='skip'"
            )
        self._taking_part = reached if self.on_none == "skip" else [True] * len(reached)
        return self._taking_part

    def _with_gradient(self, reached: list[bool]) -> list[Variable]:
        return list(itertools.compress(self.variables, reached))

    # Getting ready, and saying what went wrong -----------------------------------------------------------------------

    def _build_model(self, share: Any) -> None:
        """Makes the variables of a model that has not seen its input yet, without running it."""
        # In a stateless scope Keras notes what variables are wanted, and makes them at its end, outside the trace.
        with self.comm.scope(), keras.StatelessScope():
            build = tf.function(lambda: as_loss(self.loss_fn(self.model, share)).total, autograph=False)
            build.get_concrete_function()

    def _prepare(self) -> None:
        comm = self.comm
        self.variables = _choose(self._choice, list(self.model.trainable_variables))
        self.variables = self.after_reduce.select(self.before_reduce.select(self.variables))
        outside = [name_of(v) for v in self.variables if not comm.owns(v)]
        if outside:
            raise ConfigError(
                f"{outside[0]} and {len(outside) - 1} more variables were made outside comm.scope(): "
                "build the model inside `with comm.scope():`"
            )
        self._state = ModelState(self.model)
        layers = list(self.model._flatten_layers()) if isinstance(self.model, keras.Layer) else []
        self._lockstep = comm.size > 1 and any(getattr(layer, "synchronized", False) for layer in layers)
        self._holds_whole_batch = comm.size == 1 and self.accumulate == 1 and not self.before_reduce
        with comm.scope():
            keras_optimizer.prepare(self.optimizer, self.variables, comm.owns)
            float16 = any(getattr(layer, "compute_dtype", None) == "float16" for layer in layers)
            self._loss_scale = LossScale(**self._loss_scaling) if float16 or self._loss_scaling else None
            self.before_reduce.build(self.variables)
            self.after_reduce.build(self.variables)
        self._jit = JitChoice(self._jit_setting, not self._lockstep, comm.all_gather_object)
        self._program = functools.cache(
            lambda plan: Program(functools.partial(self._step, mode=plan.tape, fused=plan.fused))
        )
        self._prepared = True

    def _explain(self, report: dict[str, Any]) -> None:
        """Raises what a step that was not applied has to say, or returns where skipping it was asked for."""
        for sentence, count in report["checks"].items():
            if count > 0:
                raise LossError(f"{sentence}: not so for {int(count)} of the batch; nothing was applied")
        if report["weight"] <= 0 and report["finite"]:
            raise LossError(
                f"the loss has weight {float(report['weight']):g} over all replicas: the batch is empty, or every example "
                "is masked or has sample weight 0; nothing was applied"
            )
        may_be_the_scale = self._loss_scale and tf.math.is_finite(report["loss"]) and self._loss_scale.scale > 1
        if self.on_nonfinite == "skip" or may_be_the_scale:
            return
        flags = report["broken_gradients"].numpy()
        names = (
            ", ".join(name_of(v) for v in itertools.compress(self._with_gradient(self._taking_part), flags)) or "none"
        )
        replicas = ", ".join(map(str, report["broken_replicas"].numpy().nonzero()[0])) or "none alone, only their sum"
        raise NonFiniteError(
            f"NaN or infinity at step {int(report['step']) + 1}: loss {float(report['loss']):g}, "
            f"gradients of {names}; on replicas: {replicas}. Nothing was applied; on_nonfinite='skip' passes over such batches"
        )


def _choose(choice: Sequence[Variable] | Select | None, trainable: list[Variable]) -> list[Variable]:
    if choice is None:
        chosen = trainable
    elif hasattr(choice, "select"):
        chosen = choice.select(trainable)
    else:
        chosen = list(choice)
    if not chosen:
        raise ConfigError(
            "there are no variables to train: the model has no trainable variables, or variables= is empty"
        )
    return chosen


def _check_option(name: str, value: Any, known: tuple) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value!r}: use one of {', '.join(map(repr, known))}")
