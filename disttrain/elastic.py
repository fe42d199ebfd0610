"""Trainings that outlive workers: a loop of one's own survives with it, as the Trainer's does.

Elastic Horovod (2020) copies the state of a training now and then, and goes back to the last copy when a worker is lost. Here
a step happens as a whole or not at all (see `TrainStep`), so that what a survivor holds is the state to go on from: no copy is
made, and no step is done again that any survivor has done.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from disttrain.comm.communicator import Communicator
from disttrain.errors import Preempted
from disttrain.world import tell_launcher

log = logging.getLogger("disttrain")

# A signal that is meant for all ranks does not come to all of them in the same step.
_SIGNAL_SECONDS = 1.0


class HostsChanged(Exception):  # noqa: N818, an interruption and no error
    """Raised by all ranks after the same step: hosts have come or gone, and the ranks are to meet anew."""


def survive(comm: Communicator, train: Callable[[], Any], lost: Callable[[], None] = lambda: None) -> Any:
    """Calls `train` again after every change of the group, until it returns, and returns what it returns.

    Args:
      comm: where it is not elastic, `train` is called once.
      train: takes up the training where the ranks are that know most of it.
      lost: called before the ranks meet anew.

    Raises:
      Preempted: this worker has no place in the job any more.
    """
    changed = False
    while True:
        try:
            if changed:
                comm.regroup()
            return train()
        except HostsChanged:
            log.info("hosts have come or gone: the ranks meet anew")
        except tf.errors.OpError as error:
            if not comm.lost(error):
                raise
            log.info("a rank is gone: the others meet anew")
        lost()
        changed = True


def let_go(comm: Communicator, asked: Callable[[], bool]) -> None:
    """Some ranks were asked to end, and all call this after the same step: returns where it is to be the end of all.

    Args:
      comm: where it is not elastic, it always is.
      asked: whether this rank was asked by now.

    Raises:
      Preempted: this rank is to leave, and others go on.
      HostsChanged: others leave, and this rank is to go on.
    """
    if not comm.elastic:
        return
    time.sleep(_SIGNAL_SECONDS)
    told = comm.all_gather_object(asked())
    if all(told):
        return
    if told[comm.rank]:
        tell_launcher({"leaves": True})
        raise Preempted("this worker was asked to end, and the others go on")
    raise HostsChanged
