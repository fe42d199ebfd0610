"""What the command line says to an example."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

import disttrain as dt
from disttrain.comm import Communicator
from disttrain.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Options of `disttrain train`.

    Attributes:
      batch_size: global: examples of one optimizer step, over all replicas and micro-batches.
      clip_norm: limit of the global gradient norm; None does not clip.
      precision: a Keras dtype policy.
    """

    out: Path
    backend: str = "auto"
    replicas: int | None = None
    batch_size: int = 64
    accumulate: int = 1
    epochs: int | None = None
    steps: int | None = None
    lr: float = 1e-3
    clip_norm: float | None = 1.0
    precision: str = "float32"
    seed: int = 0
    text: Path | None = None

    def __post_init__(self):
        if not self.lr > 0:
            raise ConfigError(f"--lr {self.lr}: must be above zero")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"--clip-norm {self.clip_norm}: must be above zero, or 0 for no clipping")

    def length(self) -> dict[str, int | None]:
        """For `Trainer.fit`: as many steps as asked for, else as many epochs."""
        return {"steps": self.steps} if self.steps else {"epochs": self.epochs}

    def total_steps(self, steps_per_epoch: int) -> int:
        """For learning-rate schedules, which count optimizer steps, however many micro-batches and replicas there are."""
        return self.steps or (self.epochs or 1) * steps_per_epoch

    def transforms(self) -> list[dt.transforms.Transform]:
        """For `after_reduce`."""
        return [dt.transforms.clip_by_global_norm(self.clip_norm)] if self.clip_norm else []

    def as_dict(self) -> dict[str, Any]:
        """The exact configuration, ready for JSON."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}


def start(config: TrainConfig) -> Communicator:
    """Joins the group, and sets seeds and precision, before anything is built."""
    comm = dt.init(config.backend, replicas=config.replicas)
    keras.utils.set_random_seed(config.seed)
    keras.config.set_dtype_policy(config.precision)
    return comm


def batches(config: TrainConfig, examples: tuple, *, shuffle: bool = True) -> tf.data.Dataset:
    """Global batches of arrays; the last one may be smaller. Shuffled anew every epoch, the same way on every run."""
    count = len(examples[0])
    if config.batch_size > count and shuffle:
        raise ConfigError(f"--batch-size {config.batch_size} is more than the {count} examples there are")
    dataset = tf.data.Dataset.from_tensor_slices(tuple(examples))
    if shuffle:
        dataset = dataset.shuffle(count, seed=config.seed)
    return dataset.batch(config.batch_size)
