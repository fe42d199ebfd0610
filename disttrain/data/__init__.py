"""Real data that is on every machine: scikit-learn's digits, and text."""

from disttrain.data.batches import Batches

__all__ = ["Batches"]
