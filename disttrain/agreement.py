"""What ranks must agree on: what they train, which gradients there are, and that their weights are still the same."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from disttrain.comm.communicator import Communicator
from disttrain.errors import ConfigError, DriftError
from disttrain.gradients.checksum import checksums
from disttrain.types import Variable, name_of

log = logging.getLogger("disttrain")

# Differences that an error names; the others are counted.
_NAMED = 4


def facts_about(variables: Sequence[Variable], state: Sequence[Variable], options: dict[str, Any]) -> dict[str, str]:
    """What this rank is about to train, in words that can be compared: name -> description."""
    facts = {}
    for name, value in options.items():
        settings = _settings(value)
        facts |= {f"{name}{setting and ' '}{setting}": _plain(x) for setting, x in settings.items()}
    for word, group in (("trained", variables), ("state", state)):
        facts |= {f"{word} variable {name_of(v)}": f"{v.dtype} {tuple(v.shape)}".replace("'", "") for v in group}
    return facts


def check_same(comm: Communicator, facts: dict[str, str]) -> None:
    """Compares facts over all ranks.

    Raises:
      ConfigError: on every rank, naming what differs and where.
    """
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    if len(set(comm.all_gather_object(digest))) == 1:
        return
    by_rank = comm.all_gather_object(facts)
    names = dict.fromkeys(itertools.chain.from_iterable(by_rank))
    said = []
    for name in names:
        values = [facts.get(name, "missing") for facts in by_rank]
        common = Counter(values).most_common(1)[0][0]
        odd = [rank for rank, value in enumerate(values) if value != common]
        if odd:
            usual = values.index(common)
            said.append(f"{name}: {values[odd[0]]} on rank {odd[0]}, {common} on rank {usual}")
    more = f"; and {len(said) - _NAMED} more" if len(said) > _NAMED else ""
    said = said[:_NAMED] or ["the order of the variables"]
    raise ConfigError(f"ranks disagree on what to train: {'; '.join(said)}{more}. Every rank must build the same")


Kind = Literal["none", "sparse", "dense"]


def kind_of(gradients: Sequence) -> Kind:
    """What the replicas' gradients of one variable are together: one dense one makes all dense."""
    if all(g is None for g in gradients):
        return "none"
    return "sparse" if all(g is None or isinstance(g, tf.IndexedSlices) for g in gradients) else "dense"


def agree_on_kinds(comm: Communicator, mine: Sequence[Kind]) -> list[Kind]:
    """For each variable what its gradient is, all ranks together."""
    order: list[Kind] = ["none", "sparse", "dense"]
    return [max(kinds, key=order.index) for kinds in zip(*comm.all_gather_object(list(mine)), strict=True)]


def check_drift(comm: Communicator, variables: Sequence[Variable], step: int, on_drift: str) -> None:
    """Compares checksums of the variables over ranks; "heal" broadcasts from the rank that most agree with.

    Raises:
      DriftError: on every rank, naming variables and ranks, if `on_drift` is "raise".
    """
    by_rank = np.stack(comm.all_gather_object(_checksums(tuple(variables)).numpy()))
    common = Counter(row.tobytes() for row in by_rank).most_common(1)[0][0]
    root = [row.tobytes() for row in by_rank].index(common)
    differs = by_rank != by_rank[root]
    if not differs.any():
        return
    names = ", ".join(name_of(v) for v in itertools.compress(variables, differs.any(axis=0)))
    ranks = ", ".join(map(str, differs.any(axis=1).nonzero()[0]))
    said = f"weights have drifted apart after step {step}: {names} on rank {ranks} differ from rank {root}"
    if on_drift == "raise":
        raise DriftError(
            f"{said}. Something changes them outside the step, or a device computes wrongly; on_drift='heal' copies them anew"
        )
    if comm.is_chief:
        log.warning("%s; copied from there", said)
    comm.broadcast(list(itertools.compress(variables, differs.any(axis=0))), root)


@tf.function(autograph=False)
def _checksums(variables: tuple) -> tf.Tensor:
    return checksums(variables)


def _settings(value: Any) -> dict[str, Any]:
    """An optimizer by its settings, so that an error names the one that differs; anything else as it is."""
    if not isinstance(value, keras.optimizers.Optimizer):
        return {"": value}
    # The name is for people, and Keras counts it up.
    return {"": type(value).__qualname__} | {name: x for name, x in value.get_config().items() if name != "name"}


def _plain(value: Any, *, deep: bool = True) -> str:
    """A description without addresses: the same on every rank for the same value."""
    if isinstance(value, np.generic | np.ndarray):
        return str(value.tolist())
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {_plain(v)}' for k, v in value.items())}}}"
    if isinstance(value, str | int | float | bool | type(None)):
        return str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_plain(x, deep=deep) for x in value)}]"
    name = getattr(value, "__qualname__", type(value).__qualname__)
    # What people write themselves may know its rank; only our own must have the same settings everywhere.
    if not deep or not (getattr(value, "__module__", None) or "").startswith("disttrain."):
        return name
    # A function's settings are in its closure, an object's in its attributes.
    settings = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    settings += [x for _, x in sorted(getattr(value, "__dict__", {}).items())]
    known = [_plain(x, deep=False) for x in settings if isinstance(x, str | int | float | bool | list | tuple)]
    return f"{name}({', '.join(known)})"
