"""What every backend can do. The step knows only this protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, get_args

import tensorflow as tf

from disttrain.types import Variable

Op = Literal["sum", "mean", "min", "max"]
OPS: tuple[str, ...] = get_args(Op)


class Communicator(Protocol):
    """Replicas and how they talk.

    A *worker* is a process, a *replica* a device that holds a copy of the model; a worker has one replica or more.
    `run`, `scope`, `distribute` and what moves values in and out are called by the worker; the collectives
    (`all_reduce`, `reduce_scatter`, `all_gather`) and `replica_id` are called by replicas, inside `run`, eagerly or
    in a `tf.function`, by all replicas in the same order, never inside `tf.cond` or `tf.while_loop`.

    Attributes:
      name: of the backend, as `dt.init` knows it.
      rank: of this worker's first replica, 0 to size - 1.
      size: number of replicas over all workers.
      local_rank: of this worker among the workers of its machine.
      ops: reductions that `all_reduce` knows: those of `Op`, and what the engine has beyond them.
      is_chief: whether this worker speaks and saves for all (it holds rank 0).
      elastic: whether workers may come and go; only then are there `hosts_changed` and `regroup`.
      hosts_changed: whether this worker has heard that hosts have come or gone: it is time to regroup, for all together.
    """

    name: str
    rank: int
    size: int
    local_rank: int
    is_chief: bool
    ops: tuple[str, ...]
    elastic: bool
    hosts_changed: bool

    def scope(self) -> AbstractContextManager:
        """Variables, models and optimizers are made inside it, so that each replica has its copy."""

    def owns(self, variable: Variable) -> bool:
        """Whether the variable was made in this communicator's `scope()`."""

    def run(self, fn: Callable, args: tuple = (), *, fused: bool = False) -> Any:
        """Calls `fn(*args)` once on each local replica; per-replica values in `args` arrive as that replica's own.

        `fused` asks for XLA, for a function that holds no collective; an engine that cannot does without.
        """

    def replica_id(self) -> int:
        """Rank of the replica that asks, inside `run`; a Python int, known while tracing."""

    def per_replica(self, values: Sequence[Any]) -> Any:
        """One nest of tensors for each local replica, bound into what `run` and the step take."""

    def local_values(self, value: Any) -> list[Any]:
        """The inverse of `per_replica`: what `run` returned, or an element of `distribute`, by local replica."""

    def local_shares(self, batch: Any) -> list[Any]:
        """A batch by local replica: what `distribute` yields, or a plain nest, which is this worker's and split evenly.

        Raises:
          DataError: tensors that are scalars or differ in their first dimension.
        """

    def distribute(self, dataset: Iterable) -> Iterable:
        """Takes a data set of global batches; each element that it yields is shared out over the replicas.

        Batches are split along their first dimension as evenly as possible, in order; where there are fewer
        examples than replicas, the last replicas get none. A data set that has a method `share(rank, size)`, which returns
        these rows of each of its batches, is asked for them by engines with one replica a process.

        Raises:
          DataError: a `tf.data.Dataset` is shuffled without a seed, and there are several processes.
        """

    def all_reduce(self, tensors: Sequence[tf.Tensor | tf.IndexedSlices], op: Op = "sum") -> list:
        """Reduces each tensor over all replicas; every replica gets the same bits. IndexedSlices: "sum" only."""

    def reduce_scatter(self, tensor: tf.Tensor, op: Op = "sum") -> tf.Tensor:
        """Reduces over replicas and gives replica r the r-th of `size` equal parts of the first dimension."""

    def all_gather(self, tensor: tf.Tensor) -> tf.Tensor:
        """Concatenates along the first dimension, which may differ by replica, in the order of ranks."""

    def broadcast(self, variables: Sequence[Variable], root: int = 0) -> None:
        """Gives every worker the values that the variables have on the worker of rank `root`."""

    def all_gather_object(self, value: Any) -> list[Any]:
        """One picklable object from each worker, in the order of ranks."""

    def barrier(self) -> None:
        """Returns when all workers have come here."""

    def waiting(self, what: str) -> AbstractContextManager:
        """Within it this worker is in a collective or on its way there; `what` says which, should others wait in vain."""

    def busy(self, what: str) -> AbstractContextManager:
        """Within it the others may wait for this worker longer than `stall_timeout`; `what` says for what, should it stop."""

    def lost(self, error: Exception) -> bool:
        """Whether the error, of a collective or of a program that holds one, says that a worker is gone, and others go on."""

    def regroup(self) -> None:
        """Leaves the group and joins the one that there is now; rank and size change, and all programs must be traced anew.

        Raises:
          Preempted: this worker has no place in it.
        """

    def close(self) -> None:
        """Leaves the group. The communicator cannot be used afterwards; closing it again does nothing."""
