"""A training of two ranks that is killed at random moments and started again, until it is done: python -m tests.soak --minutes 30

Its end must be that of a training that nothing has disturbed: the same bits, every example of every epoch once, and no
checkpoint that cannot be read.
"""

from __future__ import annotations

import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import tensorflow as tf
from rich.console import Console

from disttrain.checkpoint import files
from disttrain.errors import DataError

SCRIPT = str(Path(__file__).parent / "ranks" / "soak.py")
KINDS = ("SIGKILL of a rank", "SIGKILL of all ranks", "SIGTERM", "SIGKILL in the middle of a save")
EXAMPLES, BATCH = 1437, 200
_LONGEST_SECONDS = 200


def soak(
    folder: Path, kills: int, minutes: float, steps: int, seed: int = 0, say: Callable[[str], None] = lambda text: None
) -> dict:
    """Runs the training undisturbed and disturbed, and returns counts: kills by kind, lost, repeated, unreadable, different.

    Also how many optimizer steps the disturbed runs did, those that were done again included, and seconds.
    """
    begun = time.monotonic()
    draw, until = random.Random(seed), begun + 60 * minutes
    whole, struck = folder / "whole", folder / "struck"
    for path in (whole, struck):
        path.mkdir(parents=True)
    assert _run(whole, steps, 0) == (False, 0)
    done: collections.Counter[str] = collections.Counter()
    unreadable = attempt = done_before = 0
    while True:
        over = sum(done.values()) >= kills or time.monotonic() > until
        kind = KINDS[sum(done.values()) % len(KINDS)]
        hit, code = _run(struck, steps, attempt, None if over else kind, draw)
        unreadable += _unreadable(struck / "checkpoints", say)
        attempt += 1
        if hit:
            done[kind] += 1
            say(f"{sum(done.values())}: {kind}, exit code {code}, newest checkpoint {_newest(struck)}")
            assert code != 0, f"{kind}: exit code 0"
        else:
            assert code == 0, f"exit code {code} though nothing was done to it"
        if code == 0:
            if over:
                break
            # It came to its end sooner than the signal: from the start again.
            raise AssertionError("the training was over before it could be struck: give it more steps")
        if not over and _newest(struck) > 0.8 * steps:
            done_before += _begin_again(struck, whole, steps)
    lost, repeated = _count_examples(struck, steps)
    return {
        "kills": dict(done),
        "lost": lost,
        "repeated": repeated,
        "unreadable": unreadable,
        "different": _different(whole, struck, steps),
        "steps": done_before + _steps(struck),
        "seconds": round(time.monotonic() - begun),
    }


def _run(
    folder: Path, steps: int, attempt: int, kind: str | None = None, draw: random.Random | None = None
) -> tuple[bool, int]:
    """Whether it was struck in that way, and its exit code. A training that hangs is a fault, and not waited for."""
    job = _start(folder, steps, attempt)
    try:
        hit = kind is not None and _strike(job, folder, kind, draw)
        return hit, job.wait(_LONGEST_SECONDS)
    finally:
        job.kill()


def _start(folder: Path, steps: int, attempt: int) -> subprocess.Popen:
    words = ["-np", "2", "--launcher", "mpirun", "--", sys.executable, SCRIPT, str(folder), str(steps)]
    return subprocess.Popen(
        [sys.executable, "-m", "disttrain.cli", "run", *words],
        env=os.environ
        | {"SOAK_ATTEMPT": str(attempt), "SOAK": str(folder), "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _strike(job: subprocess.Popen, folder: Path, kind: str, draw: random.Random) -> bool:
    """Waits until it trains, and for a moment more; False if it was over by then."""
    begun, until = _lines(folder), time.monotonic() + _LONGEST_SECONDS
    while _lines(folder) < begun + 3:  # one of the two ranks is at its second step
        if job.poll() is not None:
            return False
        assert time.monotonic() < until, "the training does not begin"
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 0.8))
    if kind == "SIGKILL in the middle of a save":
        while not list(folder.glob("checkpoints/.step-*")) and job.poll() is None:
            assert time.monotonic() < until, "the training saves nothing"
            time.sleep(0.0005)
    if job.poll() is not None:
        return False
    if kind == "SIGTERM":
        job.send_signal(signal.SIGTERM)
        return True
    ranks = _ranks(folder)
    for pid in ranks if "all" in kind else draw.sample(ranks, 1):
        os.kill(pid, signal.SIGKILL)
    return bool(ranks)


def _ranks(folder: Path) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if SCRIPT in words[:2] and str(folder) in words:
            found.append(int(process.name))
    return sorted(found)


def _lines(folder: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in folder.glob("seen-*.jsonl"))


def _steps(folder: Path) -> int:
    """Done by rank 0."""
    return len((folder / "seen-0.jsonl").read_text().splitlines())


def _newest(folder: Path) -> int:
    return max((int(path.name[5:]) for path in folder.glob("checkpoints/step-*")), default=0)


def _unreadable(folder: Path, say: Callable[[str], None]) -> int:
    count = 0
    for path in folder.glob("step-*"):
        try:
            files.read_state(path)
        except (DataError, OSError) as error:
            say(f"unreadable: {error}")
            count += 1
    return count


def _begin_again(struck: Path, whole: Path, steps: int) -> int:
    """Lets a training that has nearly come to its end do so, checks it, and starts anew: there are more kills to come.

    Returns the steps that it has done.
    """
    assert _run(struck, steps, 10**6) == (False, 0)
    assert _count_examples(struck, steps) == (0, 0)
    assert _different(whole, struck, steps) == 0
    count = _steps(struck)
    shutil.rmtree(struck)
    struck.mkdir()
    return count


def _count_examples(folder: Path, steps: int) -> tuple[int, int]:
    """Examples that no step of their epoch has seen, and those that more than one has. The last attempt at a step counts.

    A step that was noted and not done was noted again by the next attempt.
    """
    per_epoch = -(-EXAMPLES // BATCH)
    seen = collections.defaultdict(list)
    for path in folder.glob("seen-*.jsonl"):
        of_step = {}
        for line in path.read_text().splitlines():
            note = json.loads(line)
            of_step[note["step"]] = note["examples"]
        assert sorted(of_step) == list(range(1, steps + 1)), "a step is missing"
        for step, examples in of_step.items():
            seen[(step - 1) // per_epoch] += examples
    lost = repeated = 0
    for epoch in range(steps // per_epoch):
        counts = collections.Counter(seen[epoch])
        lost += EXAMPLES - len(counts)
        repeated += sum(counts.values()) - len(counts)
    return lost, repeated


def _different(one: Path, other: Path, steps: int) -> int:
    """Variables whose final values are not the same bits."""
    readers = [
        tf.train.load_checkpoint(x / "checkpoints" / f"step-{steps:09d}" / files.VARIABLES) for x in (one, other)
    ]
    names = readers[0].get_variable_to_shape_map()
    assert names == readers[1].get_variable_to_shape_map()
    return sum(readers[0].get_tensor(n).tobytes() != readers[1].get_tensor(n).tobytes() for n in names)


@click.command()
@click.option("--minutes", type=float, default=30, show_default=True, help="Nothing is killed any more after them.")
@click.option("--kills", type=int, default=50, show_default=True, help="Or after so many kills.")
@click.option("--steps", type=int, default=320, show_default=True, help="Of the training.")
@click.option("--seed", type=int, default=0, show_default=True)
def main(minutes: float, kills: int, steps: int, seed: int) -> None:
    """Kills a training of two ranks again and again, and compares its end with that of an undisturbed one."""
    console = Console()
    with tempfile.TemporaryDirectory(prefix="disttrain-soak-") as folder:
        counts = soak(Path(folder), kills, minutes, steps, seed, console.print)
    for name, count in counts.items():
        console.print(f"{name}: {count}")
    sys.exit(any(counts[name] for name in ("lost", "repeated", "unreadable", "different")))


if __name__ == "__main__":
    main()
