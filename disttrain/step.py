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

from disttrain import agreement
from disttrain.comm.communicator import Communicator
from disttrain.errors import ConfigError, DataError, GradientError, LossError, NonFiniteError
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
      check_every: steps after which workers compare checksums of their weights. 0: never.
      on_drift: what weights that differ mean: "raise" `DriftError`, or "heal": they are copied from the worker that most
        others agree with.

    A step happens as a whole or not at all: nothing is written before the all-reduce of all gradients has come back. So a
    worker that survives another's loss holds the state after a whole step, and `last` is what that step returned.

    With several workers the first step compares what they are about to train, and gives all of them the weights, the
    optimizer state and the seeds of rank 0.

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
        check_every: int = 100,
        on_drift: Literal["raise", "heal"] = "raise",
    ):
        _check_option("on_none", on_none, ("error", "zeros", "skip"))
        _check_option("on_nonfinite", on_nonfinite, ("raise", "skip"))
        _check_option("jit", jit, (True, False, "auto"))
        _check_option("on_drift", on_drift, ("raise", "heal"))
        if not isinstance(accumulate, int) or accumulate < 1:
            raise ConfigError(f"accumulate={accumulate!r}: a whole number of 1 or more is wanted")
        self.model, self.loss_fn, self.comm, self.accumulate = model, loss_fn, comm, accumulate
        self.optimizer, self._loss_scaling = keras_optimizer.unwrap(optimizer)
        self.before_reduce, self.after_reduce = chain(*before_reduce), chain(*after_reduce)
        self.on_none, self.on_nonfinite, self._jit_setting = on_none, on_nonfinite, jit
        self.check_every, self.on_drift = check_every, on_drift
        self._choice, self._prepared, self._started = variables, False, False
        self.last: StepOutput | None = None
        if getattr(model, "built", True) and getattr(model, "variables", True):
            self._prepare()

    def __call__(self, batch: Any, *, stop: bool = False) -> StepOutput:
        """Does one step.

        Args:
          batch: an element of `comm.distribute(dataset)`, or a plain nest of tensors: this worker's share of the batch.
            None where this worker has none left and takes part in the others' steps; see `join`.
          stop: this worker was asked to end. All hear of it in the same step, as `StepOutput.stop`.

        Raises:
          DataError: tensors of the batch that differ in their number of examples.
          LossError: a loss that is a mean, labels that do not fit, or no weight on any replica.
          GradientError: the loss does not reach a variable, and `on_none="error"`.
          NonFiniteError: NaN or infinity, and `on_nonfinite="raise"`.
          ConfigError: in the first step, workers that train different things.
          DriftError: workers whose weights are no longer the same, and `on_drift="raise"`.
        """
        shares = None if batch is None else self.comm.local_shares(batch)
        if not self._started:
            self._start(shares)
        with self.comm.waiting(self._waits_in):
            return self._do(shares, stop)

    def start(self, batch: Any, *, root: int = 0) -> None:
        """What the first step does before it computes anything: builds the model, compares workers, makes them equal.

        For those who want to restore a checkpoint into what it has built. Raises what the first step raises.

        Args:
          batch: as for a step.
          root: the worker whose weights, optimizer state and seeds all take.
        """
        if not self._started:
            self._start(None if batch is None else self.comm.local_shares(batch), root)

    def regroup(self, *, root: int) -> None:
        """After `comm.regroup()`: the same again among the workers that there are now; those that are new call `start`.

        Of the micro-batches there are as many as before over all workers, where that can be divided, so that each stays as
        small as it was.
        """
        self._fit_to_group()
        self._start(self._empty_shares, root)

    @property
    def state(self) -> list[Variable]:
        """All that a checkpoint must hold, once the step has started: weights, optimizer, statistics, seeds, transforms."""
        return self._same_everywhere

    @property
    def settings(self) -> dict[str, Any]:
        """What a step has found out by itself, and a training that goes on should not find out anew: JSON."""
        return {"jit": self._jit.choice}

    @settings.setter
    def settings(self, settings: dict[str, Any]) -> None:
        self._jit.choice = self._jit.choice or settings["jit"]

    @property
    def started(self) -> bool:
        """Whether there has been a step, or `start`."""
        return self._started

    @property
    def micro_batches(self) -> int:
        """Micro-batches of the whole batch, over all replicas. Set it before the first step after `start` or `regroup`."""
        return self._micro_batches

    @micro_batches.setter
    def micro_batches(self, count: int) -> None:
        self._micro_batches = count
        self._parts = -(-count // self.comm.size)

    def _do(self, shares: list[Any] | None, stop: bool) -> StepOutput:
        """One step; done again where it turns out that it must be compiled in another way."""
        self._live = shares is not None
        mine = shares if self._live else self._empty_shares
        shape = tuple(x.shape for x in tf.nest.flatten(mine))
        plan = self._jit.plan(shape)
        start = time.perf_counter()
        try:
            program = self._program(plan)
            made = program.traces, program.shapes
            report = program((mine, self._word(stop)))
            applied = bool(report["applied"])
        except tf.errors.OpError as error:
            if not self._jit.give_up(plan, error):
                raise
            return self._do(shares, stop)
        traced = program.traces > made[0] or (plan.tape == "xla" and program.shapes > made[1])
        self._jit.record(plan, shape, time.perf_counter() - start)
        if not applied and any(report["unforeseen"].numpy()):
            self._forget_programs()
            return self._do(shares, stop)
        self._calls += 1
        if not applied and report["live"] > 0:
            self._explain(report)
        out = StepOutput(
            loss=report["loss"],
            weight=report["weight"],
            grad_norm=report["grad_norm"],
            applied=applied,
            metrics=report["metrics"],
            step=int(report["step"]),
            examples=report["examples"],
            live=int(report["live"]),
            stop=bool(report["stop"]),
            waited=float(report["waited"]),
            traced=traced,
            regroup=bool(report["regroup"]),
        )
        if out.live:
            self.last = out
        if self._several_workers and self.check_every and self._calls % self.check_every == 0:
            agreement.check_drift(self.comm, self._same_everywhere, self._calls, self.on_drift)
        return out

    def _word(self, stop: bool) -> tf.Tensor:
        """What this worker has to say to the others in this step; see `_flags`."""
        regroup = self.comm.elastic and self.comm.hosts_changed
        return tf.constant([float(self._live), float(stop), float(regroup)])

    def join(self) -> int:
        """Takes part in the steps of the other workers, without examples, until all have come here.

        For workers that read data of their own, of which there may be more or fewer batches: each calls it after its
        last batch. Returns the number of steps that were done so.
        """
        if self._started and not self._several_workers:
            return 0
        for steps in itertools.count():
            if self(None).live == 0:
                return steps

    # The step, in the order of the picture ---------------------------------------------------------------------------

    def _step(self, inputs: tuple[list[Any], tf.Tensor], mode: str, fused: bool) -> dict[str, Any]:
        """The whole step, on all replicas of this worker."""
        shares, word = inputs
        local = self.comm.run(self._accumulate, (shares, mode))
        reached = self._reached(local)
        gradients, statistics, report = self.comm.run(self._all_reduce, (local, word, reached))
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
            compiled=mode,
            all_reduce=self.comm.all_reduce if self._lockstep else None,
        )
        sums = accumulate(
            micro_batch,
            shares[replica - self.comm.rank],
            self._parts,
            self._state,
            first_index=replica * self._parts,
            may_be_empty=self.comm.size > 1,
            lockstep=self._lockstep,
        )
        self._moving = [self._state.statistics[i] for i in micro_batch.updated]
        return sums._replace(statistics=[sums.statistics[i] for i in micro_batch.updated])

    def _all_reduce(self, local: Sums, word: tf.Tensor, reached: list[bool]) -> tuple[list, list, dict]:
        """Adds up all replicas and divides once: the gradient of the whole batch, the same bits everywhere."""
        variables, gradients = self._with_gradient(reached), list(itertools.compress(local.gradients, reached))
        kinds = itertools.compress(self._kinds, reached)
        gradients = [sparse.of_kind(*args) for args in zip(kinds, gradients, variables, strict=True)]
        flags = self._flags(local, gradients, word)
        if self.before_reduce:
            gradients = self._transform_own(gradients, variables, local.scalars)

        sums, flags, waited = self._sum_over_replicas(local._replace(gradients=gradients), flags)

        gradients = [tf.cast(g, v.dtype) for g, v in zip(sums.gradients, variables, strict=True)]
        gradients = [sparse.deduplicate(g) for g in self._divide(gradients, sums.scalars)]
        return gradients, sums.statistics, {**self._report(gradients, sums.scalars, flags), "waited": waited}

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

    @property
    def _holds_whole_batch(self) -> bool:
        return self.comm.size == 1 and self._parts == 1 and not self.before_reduce

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

    def _sum_over_replicas(self, local: Sums, flags: dict) -> tuple[Sums, dict, tf.Tensor]:
        """One all-reduce for everything: weights, losses, metrics and flags ride along with the gradients.

        Also returns the seconds from this worker's last gradient to the end of the all-reduce; 0 where there is no other.
        """
        if self.comm.size == 1:
            return local, flags, tf.constant(0.0, tf.float64)
        ready = self._time_of(local.gradients, flags["broken"])
        examples, chief = local.scalars["examples"], self.comm.replica_id() == 0
        # Moments average by number of examples; a counter is taken from the first replica.
        shares = [s * tf.cast(examples, s.dtype) if s.dtype.is_floating else s * int(chief) for s in local.statistics]
        riders = (local.scalars, flags, shares)
        # Gradients come into being from the last variable to the first; riders know of all, and are in the last bucket.
        count = len(tf.nest.flatten(riders))
        reduced = self.comm.all_reduce([*tf.nest.flatten(riders), *local.gradients], "sum")
        scalars, flags, shares = tf.nest.pack_sequence_as(riders, reduced[:count])
        waited = self._time_of(reduced, flags["live"]) - ready
        divide = tf.math.divide_no_nan
        statistics = [divide(s, tf.cast(scalars["examples"], s.dtype)) if s.dtype.is_floating else s for s in shares]
        return Sums(reduced[count:], scalars, statistics), flags, waited

    def _time_of(self, tensors: list, number: tf.Tensor) -> tf.Tensor:
        """When the tensors are there, in seconds; 0 where no other worker is waited for. `number` depends on them.

        An op on a GPU counts as done as soon as the GPU is told to do it. A number made from its result that an op on the
        CPU has read is really known: the time is taken behind that.
        """
        if not self._several_workers:
            return tf.constant(0.0, tf.float64)
        with tf.device("CPU"), tf.control_dependencies(tf.nest.flatten(tensors, expand_composites=True)):
            known = tf.identity(number)
        # Not tf.timestamp, which is stateful: TensorFlow runs such ops in the order in which they were written, so that no
        # collective written after it would begin before all gradients are there.
        clock = tf.numpy_function(lambda known: time.perf_counter(), [known], tf.float64, stateful=False)
        clock.set_shape([])
        return clock

    def _flags(self, local: Sums, gradients: list, word: tf.Tensor) -> dict[str, tf.Tensor]:
        """What this replica knows and the others do not, as numbers that can be added up.

        "live": 1 if its worker brought a batch; "stop": 1 if it was asked to end; "regroup": 1 if it has heard of other
        hosts; "present" [variables]: 1 where the loss of
        that reaches the variable; "broken" [size]: 1 at its own place if its gradients or its loss are not finite.
        """
        replica, (live, stop, regroup) = self.comm.replica_id(), tf.unstack(word, 3)
        speaks = float(replica == self.comm.rank)  # one replica for its worker
        flags = {
            "live": live * speaks,
            "stop": stop * speaks,
            "regroup": regroup * speaks,
            "present": live * tf.constant([float(g is not None) for g in local.gradients]),
            "broken": tf.zeros([self.comm.size]),
        }
        if self.comm.size > 1:  # else the check of the whole sees the same, and is spared a pass over the gradients
            finite = tf.math.is_finite(tf.add_n([local.scalars["total"], *sparse.square_sums(gradients)]))
            mine = 1.0 - tf.cast(finite, tf.float32)
            flags["broken"] = tf.one_hot(replica, self.comm.size, on_value=mine, off_value=0.0)
        return flags

    def _report(self, gradients: list, scalars: dict, flags: dict) -> dict[str, Any]:
        squares = tf.stack(sparse.square_sums(gradients))
        norm = tf.sqrt(tf.reduce_sum(squares))
        finite = tf.math.is_finite(norm) & tf.math.is_finite(scalars["total"])
        violations = tf.add_n([tf.constant(0.0), *scalars["checks"].values()])
        # A later batch may reach other variables than those that the workers have agreed on.
        present, foreseen = flags["present"] > 0, tf.constant([kind != "none" for kind in self._kinds])
        unforeseen = present & ~foreseen if self.on_none == "zeros" else tf.not_equal(present, foreseen)
        unforeseen &= flags["live"] > 0
        return {
            "loss": tf.math.divide_no_nan(scalars["total"], scalars["weight"]),
            "weight": scalars["weight"],
            "examples": scalars["examples"],
            "grad_norm": norm,
            "metrics": {name: tf.math.divide_no_nan(*pair) for name, pair in scalars["metrics"].items()},
            "applied": finite & (scalars["weight"] > 0) & tf.equal(violations, 0) & ~tf.reduce_any(unforeseen),
            "finite": finite,
            "checks": scalars["checks"],
            "broken_gradients": ~tf.math.is_finite(squares),
            "broken_replicas": flags["broken"] if self.comm.size > 1 else tf.stack([~finite]),
            "live": flags["live"],
            "stop": flags["stop"] > 0,
            "regroup": flags["regroup"] > 0,
            "unforeseen": unforeseen,
        }

    def _reached(self, local: Sums) -> list[bool]:
        """For each variable whether it takes part: a None on some replicas only is a zero there."""
        by_replica = [sums.gradients for sums in self.comm.local_values(local)]
        kinds = [agreement.kind_of(gradients) for gradients in zip(*by_replica, strict=True)]
        # One worker alone may trace again; with several, all agree in the first trace, and the flags tell of changes.
        if self._kinds is None or not self._several_workers:
            kinds = agreement.agree_on_kinds(self.comm, kinds if self._live else ["none"] * len(kinds))
        else:
            kinds = self._kinds
        unreached = [name_of(v) for v, kind in zip(self.variables, kinds, strict=True) if kind == "none"]
        if len(unreached) == len(kinds) or (unreached and self.on_none == "error"):
            raise GradientError(
                f"the loss does not reach {', '.join(unreached)}: leave them out with variables=, "
                "or say on_none='zeros' or on_none='skip'"
            )
        self._kinds = kinds
        return [kind != "none" or self.on_none != "skip" for kind in kinds]

    def _with_gradient(self, reached: list[bool]) -> list[Variable]:
        return list(itertools.compress(self.variables, reached))

    # Getting ready, and saying what went wrong -----------------------------------------------------------------------

    def _start(self, shares: list[Any] | None, root: int = 0) -> None:
        """Before the first step: the same model, the same settings and the same weights on every worker."""
        specs = None if shares is None else tf.nest.map_structure(tf.type_spec_from_value, shares[0])
        known = [specs for specs in self.comm.all_gather_object(specs) if specs is not None]
        if not known:
            raise DataError("no worker has a batch to train on: the data set is empty")
        self._empty_shares = [tf.nest.map_structure(_empty, known[0])] * len(shares or [None])
        if not self._prepared:
            self._build_model((shares or self._empty_shares)[0])
            self._prepare()
        self._several_workers = len(self.comm.all_gather_object(None)) > 1
        everything = [*self._state.statistics, *self._state.seeds, *getattr(self.model, "trainable_variables", [])]
        everything += [*self.variables, *self.optimizer.variables]
        everything += [v for m in (self._loss_scale, self.before_reduce, self.after_reduce) if m for v in m.variables]
        self._same_everywhere = list({id(v): v for v in everything}.values())
        if self._several_workers:
            options = ("accumulate", "on_none", "on_nonfinite", "check_every", "on_drift", "optimizer", "loss_fn")
            facts = {name: getattr(self, name) for name in options}
            facts |= {"before_reduce": self.before_reduce.transforms, "after_reduce": self.after_reduce.transforms}
            agreement.check_same(
                self.comm,
                agreement.facts_about(self.variables, self._same_everywhere, {**facts, "jit": self._jit_setting}),
            )
            self.comm.broadcast(self._same_everywhere, root)
        self._started, self._calls = True, 0
        names = ", ".join(map(name_of, self.variables[:3])) + (", ..." if len(self.variables) > 3 else "")
        self._waits_in = f"the all-reduce of {len(self.variables)} gradients ({names})"

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
        self._synchronized = any(getattr(layer, "synchronized", False) for layer in layers)
        with comm.scope():
            keras_optimizer.prepare(self.optimizer, self.variables, comm.owns)
            float16 = any(getattr(layer, "compute_dtype", None) == "float16" for layer in layers)
            self._loss_scale = LossScale(**self._loss_scaling) if float16 or self._loss_scaling else None
            self.before_reduce.build(self.variables)
            self.after_reduce.build(self.variables)
        self.micro_batches = self.accumulate * comm.size
        self._fit_to_group()
        self._prepared = True

    def _fit_to_group(self) -> None:
        """What depends on how many replicas there are."""
        self.micro_batches = self._micro_batches
        self._lockstep = self.comm.size > 1 and self._synchronized
        self._jit = JitChoice(self._jit_setting, not self._lockstep, self.comm.all_gather_object)
        self._forget_programs()

    def _forget_programs(self) -> None:
        """Traces anew, and agrees anew on which variables the loss reaches."""
        self._kinds: list[agreement.Kind] | None = None
        self._program = functools.cache(
            lambda plan: Program(functools.partial(self._step, mode=plan.tape, fused=plan.fused))
        )

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
        taking_part = [kind != "none" or self.on_none != "skip" for kind in self._kinds]
        names = ", ".join(name_of(v) for v in itertools.compress(self._with_gradient(taking_part), flags)) or "none"
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


def _empty(spec: tf.TypeSpec) -> Any:
    """No examples of what `spec` describes."""
    if isinstance(spec, tf.RaggedTensorSpec):
        return tf.RaggedTensor.from_row_splits(
            tf.zeros([0, *spec.shape[spec.ragged_rank + 1 :]], spec.dtype), tf.zeros([1], spec.row_splits_dtype)
        )
    return tf.zeros([0, *spec.shape[1:]], spec.dtype)


def _check_option(name: str, value: Any, known: tuple) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value!r}: use one of {', '.join(map(repr, known))}")
