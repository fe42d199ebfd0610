"""One micro-batch: the loss and its gradients, as a pure function of the examples and the model's state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from disttrain.errors import ConfigError
from disttrain.gradients import moments, sparse
from disttrain.types import Gradient, Loss, Variable, as_loss, tf_variable


class Sums(NamedTuple):
    """What micro-batches and replicas add up.

    Attributes:
      gradients: one for each variable, None where the loss does not reach it.
      scalars: "total", "weight", "examples" (float32 scalars), "metrics" (name -> pair), "checks" (sentence -> count).
      statistics: new values of the state that the forward pass updated (BatchNormalization's moving moments).
    """

    gradients: list[Gradient]
    scalars: dict[str, Any]
    statistics: list[tf.Tensor]


class ModelState:
    """The variables of a model that a forward pass changes although no gradient reaches them.

    Inside the tape they are values that go in and come out, not variables that are assigned: so the tape can run in
    a loop, under XLA and on every replica, and a step that is skipped has changed nothing. Keras calls this a
    stateless scope.

    Attributes:
      seeds: states of Keras seed generators (dropout), int64 [2] each.
      statistics: all other non-trainable variables of the model.
    """

    def __init__(self, model: Any):
        kept = [v for v in getattr(model, "non_trainable_variables", []) if isinstance(v, keras.Variable)]
        self.seeds = [v for v in kept if v.name == "seed_generator_state"]
        self.statistics = [v for v in kept if v.name != "seed_generator_state"]

    def seeds_for(self, micro_batch: tf.Tensor) -> list[tf.Tensor]:
        """Seeds of one micro-batch, numbered over all replicas: each one draws its own noise."""
        fold_in = tf.random.experimental.stateless_fold_in
        return [fold_in(tf.convert_to_tensor(v.value), tf.cast(micro_batch, tf.int64)) for v in self.seeds]

    def advance_seeds(self) -> None:
        """Moves every seed on by one step; the same on all replicas."""
        for v in self.seeds:
            v.assign(v.value + tf.constant([0, 1], v.value.dtype))


class MicroBatch:
    """Computes the `Sums` of one micro-batch; made anew for every replica and trace.

    Attributes:
      variables: as given.
      updated: which of `state.statistics` the forward pass changes; known once it was traced.

    Args:
      loss_fn: (model, batch) -> `Loss` or per-example losses.
      model: passed to `loss_fn`.
      variables: whose gradients are computed. Nothing else is watched, so frozen variables cost nothing.
      state: of the model.
      loss_scale: for float16, float32 scalar: gradients come out that much larger. None: no scaling.
      mean: divides by this micro-batch's weight already before the backward pass. Right only where this is the
        whole batch: it spares one pass over all gradients.
      compiled: "xla" or "graph": a function of its own, which can be called in a loop.
      all_reduce: for layers inside that take moments over all replicas. There is then no function of its own, and every
        replica must come here equally often, if need be without examples.
    """

    def __init__(
        self,
        loss_fn: Callable,
        model: Any,
        variables: Sequence[Variable],
        state: ModelState,
        *,
        loss_scale: tf.Tensor | None = None,
        mean: bool = False,
        compiled: str = "graph",
        all_reduce: moments.AllReduce | None = None,
    ):
        self._loss_fn, self._model, self.variables, self._state = loss_fn, model, list(variables), state
        self._loss_scale, self._mean = loss_scale, mean
        self.updated: list[int] = []
        self._call = tf.function(self._tape, jit_compile=compiled == "xla", autograph=False)
        if all_reduce is not None:
            self._call = functools.partial(self._tape_together, all_reduce)

    def __call__(self, batch: Any, statistics: Sequence[tf.Tensor], seeds: Sequence[tf.Tensor]) -> Sums:
        """Sums of these examples. `statistics` are values for `state.statistics`; so many come back, too."""
        sums = self._call(batch, list(statistics), list(seeds))
        new = list(statistics)
        for index, value in zip(self.updated, sums.statistics, strict=True):
            new[index] = value
        return sums._replace(statistics=new)

    def outline(self, batch: Any) -> Sums:
        """Sums whose tensors are known by shape and dtype only. Traces the function; with `all_reduce` there is none.

        Of the statistics only those are there that the forward pass changes: `updated` says which.
        """
        specs = tf.nest.map_structure(tf.type_spec_from_value, batch)
        statistics, seeds = (
            [tf.TensorSpec(v.shape, v.dtype) for v in vs] for vs in (self._state.statistics, self._state.seeds)
        )
        return self._call.get_concrete_function(specs, statistics, seeds).structured_outputs

    def _tape_together(self, all_reduce, batch, statistics, seeds) -> Sums:
        """The tape in step with the other replicas. Without examples, it runs on one of zeros that counts nothing.

        Not on none: TensorFlow's convolutions give a wrong shape then (2.21 with oneDNN), and so would their moments.
        """
        examples = count_examples(batch)
        present = tf.cast(examples > 0, tf.float32)
        batch = tf.nest.map_structure(lambda x: tf.cond(examples > 0, lambda: x, lambda: _one_like(x)), batch)
        with moments.synchronized(all_reduce, present):
            sums = self._tape(batch, statistics, seeds, present)
        return sums._replace(scalars=tf.nest.map_structure(lambda x: tf.math.multiply_no_nan(x, present), sums.scalars))

    def _tape(self, batch, statistics, seeds, present=None) -> Sums:
        known = self._state.statistics + self._state.seeds
        watched = [tf_variable(v) for v in self.variables]
        with _RecordingScope(zip(known, statistics + seeds, strict=True)) as scope:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(watched)
                loss = as_loss(self._loss_fn(self._model, batch))
            gradients = tape.gradient(loss.total, watched, output_gradients=self._seed(loss, present))
        gradients = [sparse.densify_small(g, v) for g, v in zip(gradients, self.variables, strict=True)]
        if self._loss_scale is not None and not self._mean:
            gradients = [sparse.map_values(lambda x: x * tf.cast(loss.weight, x.dtype), g) for g in gradients]
        scope.refuse_unknown(known)
        self.updated = [i for i, v in enumerate(self._state.statistics) if v in scope]
        scalars = {
            "total": loss.total,
            "weight": loss.weight,
            "examples": tf.cast(count_examples(batch), tf.float32),
            "metrics": dict(loss.metrics),
            "checks": dict(loss.checks),
        }
        new = [scope.get_current_value(self._state.statistics[i]) for i in self.updated]
        return Sums(gradients, scalars, new)

    def _seed(self, loss: Loss, present: tf.Tensor | None) -> tf.Tensor:
        """What the backward pass starts from: 1 gives the gradient of the sum, 0 where the example counts nothing.

        Under a loss scale it starts from the mean, since float16 has no room for the sums of large batches; the weight
        is put back in float32.
        """
        present = tf.constant(1.0) if present is None else present
        if self._loss_scale is None and not self._mean:
            return present
        return tf.math.divide_no_nan(present * (1.0 if self._loss_scale is None else self._loss_scale), loss.weight)


class _RecordingScope(keras.StatelessScope):
    """A stateless scope that remembers which variables were given new values."""

    def __init__(self, state_mapping):
        super().__init__(state_mapping=list(state_mapping))
        self._assigned: list[keras.Variable] = []

    def add_update(self, update):
        self._assigned.append(update[0])
        super().add_update(update)

    def get_current_value(self, variable):
        # Keras asks here for the weights that regularizers penalize, and takes None for their value.
        value = super().get_current_value(variable)
        return variable._value if value is None else value

    def __contains__(self, variable):
        return any(variable is v for v in self._assigned)

    def refuse_unknown(self, known):
        lost = [v.path for v in self._assigned if not any(v is k for k in known)]
        if lost:
            raise ConfigError(
                f"loss_fn changes variables that are not among the model's non_trainable_variables: {', '.join(lost)}. "
                "Make them attributes of the model; give random functions a keras.random.SeedGenerator that it holds"
            )


def _one_like(x: Any) -> Any:
    """One example of zeros; a ragged one has no rows."""
    if isinstance(x, tf.RaggedTensor):
        spec = tf.type_spec_from_value(x)
        values = tf.zeros([0, *spec.shape[spec.ragged_rank + 1 :]], x.dtype)
        return tf.RaggedTensor.from_nested_row_splits(
            values,
            [tf.constant([0, 0], spec.row_splits_dtype)]
            + [tf.constant([0], spec.row_splits_dtype)] * (spec.ragged_rank - 1),
        )
    return tf.zeros(tf.concat([[1], tf.shape(x)[1:]], 0), x.dtype)


def count_examples(batch: Any) -> tf.Tensor:
    """Number of examples in a nest of tensors [examples, ...], int scalar."""
    first = tf.nest.flatten(batch)[0]
    return first.nrows() if isinstance(first, tf.RaggedTensor) else tf.shape(first)[0]
