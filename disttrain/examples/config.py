"""What the command line says to an example."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import keras

import disttrain as dt
from disttrain.comm import Communicator
from disttrain.data.batches import Batches
from disttrain.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Options of `disttrain train`.

    Attributes:
      batch_size: global: examples of one optimizer step, over all replicas and micro-batches.
      clip_norm: limit of the global gradient norm; None does not clip.
      precision: a Keras dtype policy.
      checkpoint_every: steps; None: checkpoints are written, if `resume` asks for them, at the end and on SIGTERM.
      resume: "auto" goes on from the newest checkpoint, if there is one.
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
    checkpoint_every: int | None = None
    resume: str = "never"
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

    def checkpointer(self, part: str = "") -> dt.Checkpointer | None:
        """In the folder `checkpoints` of the results; None where nobody has asked for checkpoints."""
        if self.resume == "never" and self.checkpoint_every is None:
            return None
        folder = self.out / "checkpoints" / part
        return dt.Checkpointer(folder, every_steps=self.checkpoint_every, resume=self.resume == "auto")

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


def batches(config: TrainConfig, examples: tuple, *, shuffle: bool = True) -> Batches:
    """Global batches of arrays; the last one may be smaller. Shuffled anew every epoch, the same way on every run."""
    count = len(examples[0])
    if config.batch_size > count and shuffle:
        raise ConfigError(f"--batch-size {config.batch_size} is more than the {count} examples there are")
    return Batches(tuple(examples), config.batch_size, shuffle=shuffle, seed=config.seed)
