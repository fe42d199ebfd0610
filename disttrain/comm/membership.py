"""Who belongs to an elastic job, as Horovod's elastic driver says (Sergeev and Del Balso, Horovod, 2018; Elastic Horovod, 2020).

The driver starts a worker for every slot of the hosts that there are, and gives all of them new ranks whenever they meet anew.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

from disttrain.errors import BackendError, Preempted
from disttrain.world import tell_launcher

# Ranks that meet wait so long for one that should come too; it may have to import TensorFlow first. Horovod's default is 30.
_MEET_SECONDS = 60
# After so many meetings to which some did not come, something else is wrong.
_MEETINGS = 5


def join(hvd: Any) -> None:
    """Takes the place in the job that the driver gives, when all others have come to take theirs.

    Raises:
      Preempted: there is none for this worker any more.
      BackendError: others did not come, again and again.
    """
    os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", str(_MEET_SECONDS))
    for _ in range(_MEETINGS):
        try:
            return hvd.init()
        except ValueError:  # all that Horovod says
            hvd.shutdown()
        if _place() == "-1":
            tell_launcher({"leaves": True})
            raise Preempted(
                "this worker has no place in the job any more: its host is not listed, or has failed before"
            )
    raise BackendError(f"an elastic job in which some ranks did not come to {_MEETINGS} meetings: look at their output")


def _place() -> str:
    """Horovod changes this variable for itself, past Python's copy of the environment."""
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    return (getenv(b"HOROVOD_RANK") or b"").decode()


class Hosts:
    """Hears from the driver that hosts have come or gone. It tells rank 0 alone.

    Attributes:
      changed: whether it has said so since this was last made False.
    """

    def __init__(self):
        from horovod.common.elastic import notification_manager

        self.changed = False
        notification_manager.register_listener(self)  # before the driver knows whom to tell
        notification_manager.init()

    def on_hosts_updated(self, timestamp: int, result: int) -> None:
        """Called by Horovod, in a thread of its own."""
        self.changed = True
