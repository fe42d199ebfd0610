"""Checkpoints: written in the background, whole or not at all, verified when they are read."""

from disttrain.checkpoint.checkpointer import Checkpointer, Saved
from disttrain.checkpoint.preemption import Preemption

__all__ = ["Checkpointer", "Preemption", "Saved"]
