"""Broadcasts of variables and objects. Horovod's signatures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from disttrain.horovod import collectives
from disttrain.horovod.engine import hvd, plain
from disttrain.types import Variable

global_process_set = hvd.global_process_set

allgather_object = hvd.allgather_object
broadcast_global_variables = hvd.broadcast_global_variables
broadcast_object = hvd.broadcast_object


def broadcast_variables(
    variables: Sequence[Variable], root_rank: int, process_set: Any = global_process_set, inplace: bool = False
) -> Any:
    """Gives all ranks the values that variables have on `root_rank`.

    Of any dtype: the seeds of Keras's dropout are of one that Horovod does not know.
    """
    variables = plain(list(variables))
    known = [v for v in variables if v.dtype in collectives._BROADCAST_KNOWS]
    done = [hvd.broadcast_variables(known, root_rank, process_set=process_set, inplace=inplace)] if known else []
    for variable in variables:
        if variable.dtype not in collectives._BROADCAST_KNOWS:
            value = collectives.broadcast(variable.read_value(), root_rank, process_set=process_set)
            done.append(variable.assign(value))
    if tf.executing_eagerly():
        return None
    return tf.group(*[x for each in done for x in tf.nest.flatten(each) if x is not None])


def broadcast_object_fn(
    root_rank: int = 0, session: Any = None, name: str | None = None, process_set: Any = global_process_set
) -> Callable[[Any], Any]:
    """A function that broadcasts objects from `root_rank`."""
    return lambda obj: broadcast_object(obj, root_rank, session=session, name=name, process_set=process_set)
