"""Who belongs to an elastic job, as Horovod's elastic driver says (Sergeev and Del Balso, Horovod, 2018; Elastic Horovod, 2020).

The driver starts a worker for every slot of the hosts that there are, and gives all of them new ranks whenever they meet anew.
"""

from __future__ import annotations


class Hosts:
    """Hears from the driver that hosts have come or gone. It tells rank 0 alone.

    Attributes:
      changed: whether it has said so since this was last made False.
    """

    def __init__(self):
        from horovod.common.elastic import notification_manager

        self.changed = False
        notification_manager.init()
        notification_manager.register_listener(self)

    def on_hosts_updated(self, timestamp: int, result: int) -> None:
        """Called by Horovod, in a thread of its own."""
        self.changed = True
