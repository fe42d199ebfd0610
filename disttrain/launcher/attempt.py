"""One attempt at a job."""

from __future__ import annotations

from collections.abc import Callable

from disttrain.launcher.command import Job
from disttrain.launcher.supervisor import Outcome, Show, Supervisor
from disttrain.launcher.survivors import Survivors


def attempt(
    job: Job,
    number: int,
    show: Show,
    *,
    start_seconds: float,
    grace_seconds: float,
    resize: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Starts the job once and returns when nothing of it is left.

    Args:
      number: of the attempt, from 0; ranks find it as DISTTRAIN_ATTEMPT.
      start_seconds: within which all ranks must be there.
      grace_seconds: that ranks have to save and end after a signal to the launcher.
      resize: asked again and again; where it says yes, ranks are to save and end, to be started again on other hosts.
    """
    supervisor = Survivors if job.survives else Supervisor
    return supervisor(job, number, show, start_seconds, grace_seconds, resize).run()
