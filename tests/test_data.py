"""The data that is on every machine."""

import numpy as np
import pytest

from disttrain.data import digits, text
from disttrain.errors import DataError


def test_digits_are_split_without_overlap_and_in_proportion():
    train, held_out = digits.load()
    assert (len(train.images), len(held_out.images)) == (1437, 360)
    assert train.images.shape[1:] == (8, 8, 1)
    assert (train.images.min(), train.images.max()) == (0.0, 1.0)
    seen = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in seen for image in held_out.images) == 0
    assert np.bincount(held_out.labels).min() >= 34
    assert set(train.only(range(5)).labels) == set(range(5))


def test_windows_predict_the_next_byte():
    content = np.arange(25, dtype=np.uint8)
    inputs, following = text.windows(content, 8)
    assert inputs.shape == following.shape == (3, 8)
    assert (following == inputs + 1).all()
    assert len(text.windows(content, 8, limit=2)[0]) == 2
    with pytest.raises(DataError, match="the text has 25 bytes; at least 26 are needed"):
        text.windows(content, 25)


def test_the_standard_library_is_a_text():
    content = text.read()
    assert len(content) > 3_000_000
    assert b"def " in content[:1_000_000].tobytes()


def test_unusable_texts(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(DataError, match="empty is empty"):
        text.read(tmp_path / "empty")
    with pytest.raises(DataError, match="Is a directory"):
        text.read(tmp_path)
