"""Tables, CSV or Parquet, by pyarrow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from disttrain.data.source import Paths, find
from disttrain.errors import DataError


class Table:
    """Columns of numbers, read into memory. A `Source`: `read` returns (float32 [k, len(inputs)], labels [k]).

    Labels are int32 where the column holds whole numbers or truth values, else float32.

    Args:
      paths: a file or a pattern ("data/*.parquet"), or several; `.csv` (with names in its first line; also `.csv.gz`) and
        `.parquet`.
      inputs: names of the columns, in this order.
      label: name of a column.

    Raises:
      DataError: pyarrow is not installed, no file or one that cannot be read, a column that is missing or is not of numbers,
        a value that is missing.
    """

    def __init__(self, paths: Paths, inputs: Sequence[str], label: str):
        tables = [_read(path, [*dict.fromkeys([*inputs, label])]) for path in find(paths)]
        self._inputs = np.concatenate(
            [np.stack([table[name].astype(np.float32) for name in inputs], axis=1) for table in tables]
        )
        self._labels = _as_labels(np.concatenate([table[label] for table in tables]), label)
        # In memory there are no files any more.
        self.files = [len(self._labels)]

    def __len__(self) -> int:
        return self.files[0]

    def read(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._inputs[places], self._labels[places]


def _read(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Columns by name, each [rows], of numbers or truth values."""
    arrow = _arrow()
    try:
        known, table = _load(path, names)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read the table {path}: {error}") from error
    missing = [name for name in names if known.count(name) != 1]
    if missing:
        raise DataError(f"{path}: there must be one column {missing[0]!r}; its columns are {', '.join(known)}")
    return {name: _numbers(path, name, table.column(name)) for name in names}


def _load(path: Path, names: list[str]) -> tuple[list[str], Any]:
    """Names of all columns, and a table with those of `names` that are there."""
    from pyarrow import csv, parquet

    if path.name.endswith((".csv", ".csv.gz")):
        with csv.open_csv(path) as reader:
            known = reader.schema.names
        wanted = [name for name in names if name in known]
        return known, csv.read_csv(path, convert_options=csv.ConvertOptions(include_columns=wanted))
    if path.suffix == ".parquet":
        known = parquet.read_schema(path).names
        return known, parquet.read_table(path, columns=[name for name in names if name in known])
    raise DataError(f"{path}: a table is a file .csv, .csv.gz or .parquet")


def _numbers(path: Path, name: str, column: Any) -> np.ndarray:
    if column.null_count:
        row = column.is_null().to_numpy().argmax()
        raise DataError(f"{path}: column {name!r} has no value in row {row}: fill it in, or leave the row out")
    types, kind = _arrow().types, column.type
    if types.is_null(kind):  # without rows CSV does not say what they would be
        return np.zeros(0, bool)
    if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
        raise DataError(f"{path}: column {name!r} is of {kind}, and numbers are wanted: turn it into numbers")
    return column.to_numpy()


def _as_labels(labels: np.ndarray, name: str) -> np.ndarray:
    if labels.dtype.kind == "f":
        return labels.astype(np.float32)
    whole = labels.astype(np.int32)
    if (whole != labels).any():
        raise DataError(f"column {name!r} holds {labels[whole != labels][0]}, which is no int32: a label must be one")
    return whole


def _arrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise DataError("a Table is read by pyarrow, which is not installed: pip install 'disttrain[tables]'") from None
    return pyarrow
