"""What gradients are cast to on the way. Horovod's names; no sum of ranks overflows."""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from disttrain.horovod.engine import hvd


class Compressor:
    """What a compression of one's own provides, too."""

    @staticmethod
    def compress(tensor: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """The tensor as it travels, and what `decompress` needs to know."""
        raise NotImplementedError

    @staticmethod
    def decompress(tensor: tf.Tensor, ctx: Any) -> tf.Tensor:
        """The tensor as it was."""
        raise NotImplementedError


class NoneCompressor(Compressor):
    """Tensors travel as they are."""

    @staticmethod
    def compress(tensor):
        return tensor, None

    @staticmethod
    def decompress(tensor, ctx):
        return tensor


class FP16Compressor(Compressor):
    """float32 and float64 travel as float16, each rank's share made so small that the sum of all ranks is in range.

    bfloat16 stays what it is: it has the same size.
    """

    @staticmethod
    def compress(tensor):
        if tensor.dtype not in (tf.float32, tf.float64):
            return tensor, None
        # A power of two, so that scaling loses no bit.
        scale = 2.0 ** math.ceil(math.log2(hvd.size()))
        return tf.cast(tensor / scale, tf.float16), (tensor.dtype, scale)

    @staticmethod
    def decompress(tensor, ctx):
        if ctx is None:
            return tensor
        dtype, scale = ctx
        return tf.cast(tensor, dtype) * scale


class Compression:
    """Compressions by name."""

    none = NoneCompressor
    fp16 = FP16Compressor


def is_none(compression: Any) -> bool:
    """Whether tensors travel as they are; Horovod's own class is known, too."""
    return compression in (NoneCompressor, hvd.Compression.none)


def is_fp16(compression: Any) -> bool:
    """Whether it is the float16 of this module or of Horovod's."""
    return compression in (FP16Compressor, hvd.Compression.fp16)
