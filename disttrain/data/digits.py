"""1,797 real images of handwritten digits, 8 x 8, from scikit-learn (Alpaydin and Kaynak, UCI, 1998)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

_HELD_OUT = 0.2


class Split(NamedTuple):
    """Images float32 [n, 8, 8, 1] in 0 to 1, and labels int32 [n]."""

    images: np.ndarray
    labels: np.ndarray

    def only(self, digits: range) -> Split:
        """The images of these digits."""
        kept = np.isin(self.labels, list(digits))
        return Split(self.images[kept], self.labels[kept])


def load(seed: int = 0) -> tuple[Split, Split]:
    """A training part and a held-out fifth, with every digit in the same proportion in both."""
    data = load_digits()
    images = (data.images / 16.0).astype("float32")[..., np.newaxis]
    labels = data.target.astype("int32")
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=_HELD_OUT, stratify=labels, random_state=seed
    )
    return Split(train_x, train_y), Split(test_x, test_y)
