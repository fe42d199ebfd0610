"""A job whose ranks come and go while it runs: Horovod's elastic driver starts them, here they are watched."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from disttrain.errors import EXIT_RESUME
from disttrain.launcher.facts import differences, facts
from disttrain.launcher.supervisor import Outcome, Rank, Supervisor, how_it_ended
from disttrain.world import ASKED


class _Loss(NamedTuple):
    """A rank that ended before the job did."""

    code: int
    reason: str
    rank: Rank


class Survivors(Supervisor):
    """Of a job that goes on without the ranks that fail, and with those that come, until the program itself ends."""

    def __init__(self, *args):
        super().__init__(*args)
        self._come = 0
        # Since the ranks last met: when they meet again, the others have survived it.
        self._losses: list[_Loss] = []
        self._leaving: list[Rank] = []

    def _world(self) -> dict[str, str]:
        return {}

    def _welcome(self, rank: Rank) -> None:
        different = differences(facts(), rank.hello["facts"], rank.host)
        if different:
            self._show.note(f"{rank} is not taken in: {'; '.join(different)}; install the same versions on all hosts")
            rank.lost = True
            rank.send("stop", grace=0.0)
            return
        # By when it came: numbers are given anew whenever the ranks meet.
        self._ranks[self._come] = rank
        self._come += 1
        self._went = True
        # All are asked to end, or those that were asked would leave, and be replaced by those that were not.
        asked = {ASKED: "1"} if self._interrupted else {}
        rank.send("go", environment={"DISTTRAIN_ATTEMPT": str(self._number), **asked})

    def _take_output(self, rank: Rank, stream: str, text: str) -> None:
        said = _said(text) if stream == "progress" else {}
        if "rank" in said:
            self._met(rank, said["rank"])
        elif "leaves" in said:
            self._leaving.append(rank)
        elif "stop" in said:
            # It hears of nothing any more, so that its agent must end it.
            for each in self._ranks.values():
                if each.rank in said["stop"] and not each.over:
                    each.send("stop", grace=0.0)
        else:
            super()._take_output(rank, stream, text)

    def _met(self, rank: Rank, number: int) -> None:
        rank.rank = number
        self._losses.clear()
        self._ranks = {key: each for key, each in self._ranks.items() if not each.over or each.code == 0}

    def _take_exit(self, rank: Rank, code: int) -> None:
        # One that has no place any more may be interrupted on its way out.
        rank.code = code = EXIT_RESUME if rank in self._leaving else code
        # The driver hears of it when the agent ends, and only then gives the others their new ranks.
        rank.send("bye")
        if code not in (0, EXIT_RESUME):
            self._note_loss(rank, code if code > 0 else 128 - code, how_it_ended(code))

    def _lose(self, rank: Rank, how: str) -> None:
        rank.lost = True
        self._note_loss(rank, EXIT_RESUME, how)

    def _note_loss(self, rank: Rank, code: int, how: str) -> None:
        self._losses.append(_Loss(code, f"{rank} {how}", rank))
        left = sum(not each.over for each in self._ranks.values())
        if left and not self._failure:
            self._show.note(f"{rank} {how}; {left} {'goes' if left == 1 else 'go'} on")

    def _is_over(self, processes: list) -> bool:
        # With the last rank the state of the training is gone: no use in waiting for hosts.
        over = self._went and all(rank.over for rank in self._ranks.values())
        return over or super()._is_over(processes)

    def _outcome(self) -> Outcome:
        if self._losses and not self._failure:
            self._failure = self._losses[0]
        codes = {rank.code for rank in self._ranks.values()}
        if not self._failure and 0 not in codes:
            self._failure = (EXIT_RESUME, "all ranks have saved and can go on from there", None)
        return super()._outcome()


def _said(text: str) -> dict[str, Any]:
    """What a rank has to tell the launcher itself."""
    try:
        said = json.loads(text)
    except ValueError:  # the program itself has written there
        return {}
    return said if isinstance(said, dict) else {}
