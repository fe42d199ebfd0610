"""Reading ahead of the loop, in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

# More than there are cores may pay: a thread that waits for a disk or a network needs none.
_THREADS = 4
# Batches that are read while the loop is at one: each thread has one to do, whichever is taken first.
_AHEAD = _THREADS


def in_order(read: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`map(read, items)`, some calls ahead. What `read` raises is raised where its result should come.

    However it ends, at its end, by an error or because nobody wants more, no thread is left.
    """
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="disttrain-input")
    try:
        underway: deque[Future] = deque()
        for item in items:
            underway.append(pool.submit(read, item))
            if len(underway) > _AHEAD:
                yield underway.popleft().result()
        while underway:
            yield underway.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
