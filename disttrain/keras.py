"""`DistributedOptimizer`: a Keras optimizer for many ranks, in `model.fit` and in loops of one's own.

    gradients of this rank -> accumulate -> all-reduce -> Keras's clipping -> Keras's update
          (worker)            (worker)       (all)                (same on all)

It stays what it is: the optimizer's own class with `apply` told to reduce first, so that it is configured, saved and loaded
like any other. `TrainStep` does more, and exactly for uneven batches, too; this is for code that is built on `fit`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import keras
import tensorflow as tf
from tensorflow.python.ops import control_flow_util

from disttrain import agreement
from disttrain.comm.communicator import Communicator
from disttrain.errors import ConfigError
from disttrain.gradients import moments, sparse
from disttrain.types import Gradient, Variable, name_of, tf_variable

_NO_XLA = (
    "gradients of a DistributedOptimizer are reduced between processes, which XLA cannot compile: "
    "leave jit_compile=True out of model.compile, and out of a tf.function that applies gradients"
)


def DistributedOptimizer(  # noqa: N802, the name that Horovod's users know
    optimizer: keras.optimizers.Optimizer,
    comm: Communicator,
    *,
    backward_passes_per_step: int = 1,
    op: Literal["mean", "sum", "adasum"] = "mean",
    sparse_as_dense: bool = False,
) -> keras.optimizers.Optimizer:
    """Makes a Keras optimizer reduce its gradients over all ranks before it clips and applies them.

    Every rank calls `apply` equally often, with gradients of the same variables. With batches of one size on all ranks
    and "mean", the update is that of one device on the joined batch. Start from equal weights: `comm.broadcast(...)`, or
    `dt.callbacks.Broadcast(comm)` in `fit`.

    From then on layers with `BatchNormalization(synchronized=True)` take their moments over all ranks, each example with the
    same weight.

    In a `tf.distribute` engine ("mirrored", "multiworker") it is used inside `comm.run` or in `fit`. Keras's loss objects
    divide by the number of replicas there, which `fit` takes into account; in a loop of one's own say op="sum" for them.

    Args:
      optimizer: any Keras optimizer, built or not. It is changed itself, keeps its state, and is what is returned.
        A `LossScaleOptimizer` goes inside: all ranks then skip and rescale together.
      comm: from `disttrain.init`.
      backward_passes_per_step: gradients of so many calls of `apply` are averaged on this rank, and only then reduced
        and applied. Slots, `iterations` and schedules move on with these steps alone.
      op: how gradients of the ranks become one; "adasum" (Maleki et al., 2020) on Horovod only, with 2, 4, 8, ... ranks.
      sparse_as_dense: gradients of embeddings travel as dense tensors, not as the rows they have.

    Returns:
      `optimizer`. Its `get_config` and what `model.save` writes are those of the plain optimizer.

    Raises:
      ConfigError: not a Keras optimizer, one that is distributed already or accumulates by itself, or an option that is
        unknown or that `comm` does not know.
    """
    if not isinstance(backward_passes_per_step, int) or backward_passes_per_step < 1:
        raise ConfigError(
            f"backward_passes_per_step={backward_passes_per_step!r}: a whole number of 1 or more is wanted"
        )
    check_op(op, comm)
    if comm.size > 1:
        moments.install(comm.all_reduce)
    return distribute(
        optimizer,
        lambda: Part(Reducer(comm, op, sparse_as_dense=sparse_as_dense), backward_passes_per_step),
    )


def check_op(op: str, comm: Communicator) -> None:
    """Raises `ConfigError` if `comm` cannot reduce gradients by `op`."""
    if op not in ("mean", "sum", "adasum"):
        raise ConfigError(f"op={op!r}: use 'mean', 'sum' or 'adasum'")
    if op not in comm.ops:
        raise ConfigError(
            f"op={op!r}: engine {comm.name!r}, as it was started, does not have it. Horovod has, started with mpirun; "
            "or use op='mean'"
        )
    if op == "adasum" and comm.size & (comm.size - 1):
        raise ConfigError(f"op='adasum' needs 2, 4, 8, ... ranks, not {comm.size}: use op='mean'")


class Reducer:
    """From the gradients of this rank to those of all ranks together.

    Every rank sends the same tensors in the same order, whatever is None where: ranks ask each other once what there is.

    Args:
      comm: the ranks.
      op: "mean", "sum" or "adasum".
      sparse_as_dense: whether IndexedSlices travel as dense tensors.
      ask: whether ranks ask each other. If not, a None is a zero on every rank.
      agreed: where the answers are kept, for reducers that share them.
    """

    def __init__(
        self,
        comm: Communicator,
        op: str,
        *,
        sparse_as_dense: bool = False,
        ask: bool = True,
        agreed: dict[tuple, list[agreement.Kind]] | None = None,
    ):
        self.comm, self.op, self.sparse_as_dense, self._ask = comm, op, sparse_as_dense, ask
        # Set where Keras has divided the loss by the number of replicas already.
        self.losses_are_divided = False
        self._agreed = {} if agreed is None else agreed

    def align(self, gradients: Sequence[Gradient], variables: Sequence[Variable]) -> list[Gradient]:
        """Gradients of the kinds that all ranks have agreed on: dense, rows, or None where no rank has one."""
        if self.sparse_as_dense:
            gradients = [sparse.densify(g, v) for g, v in zip(gradients, variables, strict=True)]
        mine = [agreement.kind_of([g]) for g in gradients]
        kinds = self._kinds(mine, variables)
        return [as_kind(*x) for x in zip(gradients, kinds, variables, strict=True)]

    def reduce(self, gradients: Sequence[Gradient], variables: Sequence[Variable]) -> list[Gradient]:
        """All ranks together, the same bits on each; `gradients` come from `align`."""
        present = [g for g in gradients if g is not None]
        with self._waiting():
            reduced = iter(self._all_reduce(present) if present else [])
        return [None if g is None else sparse.deduplicate(next(reduced)) for g in gradients]

    def _kinds(self, mine: list[agreement.Kind], variables: Sequence[Variable]) -> list[agreement.Kind]:
        if not self._ask:
            return ["dense" if kind == "none" else kind for kind in mine]
        if self.comm.size == 1:
            return mine
        key = (_program(), *map(key_of, variables))
        agreed = self._agreed.get(key)
        # A function that is traced again may be so on one rank alone, so it must not ask again, unless there is a gradient
        # that no rank had before: then it is another function of the same name. Eager steps are done by all ranks.
        news = agreed is None or any(kind != "none" == before for kind, before in zip(mine, agreed, strict=True))
        if news or (tf.executing_eagerly() and "none" in agreed):
            agreed = self._agreed[key] = self._ask_all(mine, variables)
        return agreed

    def _ask_all(self, mine: list[agreement.Kind], variables: Sequence[Variable]) -> list[agreement.Kind]:
        facts = {"op": self.op, "number of variables": str(len(variables))}
        facts |= {f"variable {i}": f"{v.dtype} {tuple(v.shape)}" for i, v in enumerate(variables)}
        with tf.init_scope(), self._waiting():
            agreement.check_same(self.comm, facts)
            return agreement.agree_on_kinds(self.comm, mine)

    def _all_reduce(self, gradients: list) -> list:
        if self.op == "mean" and self.losses_are_divided:
            return self.comm.all_reduce(gradients, "sum")
        if not any(isinstance(g, tf.IndexedSlices) for g in gradients):
            return self.comm.all_reduce(gradients, self.op)
        if self.op == "adasum":
            raise ConfigError(
                "op='adasum' does not know gradients of embeddings (IndexedSlices): say sparse_as_dense=True"
            )
        sums = self.comm.all_reduce(gradients, "sum")
        return sums if self.op == "sum" else [sparse.map_values(self.divide, g) for g in sums]

    def divide(self, x: tf.Tensor) -> tf.Tensor:
        """By the number of ranks."""
        return x / self.comm.size

    def _waiting(self) -> contextlib.AbstractContextManager:
        eager = tf.executing_eagerly()
        return self.comm.waiting("the gradients of a step") if eager else contextlib.nullcontext()


class Accumulator:
    """Sums of gradients on this rank over the passes of one step.

    Its variables are not among the optimizer's: a saved model is that of the plain optimizer.

    Args:
      variables: those that the gradients are of.
      passes: number of passes in a step.
      average: whether a step has the mean of its passes; if not, their sum.
    """

    def __init__(self, variables: Sequence[Variable], passes: int, average: bool):
        self._variables, self._passes, self._average = list(variables), passes, average
        # By place: a variable for a dense sum; values and indices for rows.
        self._sums: dict[int, tuple[tf.Variable, ...]] = {}
        with tf.init_scope():
            self._done = tf.Variable(0, trainable=False, dtype=tf.int64)

    def add(self, gradients: Sequence[Gradient]) -> tf.Tensor:
        """Adds a pass; True if it was the last of its step."""
        for place, gradient in enumerate(gradients):
            if gradient is not None:
                self._add(place, gradient)
        self._done.assign_add(1)
        return tf.equal(self._done.read_value(), self._passes)

    def take(self) -> list[Gradient]:
        """What the step has come to; the next one begins at zero. None where no pass had a gradient."""
        self._done.assign(0)
        return [self._take(place) if place in self._sums else None for place in range(len(self._variables))]

    def _add(self, place: int, gradient: Gradient) -> None:
        variable = self._variables[place]
        if place not in self._sums:
            self._sums[place] = _sum_variables(gradient, variable)
        sums = self._sums[place]
        if len(sums) == 1:
            sums[0].assign_add(as_kind(gradient, "dense", variable))
            return
        rows = as_kind(gradient, "sparse", variable)
        for total, more in zip(sums, (rows.values, rows.indices), strict=True):
            total.assign(tf.concat([total.read_value(), more], axis=0))

    def _take(self, place: int) -> Gradient:
        sums = self._sums[place]
        taken = [tf.identity(total.read_value()) for total in sums]
        for total, value in zip(sums, taken, strict=True):
            total.assign(tf.zeros_like(value) if len(sums) == 1 else value[:0])
        if self._average:
            taken[0] /= self._passes
        if len(sums) == 1:
            return taken[0]
        return tf.IndexedSlices(*taken, tf.constant(list(self._variables[place].shape), tf.int64))


@dataclasses.dataclass
class Part:
    """What a distributed optimizer has besides what Keras gave it.

    Attributes:
      reducer: what makes one gradient of those of all ranks.
      passes: calls of `apply` for each step.
      average: whether gradients of the passes are averaged; if not, summed.
    """

    reducer: Reducer
    passes: int = 1
    average: bool = True
    accumulators: dict[tuple, Accumulator] = dataclasses.field(default_factory=dict)

    def accumulator(self, variables: Sequence[Variable]) -> Accumulator:
        """The one for these variables."""
        key = tuple(map(key_of, variables))
        if key not in self.accumulators:
            self.accumulators[key] = Accumulator(variables, self.passes, self.average)
        return self.accumulators[key]


class Distributed:
    """Mixed into the class of an optimizer by `distribute`: first all ranks' gradients, then all that Keras does.

    It has few names of its own, and long ones: optimizers have theirs.
    """

    _disttrain_new_part: Callable[[], Part]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._disttrain = self._disttrain_new_part()

    def apply(self, grads: Sequence[Gradient], trainable_variables: Sequence[Variable] | None = None) -> None:
        part = self._disttrain
        variables = list(self._trainable_variables if trainable_variables is None else trainable_variables)
        gradients = list(grads)
        if not gradients or len(gradients) != len(variables):
            super().apply(gradients, trainable_variables)  # Keras says what is wrong
            return
        _refuse(variables, part.passes)
        gradients = part.reducer.align(gradients, variables)
        if part.passes == 1 or all(g is None for g in gradients):
            self._disttrain_step(gradients, variables)
            return
        if not self.built:  # not inside tf.cond, where no variable can be made
            with keras.name_scope(self.name, caller=self):
                self.build(variables)
        accumulator = part.accumulator(variables)
        # Every rank has done as many passes, so all of them take the same branch.
        tf.cond(
            accumulator.add(gradients),
            lambda: self._disttrain_step(accumulator.take(), variables),
            lambda: None,
        )

    def _disttrain_step(self, gradients: list, variables: list) -> None:
        for inner in _inside(self):
            inner._all_reduce_sum_gradients = _as_given
        super().apply(self._disttrain.reducer.reduce(gradients, variables), variables)

    def _all_reduce_sum_gradients(self, grads_and_vars):
        return _as_given(grads_and_vars)

    def __setattr__(self, name: str, value: Any) -> None:
        # The one thing that a LossScaleOptimizer does to the optimizer that it is put around.
        if name == "loss_scale_factor" and value is None and "_iterations" in self.__dict__:
            raise ConfigError(
                "a LossScaleOptimizer around a DistributedOptimizer asks each rank alone whether gradients are finite: "
                "put it inside, DistributedOptimizer(LossScaleOptimizer(optimizer), comm)"
            )
        super().__setattr__(name, value)


def _refuse(variables: list, passes: int) -> None:
    graph = tf.compat.v1.get_default_graph()
    if not tf.executing_eagerly() and control_flow_util.GraphOrParentsInXlaContext(graph):
        raise ConfigError(_NO_XLA)
    if passes > 1 and tf.distribute.get_strategy().num_replicas_in_sync > 1:
        raise ConfigError(
            "backward_passes_per_step: tf.distribute allows no all-reduce in a branch: use TrainStep(accumulate=...)"
        )
    float8 = [name_of(v) for v in variables if getattr(v, "overwrite_with_gradient", False)]
    if float8:
        raise ConfigError(f"{float8[0]} is a float8 scale, which has no gradient to average: train in another dtype")


def distribute(
    optimizer: keras.optimizers.Optimizer, new_part: Callable[[], Part], mixin: type[Distributed] = Distributed
) -> keras.optimizers.Optimizer:
    """Gives an optimizer the class that is its own with `mixin` mixed in.

    Args:
      new_part: makes what it has besides, for it and for optimizers that are made from its config.
      mixin: `Distributed`, or a class made from it.
    """
    _check_optimizer(optimizer)
    adapt_compile()
    plain = type(optimizer)
    namespace = {
        "__doc__": plain.__doc__,
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        # What Keras writes into a saved model, so that it loads without disttrain.
        "__class__": property(lambda self: plain),
        "_disttrain_new_part": staticmethod(new_part),
    }
    _set_class(optimizer, type(plain.__name__, (mixin, plain), namespace))
    optimizer._disttrain = new_part()
    return optimizer


def _check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ConfigError(f"optimizer is {type(optimizer).__name__}; a keras.optimizers.Optimizer is wanted")
    for each in (optimizer, *_inside(optimizer)):
        if isinstance(each, Distributed):
            raise ConfigError("the optimizer is distributed already: give DistributedOptimizer a plain one")
        if each.gradient_accumulation_steps:
            raise ConfigError(
                "the optimizer has gradient_accumulation_steps, which moves schedules on micro-steps: "
                "leave it out and say backward_passes_per_step= to DistributedOptimizer"
            )


def _inside(optimizer: keras.optimizers.Optimizer) -> list[keras.optimizers.Optimizer]:
    """Optimizers that it hands its gradients to: those of a `LossScaleOptimizer` or a `MultiOptimizer`."""
    inner = getattr(optimizer, "inner_optimizer", None)
    direct = [inner] if inner is not None else list(getattr(optimizer, "optimizers", []))
    return [x for each in direct for x in (each, *_inside(each))]


def _as_given(grads_and_vars):
    """In the place of Keras's own sum over the replicas of `tf.distribute`, which comes after clipping."""
    return grads_and_vars


def _set_class(optimizer: keras.optimizers.Optimizer, cls: type) -> None:
    object.__dict__["__class__"].__set__(optimizer, cls)


# Gradients as all ranks send them ------------------------------------------------------------------------------------


def as_kind(gradient: Gradient, kind: agreement.Kind, variable: Variable) -> Gradient:
    """The gradient in the variable's dtype; None as zeros or as no rows where another rank has a gradient."""
    if kind == "none":
        return None
    return sparse.map_values(lambda x: tf.cast(x, variable.dtype), sparse.of_kind(kind, gradient, variable))


def _sum_variables(gradient: Gradient, variable: Variable) -> tuple[tf.Variable, ...]:
    with tf.init_scope():
        if not isinstance(gradient, tf.IndexedSlices):
            return (tf.Variable(tf.zeros(variable.shape, variable.dtype), trainable=False),)
        # As many rows as have come, more with every pass.
        row = list(variable.shape[1:])
        values = tf.Variable(tf.zeros([0, *row], variable.dtype), trainable=False, shape=[None, *row])
        return values, tf.Variable(tf.zeros([0], tf.int64), trainable=False, shape=[None])


def key_of(source: Variable | tf.Tensor) -> Any:
    """Tells variables apart; tensors, of which there are new ones in every step, by what they look like."""
    return getattr(tf_variable(source), "_unique_id", None) or (str(source.dtype), tuple(source.shape))


def _program() -> str:
    """Name of the outermost function that is being traced: the same when it is traced again; "" outside of any."""
    if tf.executing_eagerly():
        return ""
    graph, name = tf.compat.v1.get_default_graph(), ""
    while getattr(graph, "outer_graph", None) is not None:
        graph, name = graph.outer_graph, graph.name
    return name


# What `model.compile` is told ----------------------------------------------------------------------------------------


@functools.cache
def adapt_compile() -> None:
    """Keras chooses XLA and puts loss scaling around an optimizer without asking it, so `compile` is taught to ask.

    For optimizers that are not distributed nothing changes.
    """
    owner = next(cls for cls in keras.Model.__mro__ if "compile" in vars(cls))
    plain = owner.compile
    signature = inspect.signature(plain)

    @functools.wraps(plain)
    def compile(self, *args, **kwargs):
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        if isinstance(call.arguments["optimizer"], Distributed):
            _fit_for(self, call.arguments)
        return plain(*call.args, **call.kwargs)

    owner.compile = compile


def _fit_for(model: keras.Model, arguments: dict[str, Any]) -> None:
    """Changes the arguments of `compile` into those that go with a distributed optimizer."""
    optimizer = arguments["optimizer"]
    if arguments["jit_compile"] is True:
        raise ConfigError(_NO_XLA)
    arguments["jit_compile"] = False
    scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if arguments["auto_scale_loss"] and model.dtype_policy.name == "mixed_float16" and not scaled:
        optimizer = arguments["optimizer"] = _with_loss_scale(optimizer)
    if model.distribute_strategy.num_replicas_in_sync > 1:
        reducer = optimizer._disttrain.reducer
        if reducer.op != "mean":
            raise ConfigError(f"op={reducer.op!r}: Keras's fit on several replicas knows the mean alone")
        reducer.losses_are_divided = True


def _with_loss_scale(optimizer: Distributed) -> keras.optimizers.Optimizer:
    """What `compile` does for float16, with the reduction outermost."""
    part, mixin = optimizer._disttrain, type(optimizer).__mro__[1]
    _set_class(optimizer, optimizer.__class__)
    scaled = keras.optimizers.LossScaleOptimizer(optimizer, name="loss_scale_optimizer")
    return distribute(scaled, lambda: dataclasses.replace(part, accumulators={}), mixin)
