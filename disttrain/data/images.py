"""Folders of images, one folder for each class."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from disttrain.errors import DataError

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class ImageFolder:
    """Images by class. A `Source`: `read` returns (images float32 [k, h, w, channels] in 0 to 1, labels int32 [k]).

    Args:
      folder: with a folder for each class; images in folders within these are taken, too. What does not have an image's
        suffix is passed over.
      size: (h, w); images of another size are resized, bilinearly, and not cut.
      channels: 1 (grey), 3 (RGB) or 4 (RGBA).

    Attributes:
      classes: names of the folders, sorted; a label is a place in it.

    Raises:
      DataError: no such folder, no class in it, or a class without an image; when it is read, an image that cannot be.
    """

    def __init__(self, folder: str | os.PathLike, size: tuple[int, int], channels: int = 3):
        if channels not in _MODES:
            raise DataError(f"channels={channels}: use one of {', '.join(map(str, _MODES))}")
        self._size, self._channels = tuple(size), channels
        folder = Path(folder)
        try:
            folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        except OSError as error:
            raise DataError(f"cannot read the folder {folder}: {error.strerror}") from error
        if not folders:
            raise DataError(f"{folder} holds no folders: it needs one for each class, with its images")
        self.classes = [path.name for path in folders]
        by_class = [_images_in(path) for path in folders]
        self._paths = [path for paths in by_class for path in paths]
        self._labels = np.repeat(np.arange(len(folders), dtype=np.int32), [len(paths) for paths in by_class])
        # Each image is a file of its own: there is nothing to be gained by reading neighbours.
        self.files = [len(self._paths)]

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images = np.empty((len(places), *self._size, self._channels), np.float32)
        for row, place in enumerate(places):
            images[row] = self._image(self._paths[place])
        return images, self._labels[places]

    def _image(self, path: Path) -> np.ndarray:
        """float32 [h, w, channels] in 0 to 1."""
        height, width = self._size
        try:
            with Image.open(path) as image:
                if image.mode.startswith(("I", "F")):  # Pillow would cut off all that is above 255
                    raise ValueError("it has more than 8 bits a channel")
                image = image.convert(_MODES[self._channels])
        except Exception as error:  # decoders raise whatever they stumble over
            raise DataError(
                f"cannot read the image {path}: {error}; replace it, or take it out of the folder"
            ) from error
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(image, np.float32) / np.float32(255)
        return pixels.reshape(height, width, self._channels)


def _images_in(folder: Path) -> list[Path]:
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    if not paths:
        raise DataError(f"{folder} is a class without an image: put some there, or take the folder away")
    return paths
