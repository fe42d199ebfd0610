"""Small pieces that change gradients, one idea each; `chain` composes them.

A transform is a function of (gradients, variables) that returns gradients: lists of equal length, each gradient a
tensor of its variable's shape, or IndexedSlices without repeated rows, or None. One that keeps state is a
`tf.Module` with `build(variables)`, which `TrainStep` calls once in the communicator's scope.
"""

from disttrain.gradients.transforms.cast import cast
from disttrain.gradients.transforms.chain import Transform, chain
from disttrain.gradients.transforms.clip import clip_by_global_norm, clip_by_norm, clip_by_value
from disttrain.gradients.transforms.monitor import monitor
from disttrain.gradients.transforms.noise import add_noise
from disttrain.gradients.transforms.scale import centralize, scale_by_layer
from disttrain.gradients.transforms.select import freeze, only

__all__ = [
    "Transform",
    "add_noise",
    "cast",
    "centralize",
    "chain",
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_by_value",
    "freeze",
    "monitor",
    "only",
    "scale_by_layer",
]
