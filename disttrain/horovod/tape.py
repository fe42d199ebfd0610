"""`DistributedGradientTape`: the gradient of all ranks together from `tf.GradientTape`."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import tensorflow as tf

from disttrain.horovod.compression import Compression
from disttrain.horovod.engine import hvd
from disttrain.horovod.optimizer import groups_from, make_reducer, variables_of

# What ranks have agreed on, by the options of a tape: there is a new tape in every step.
_agreed: dict[tuple, dict] = defaultdict(dict)


def DistributedGradientTape(  # noqa: N802
    gradtape: tf.GradientTape,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    op: Any = hvd.Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    process_set: Any = hvd.global_process_set,
    scale_local_gradients: bool = True,
) -> tf.GradientTape:
    """A tape with what `gradtape` has recorded or will record, whose gradients are those of all ranks.

    A gradient that is None on some ranks only counts as zero there. For the arguments see `DistributedOptimizer`.
    """
    options = {
        "compression": compression,
        "sparse_as_dense": sparse_as_dense,
        "op": op,
        "predivide": gradient_predivide_factor,
        "process_set": process_set,
    }
    cls = type(type(gradtape).__name__, (_DistributedTape, type(gradtape)), {})
    tape = cls.__new__(cls)
    tape.__dict__ = gradtape.__dict__
    tape._reducer = make_reducer(
        **options,
        groups=groups_from(num_groups, groups),
        scale_local=scale_local_gradients,
        agreed=_agreed[tuple(options.values())],
    )
    return tape


def PartialDistributedGradientTape(  # noqa: N802
    gradtape: tf.GradientTape,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    op: Any = hvd.Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    process_set: Any = hvd.global_process_set,
    local_layers: Any = None,
    scale_local_gradients: bool = True,
) -> tf.GradientTape:
    """`DistributedGradientTape` that leaves the gradients of `local_layers` to each rank."""
    tape = DistributedGradientTape(
        gradtape,
        device_dense,
        device_sparse,
        compression,
        sparse_as_dense,
        op,
        gradient_predivide_factor,
        num_groups,
        groups,
        process_set,
        scale_local_gradients,
    )
    for variable in variables_of(local_layers):
        tape.register_local_source(variable)
    return tape


class _DistributedTape:
    """Mixed into the class of a tape."""

    def register_local_source(self, source: Any) -> None:
        """Leaves the gradient of a variable to this rank."""
        self._reducer.register(source)

    def gradient(
        self,
        target: Any,
        sources: Any,
        output_gradients: Any = None,
        use_generic_names: bool = False,
        unconnected_gradients: tf.UnconnectedGradients = tf.UnconnectedGradients.NONE,
    ) -> Any:
        """As `tf.GradientTape.gradient`, over all ranks. `use_generic_names` changes nothing: names are generic."""
        gradients = super().gradient(target, sources, output_gradients, unconnected_gradients)
        flat = tf.nest.flatten(sources)
        aligned = self._reducer.align(tf.nest.flatten(gradients), flat)
        return tf.nest.pack_sequence_as(sources, self._reducer.reduce(aligned, flat))

    def get_local_and_global_gradients(
        self, target: Any, sources: Any, output_gradients: Any = None, use_generic_names: bool = False
    ) -> tuple[list, list]:
        """(source, gradient) of this rank's own sources, and of the others."""
        pairs = list(zip(sources, self.gradient(target, sources, output_gradients, use_generic_names), strict=True))
        local = [pair for pair in pairs if self._reducer.is_local(pair[0])]
        return local, [pair for pair in pairs if not self._reducer.is_local(pair[0])]
