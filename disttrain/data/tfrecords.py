"""TFRecord files, read in any order.

A file is a row of records, each uint64 length, masked CRC-32C of the length, bytes, masked CRC-32C of the bytes (TensorFlow,
`core/lib/io/record_writer.h`). Lengths alone are enough to know where each begins. TensorFlow's own reader at offsets
refills a buffer of megabytes for each record.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
from array import array
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import tensorflow as tf

from disttrain.data.source import Paths, find
from disttrain.errors import DataError

_HEADER, _FOOTER = struct.Struct("<QI"), struct.Struct("<I")


class TFRecords:
    """Records of `tf.train.Example`. A `Source`: `read` returns what `tf.io.parse_example` makes of them, name -> tensor.

    Lengths of records are read when it is made, on every rank: a read of 12 bytes for each record.

    Args:
      paths: a file or a pattern ("data/train-*.tfrecord"), or several. On local or mounted disks, not compressed.
      features: name -> `tf.io.FixedLenFeature`, `RaggedFeature` and the like.

    Raises:
      DataError: no file, one that cannot be read, that is compressed, cut off or corrupt. What is corrupt within a record
        is found when it is read.
    """

    def __init__(self, paths: Paths, features: Mapping[str, Any]):
        self._paths, self._features = find(paths), dict(features)
        with ThreadPoolExecutor() as pool:
            self._offsets = list(pool.map(_offsets, self._paths))
        self.files = [len(offsets) - 1 for offsets in self._offsets]
        self._starts = np.cumsum([0, *self.files])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, places: np.ndarray) -> dict[str, Any]:
        records = [b""] * len(places)
        files = np.searchsorted(self._starts, places, side="right") - 1
        for file in np.unique(files):
            rows = np.flatnonzero(files == file)
            numbers = places[rows] - self._starts[file]
            for row, record in zip(rows, self._records(file, numbers), strict=True):
                records[row] = record
        try:
            return self._parse(records)
        except tf.errors.InvalidArgumentError:
            self._name_misfit(records, places, files)
            raise

    def _records(self, file: int, numbers: np.ndarray) -> list[bytes]:
        path, offsets = self._paths[file], self._offsets[file]
        with _opened(path) as descriptor:
            return [_record(path, descriptor, int(offsets[n]), int(offsets[n + 1])) for n in numbers]

    def _parse(self, records: list[bytes]) -> dict[str, Any]:
        return tf.io.parse_example(tf.constant(records, tf.string), self._features)

    def _name_misfit(self, records: list[bytes], places: np.ndarray, files: np.ndarray) -> None:
        for record, place, file in zip(records, places, files, strict=True):
            try:
                self._parse([record])
            except tf.errors.InvalidArgumentError as error:
                reason = re.sub(r"^{{.*?}} (Name: <unknown>, )?|\.? \[Op:.*\]$", "", error.message)
                raise DataError(
                    f"{self._paths[file]}: record {place - self._starts[file]} does not have the features that were asked "
                    f"for: {reason}"
                ) from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor, for `os.pread`."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _offsets(path: Path) -> np.ndarray:
    """Where each record begins, and where the last one ends: int64 [records + 1]."""
    offsets, offset = array("q", [0]), 0
    with _opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        while offset < size:
            header = os.pread(descriptor, _HEADER.size, offset)
            if len(header) == _HEADER.size:
                length, crc = _HEADER.unpack(header)
                if crc != _masked_crc(header[:8]):
                    raise DataError(_what_is_wrong(path, offset, header))
                offset += _HEADER.size + length + _FOOTER.size
            if len(header) < _HEADER.size or offset > size:
                raise DataError(
                    f"{path} is cut off within record {len(offsets) - 1}, at byte {size}: copy or write it again"
                )
            offsets.append(offset)
    return np.frombuffer(offsets, np.int64)


def _record(path: Path, descriptor: int, begin: int, end: int) -> bytes:
    content = os.pread(descriptor, end - begin, begin)
    record = content[_HEADER.size : -_FOOTER.size]
    if len(content) < end - begin or content[-_FOOTER.size :] != _FOOTER.pack(_masked_crc(record)):
        raise DataError(f"{path} is corrupt: the record at byte {begin} is not what its checksum says; write it again")
    return record


def _what_is_wrong(path: Path, offset: int, header: bytes) -> str:
    if offset > 0:
        return f"{path} is corrupt at byte {offset}, where a record should begin: copy or write it again"
    zlib_header = header[0] == 0x78 and int.from_bytes(header[:2], "big") % 31 == 0
    if header[:2] == b"\x1f\x8b" or zlib_header:
        return (
            f"{path} is compressed by {'zlib' if zlib_header else 'gzip'}, and records of a compressed file cannot be read in "
            "any order: write it without compression"
        )
    return f"{path} is no TFRecord file, or it is corrupt at its first byte: write it with tf.io.TFRecordWriter"


def _masked_crc(content: bytes) -> int:
    crc = google_crc32c.value(content)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
