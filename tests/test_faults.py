"""What goes wrong on one rank: all ranks go on alike, or all end soon, say why, and leave nothing behind."""

import itertools
import os
import re
import signal
import time

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from helpers import relative_error
from once import once
from ranks.fault_parts import (
    COUNTS,
    LABELS,
    batch,
    batch_of_lookups,
    build,
    build_lookups,
    labels_of,
    lookups,
    losses,
)

from launch import launch, start

# Seconds that a rank which raises, is killed or leaves may take to end the whole job.
SOON = 10
STALL_TIMEOUT = 5
# The others notice that a rank stands still after STALL_TIMEOUT; the rest is for launchers and slow machines.
STALLED = STALL_TIMEOUT + 15


# Faults that training survives, or that all ranks answer with the same error ---------------------------------------


@pytest.fixture(params=[("horovod", 2), ("gloo", 2), ("mpi", 3), ("multiworker", 2)], ids=lambda p: f"{p[0]}-{p[1]}")
def job(request, tmp_path_factory):
    """What the ranks of `fault_survived` have left; each job runs once, for all tests."""
    engine, ranks = request.param
    work = lambda: launch(engine, ranks, "fault_survived", timeout=400).check()  # noqa: E731
    return once(tmp_path_factory, f"faults-{engine}-{ranks}", work)


def said(job, name):
    """What every rank says; the same on all."""
    first, *others = [report[name] for report in job.reports]
    assert all(other == first for other in others)
    return first


def weights(job, name, count=6):
    return [job.arrays[0][f"{name} {i}"] for i in range(count)]


def mean_loss(model, shares, loss_fn=losses):
    """Of all ranks' examples as one batch."""
    examples = sum(len(share["ids" if "ids" in share else "x"]) for share in shares)
    return tf.add_n([tf.reduce_sum(loss_fn(model, share)) for share in shares]) / examples


def sgd():
    return keras.optimizers.SGD(0.01, momentum=0.9)


def single_device(shares_by_step, model=build, loss=mean_loss):
    """Weights before and after."""
    first, *_, last = reference.train(model(), sgd(), loss, shares_by_step)
    return first, last


def test_ranks_stay_bitwise_equal(job):
    for name in job.arrays[0]:
        if not name.startswith("start before"):
            assert len({arrays[name].tobytes() for arrays in job.arrays}) == 1, name


@pytest.mark.parametrize("on_none", LABELS)
def test_a_gradient_that_is_none_on_some_ranks_is_a_zero_there(job, on_none):
    """Later batches change what the loss reaches on one rank alone, so that it compiles its step again alone."""
    model, ranks = build(), len(job.reports)
    optimizer = keras.optimizers.Adam(0.1) if on_none == "skip" else sgd()
    optimizer.build(model.trainable_variables)
    side = [v for v in model.trainable_variables if "side" in v.path]

    def zeros_where_none(model, shares):
        return mean_loss(model, shares) + 0.0 * tf.add_n([tf.reduce_sum(v.value) for v in side])

    before = [v.numpy() for v in model.trainable_variables]
    for index in range(len(LABELS[on_none])):
        labels = [labels_of(on_none, rank, index) for rank in range(ranks)]
        skipped = on_none == "skip" and "b" not in labels
        variables = [v for v in model.trainable_variables if not (skipped and any(v is s for s in side))]
        shares = [batch(rank, index, which) for rank, which in enumerate(labels)]
        loss = mean_loss if skipped else zeros_where_none
        list(reference.train(model, optimizer, loss, [shares], variables=variables))
        after = [v.numpy() for v in model.trainable_variables]
        assert relative_error(weights(job, f"{on_none} {index}"), before, after) <= 1e-6


def test_none_on_all_ranks_is_an_error(job):
    assert re.match(r"the loss does not reach side/kernel, side/bias: leave them out", said(job, "none"))
    assert said(job, "none: untouched")
    assert said(job, "none: goes on")


def test_none_on_all_ranks_is_skipped(job):
    """Weights and Adam's slots keep their bits in the step in which no rank has labels for them."""
    assert said(job, "skip: side untouched") == [False, False, True, False]
    # With zeros, there is nothing to move in the first step; in the third, momentum goes on.
    assert said(job, "zeros: side untouched") == [True, False, False]


def test_a_rank_without_batches_reaches_nothing(job):
    assert said(job, "joined: side untouched")


def test_a_rank_alone_may_need_all_rows_of_a_table(job):
    shares = [[batch_of_lookups(rank, index) for rank in range(len(job.reports))] for index in range(4)]
    before, after = single_device(shares, build_lookups, lambda m, s: mean_loss(m, s, lookups))
    assert relative_error(weights(job, "lookups", 1), before, after) <= 1e-6


def test_nan_on_one_rank_is_skipped_by_all(job):
    assert said(job, "nan: applied") is False
    assert said(job, "nan skip: untouched")
    assert said(job, "nan skip: goes on") == [True, 2]


def test_nan_on_one_rank_raises_on_all(job):
    assert re.search(r"NaN or infinity at step 2: .* on replicas: 1\. Nothing was applied", said(job, "nan"))
    assert said(job, "nan raise: untouched")
    assert said(job, "nan raise: goes on") == [True, 2]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("width", r"trained variable body/kernel: float32 \(4, 6\) on rank 1, float32 \(4, 5\) on rank 0"),
        ("variables", r"trained variable extra/kernel: float32 \(1, 2\) on rank 1, missing on rank 0"),
        ("trainable", r"trained variable body/kernel: missing on rank 1, float32 \(4, 5\) on rank 0"),
        ("accumulate", r"accumulate: 2 on rank 1, 1 on rank 0\."),
        (
            "clip",
            r"after_reduce: \[clip_by_global_norm\S*\(2.0\)\] on rank 1, \[clip_by_global_norm\S*\(1.0\)\] on rank 0",
        ),
        ("learning rate", r"train: optimizer learning_rate: 0.01\d+ on rank 1, 0.00\d+ on rank 0\."),
    ],
)
def test_ranks_that_differ(job, what, message):
    for report in job.reports:
        text, seconds = report[f"differing {what}"]
        assert re.search(message, text)
        assert seconds < SOON


@pytest.mark.parametrize("counts", COUNTS)
def test_ranks_with_fewer_batches_join_without_examples(job, counts):
    numbers = COUNTS[counts][: len(job.reports)]
    assert [report[f"counts {counts}"] for report in job.reports] == [max(numbers) - number for number in numbers]
    shares = [[batch(r, i) for r, n in enumerate(numbers) if i < n] for i in range(max(numbers))]
    before, after = single_device(shares)
    assert relative_error(weights(job, f"counts {counts}"), before, after) <= 1e-6
    if counts == list(COUNTS)[-1]:
        before, after = single_device([*shares, [batch(rank, 10) for rank in range(len(numbers))]])
        assert relative_error(weights(job, "counts again"), before, after) <= 1e-6


def test_fit_with_fewer_batches_on_some_ranks(job):
    """Each rank takes its own part of its own global batches of 7 examples."""
    numbers = COUNTS["uneven"][: len(job.reports)]
    shares = [[my_part(r, i, len(numbers)) for r, n in enumerate(numbers) if i < n] for i in range(max(numbers))]
    before, after = single_device(shares)
    assert relative_error(weights(job, "counts fit"), before, after) <= 1e-6
    examples = sum(len(share["x"]) for share in itertools.chain(*shares))
    assert said(job, "counts fit") == {"steps": max(numbers), "examples": examples, "epochs": 1}


def my_part(rank, index, ranks):
    whole = batch(rank, index, examples=7)
    return {name: tf.constant(np.array_split(x.numpy(), ranks)[rank]) for name, x in whole.items()}


DRIFT = "weights have drifted apart after step 4: side/kernel on rank 1 differ from rank 0"


def test_drift_raises_on_all(job):
    assert said(job, "drift").startswith(DRIFT)


def test_drift_is_healed(job):
    """Rank 0's weights win, the chief warns once, and training goes on as if nothing had been."""
    assert [report["heal"]["warnings"] for report in job.reports] == [
        [f"{DRIFT}; copied from there"],
        *[[]] * (len(job.reports) - 1),
    ]
    assert [report["heal"]["steps"] for report in job.reports] == [[4, 5, 6, 7]] * len(job.reports)


def test_all_start_as_rank_0(job):
    """Weights, optimizer state and seeds."""
    before, after = (
        {k: v for k, v in job.arrays[0].items() if k.startswith(f"start {m}")} for m in ("before", "after")
    )
    assert len(before) == len(after) > 8
    for was, now in zip(before.values(), after.values(), strict=True):
        assert was.tobytes() == now.tobytes()
    theirs = [v for k, v in job.arrays[1].items() if k.startswith("start before")]
    assert any(mine.tobytes() != other.tobytes() for mine, other in zip(before.values(), theirs, strict=True))


# Faults that end the job ---------------------------------------------------------------------------------------------


def strike(engine, fault, victim, ranks=2, stall_timeout=120):
    """Trains until the fault strikes a rank. Returns what is left, and the seconds from the fault to the end."""
    with start(engine, ranks, "fault_ending", fault, victim, stall_timeout) as job:
        if fault.startswith("SIG"):
            job.wait_for_mark(victim, "trained", timeout=200)
            os.kill(job.pid_of_rank(victim), getattr(signal, fault))
        else:
            job.wait_for_mark(victim, "fault", timeout=200)
        struck = time.monotonic()
        result = job.wait(timeout=300)
        seconds = time.monotonic() - struck
    assert result.returncode != 0
    assert result.reports == [None] * ranks
    assert result.left_behind == []
    return result, seconds


def named(victim):
    return rf"rank {victim} \(host \S+, process \d+\)"


GRADIENTS = r"the all-reduce of 6 gradients \(body/kernel, body/bias, main/kernel, \.\.\.\)"


@pytest.mark.parametrize(
    ("engine", "fault", "victim", "ranks", "where"),
    [
        ("horovod", "loss_fn", 1, 2, "loss"),
        ("gloo", "raise", 0, 3, "loop"),
        ("mpi", "generator", 1, 2, "generator"),
        ("multiworker", "raise", 1, 2, "loop"),
        ("mpi", "raise", 0, 2, "loop"),
    ],
)
def test_a_rank_that_raises_ends_all(engine, fault, victim, ranks, where):
    result, seconds = strike(engine, fault, victim, ranks)
    assert seconds < SOON
    traceback = result.output.index("Traceback (most recent call last)")
    mistake = result.output.index(f"ValueError: a mistake in the {where}")
    said = re.search(rf"rank \d ends: {named(victim)} raised .*ValueError: a mistake in the {where}", result.output)
    assert traceback < mistake < said.start()


def test_a_job_may_stand_still_as_a_whole_and_an_interrupted_rank_ends_all():
    """As with Ctrl-Z and fg, and then Ctrl-C: nobody takes the time in which all stood still for a fault."""
    with start("horovod", 2, "fault_ending", "nothing", 0, STALL_TIMEOUT) as job:
        for rank in (0, 1):
            job.wait_for_mark(rank, "trained", timeout=200)
        for sent in (signal.SIGSTOP, signal.SIGCONT):
            for rank in (0, 1):
                os.kill(job.pid_of_rank(rank), sent)
            time.sleep(STALL_TIMEOUT + 1)
        os.kill(job.pid_of_rank(1), signal.SIGINT)
        struck = time.monotonic()
        result = job.wait(timeout=300)
        assert time.monotonic() - struck < SOON
    assert re.search(rf"rank 0 ends: {named(1)} raised KeyboardInterrupt$", result.output, re.MULTILINE)
    assert "has not" not in result.output
    assert result.left_behind == []


@pytest.mark.parametrize(("engine", "victim"), [("horovod", 1), ("mpi", 0)])
def test_a_rank_that_leaves_the_others_alone_ends_all(engine, victim):
    """sys.exit(3) in the middle of training."""
    result, seconds = strike(engine, "exit", victim)
    assert seconds < SOON
    said = rf"rank \d ends: {named(victim)} has left, .* {GRADIENTS}"
    by_the_launcher = rf"Process name: \[\S+,{victim}\]\s+Exit code:\s+3"
    assert re.search(f"{said}|{by_the_launcher}", result.output)


@pytest.mark.parametrize(("engine", "victim"), [("horovod", 0), ("gloo", 1), ("mpi", 1), ("multiworker", 0)])
def test_a_killed_rank_ends_all(engine, victim):
    result, seconds = strike(engine, "SIGKILL", victim)
    assert seconds < SOON
    said = rf"rank {1 - victim} ends: {named(victim)} has ended without a word \(killed\?\)"
    # Launchers kill the others at once, and may be faster than they can speak.
    by_the_launcher = (
        rf"process rank {victim} with PID \d+ \S+ \S+ exited on\s+signal 9|Process name: {victim}\s+Exit code: 137"
    )
    assert re.search(said if engine == "multiworker" else f"{said}|{by_the_launcher}", result.output)


@pytest.mark.parametrize(("engine", "victim"), [("horovod", 1), ("gloo", 0), ("mpi", 0), ("multiworker", 1)])
def test_a_stopped_rank_ends_all(engine, victim):
    """The stopped process is gone as well: the launcher may wait for it, but the ranks that go kill it."""
    result, seconds = strike(engine, "SIGSTOP", victim, stall_timeout=STALL_TIMEOUT)
    assert STALL_TIMEOUT - 2 < seconds < STALLED
    said = (
        rf"rank {1 - victim} ends: {named(victim)} has not answered for 5 s.* {named(1 - victim)} waits in {GRADIENTS}"
    )
    assert re.search(said, result.output)


@pytest.mark.parametrize(("engine", "victim"), [("horovod", 1), ("mpi", 0)])
def test_a_rank_that_falls_behind_ends_all(engine, victim):
    """It is alive, and sleeps between two steps."""
    result, seconds = strike(engine, "sleep", victim, stall_timeout=STALL_TIMEOUT)
    assert STALL_TIMEOUT - 2 < seconds < STALLED
    said = rf"{named(1 - victim)} has waited for 5 s in {GRADIENTS}: {named(victim)} has not come there, it was past"
    assert re.search(said, result.output)


def test_a_busy_rank_has_time_as_long_as_it_is_busy():
    result, seconds = strike("mpi", "busy", 0, stall_timeout=STALL_TIMEOUT)
    assert 3 * STALL_TIMEOUT - 2 < seconds < 2 * STALL_TIMEOUT + STALLED
    assert re.search(rf"{named(1)} has waited .*: {named(0)} has not come there, it was past", result.output)


@pytest.mark.parametrize("engine", ["horovod", "multiworker"])
def test_checkpoints_may_take_longer_than_ranks_are_patient(engine, tmp_path):
    """Writing, looking for, and reading them: each sleeps for longer than stall_timeout."""
    result = launch(engine, 2, "busy", tmp_path, 2, 3, timeout=200).check()
    assert [report["steps"] for report in result.reports] == [[2, 3]] * 2


@pytest.mark.parametrize(("engine", "first"), [("horovod", 1), ("mpi", 0), ("multiworker", 0)])
def test_a_rank_may_end_when_nobody_needs_it(engine, first):
    result = launch(engine, 2, "fault_early", first, timeout=300).check()
    assert [report["joined"] for report in result.reports] == [1, 0]
    assert "ends:" not in result.output


@pytest.mark.parametrize("late", [0, 1])
def test_a_good_bye_may_take_long(late):
    assert "ends:" not in launch("mpi", 2, "fault_leaving", late, timeout=120).check().output
