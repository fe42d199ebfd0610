"""Which rank is slow and in what, and whether training waits for data: by given numbers, and in real processes."""

import dataclasses
import logging
import re
import socket
import time
from types import SimpleNamespace

import keras
import pytest
import tensorflow as tf

import disttrain as dt
from disttrain.observe.health import Health, Times, find, input_share, table
from launch import launch


def rank(number, step, waited, given=0.0, between=0.0, steps=100):
    """Times of so many steps, of which each took so many milliseconds."""
    sums = (step + given + between, step, waited, given)
    return Times(number, f"h{number}", steps, *(steps * milliseconds / 1000 for milliseconds in sums))


def said(*ranks):
    return [finding.said for finding in find(ranks)]


def test_a_rank_with_slow_input_is_named_with_it():
    ranks = rank(0, step=120, waited=50), rank(1, step=70, waited=0, given=50), rank(2, step=120, waited=48)
    assert said(*ranks) == [
        "rank 1 on h1 holds up every step by 48 ms, 40 % of it: by itself it takes 120 ms where others take 72 ms. "
        "Its input is slow: 50 ms where others take 0.0 ms"
    ]
    assert input_share(ranks) == 0.0  # it is one rank's, not everybody's


def test_a_rank_that_computes_slowly_is_named_with_it():
    (sentence,) = said(rank(0, step=120, waited=30, given=2), rank(1, step=120, waited=5, given=2))
    assert sentence.startswith("rank 1 on h1 holds up every step by 25 ms, 20 % of it")
    assert sentence.endswith("Its computing is slow: 115 ms where others take 90 ms")


def test_a_rank_that_saves_is_named_with_it():
    (sentence,) = said(rank(0, step=60, waited=10, between=40), rank(1, step=100, waited=50))
    assert sentence.endswith("What it does between steps (saving, showing) is slow: 40 ms where others take 0.0 ms")


def test_ten_percent_is_the_limit():
    assert said(rank(0, step=100, waited=12), rank(1, step=100, waited=3)) == []
    assert len(said(rank(0, step=100, waited=14), rank(1, step=100, waited=3))) == 1


def test_a_long_all_reduce_is_nobodys_fault():
    assert said(rank(0, step=100, waited=60), rank(1, step=100, waited=61), rank(2, step=100, waited=62)) == []


def test_one_of_many_is_held_against_the_one_in_the_middle():
    """Two slow ranks of five do not make slowness usual."""
    ranks = [rank(i, step=100, waited=30) for i in range(3)] + [
        rank(i, step=100, waited=w) for i, w in ((3, 10), (4, 8))
    ]
    (sentence,) = said(*ranks)
    assert sentence.startswith("rank 4 on h4 holds up every step by 22 ms, 22 % of it: by itself it takes 92 ms where")


def test_input_bound():
    ranks = rank(0, step=65, waited=5, given=35), rank(1, step=60, waited=5, given=40)
    assert said(*ranks) == [
        "input-bound: training waits 35 % of the time for data, 35 ms for each batch; cache or prefetch it, or prepare it "
        "in parallel"
    ]
    assert input_share(ranks) == pytest.approx(0.35)
    assert said(rank(0, step=91, waited=0, given=9)) == []
    assert said(rank(0, step=10, waited=0, given=4.9, steps=1000)) == []
    assert said(rank(0, step=10, waited=0, given=5.1, steps=1000)) != []


def test_what_is_found_again_is_about_the_same():
    first, again = (find([rank(0, step=120, waited=w), rank(1, step=70, waited=0, given=50)])[0] for w in (50, 47))
    assert first.about == again.about
    assert first.said != again.said


def test_a_short_time_tells_nothing():
    assert said(rank(0, step=120, waited=50, steps=10), rank(1, step=70, waited=0, given=50, steps=10)) == []
    assert said(rank(0, 0, 0, steps=0), rank(1, 0, 0, steps=0)) == []


def test_rows_are_means_of_a_step():
    (row,) = table([rank(3, step=80, waited=30, given=15, between=5, steps=7)])
    assert row == {
        "rank": 3,
        "host": "h3",
        "steps": 7,
        "step_seconds": 0.08,
        "waited_seconds": 0.03,
        "input_seconds": 0.015,
        "between_seconds": 0.005,
    }
    assert table([Times(0, "h0")])[0]["step_seconds"] == 0.0


@pytest.fixture(scope="module", params=[("mpi", 3), ("horovod", 2)], ids=lambda param: param[0])
def reports(request):
    """What each rank has to say of four trainings, in which every rank computes for 100 ms, and rank 1 may take 150 ms more."""
    engine, ranks = request.param
    return launch(engine, ranks, "health").check().reports


@pytest.mark.parametrize("part", ["input", "computing"])
def test_the_slow_rank_is_named_once_by_rank_0(reports, part):
    """Of two comparisons that find it."""
    reports = [report[part] for report in reports]
    (sentence,) = reports[0]["said"]
    assert sentence.startswith(f"rank 1 on {socket.gethostname()} holds up every step by ")
    assert f"Its {part} is slow" in sentence
    assert all(report["said"] == [] for report in reports[1:])
    rows = reports[0]["ranks"]
    assert all(report["ranks"] == rows for report in reports)
    assert [(row["rank"], row["steps"]) for row in rows] == [(rank, 20) for rank in range(len(reports))]
    for row in rows:
        slow = row["rank"] == 1
        assert row["waited_seconds"] == pytest.approx(0.0 if slow else 0.15, abs=0.05)
        assert row["input_seconds"] == pytest.approx(0.15 if slow and part == "input" else 0.0, abs=0.05)
        assert row["step_seconds"] + row["input_seconds"] == pytest.approx(0.25, abs=0.08)
    assert reports[0]["input_share"] < 0.1


def test_of_equal_ranks_none_is_named(reports):
    """After the first comparison there are more than the two seconds that it takes to name one."""
    assert [report["nothing"]["said"] for report in reports] == [[]] * len(reports)
    rows = reports[0]["nothing"]["ranks"]
    assert all(row["step_seconds"] > 0.1 and row["waited_seconds"] < 0.05 for row in rows)


def test_ranks_with_different_numbers_of_batches_compare_together(reports):
    """8, 12 and 16 batches: when ranks first compare, rank 0 has none left."""
    steps = 4 + 4 * len(reports)
    assert [report["uneven"]["steps"] for report in reports] == [steps] * len(reports)
    assert {row["steps"] for row in reports[0]["uneven"]["ranks"]} == {steps - 1}


def test_ranks_compare_every_ten_seconds_or_ten_steps():
    """Whichever is later: a thousand short steps are compared once, before it is known how short they are."""
    for seconds, steps, wanted in ((0.0, 1000, 1), (0.6, 30, 2)):
        gathered = []

        def gather(times, gathered=gathered, seconds=seconds):
            gathered.append(times)
            return [dataclasses.replace(times, seconds=times.seconds + seconds * times.steps)]

        health = Health(0, gather)
        for _ in health.reading(range(steps)):
            health.add(SimpleNamespace(traced=False, waited=0.0))
        assert [times.steps for times in gathered] == [10, 17][:wanted]
        assert health.summary()["ranks"][0]["steps"] == steps


def fit(local, batches, steps):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    loss = dt.losses.mean_squared_error()
    step = dt.TrainStep(model, keras.optimizers.SGD(0.01), loss_fn=loss, comm=local, jit=False)
    return dt.Trainer(step, progress=False).fit(batches, steps=steps)


def batches(seconds):
    while True:
        time.sleep(seconds)
        yield tf.ones([4, 3]), tf.ones([4, 1])


def test_a_training_that_waits_for_data_is_told_so_once(local, caplog):
    """Two comparisons find it."""
    with caplog.at_level(logging.WARNING, "disttrain"):
        summary = fit(local, batches(0.25), 21)
    (record,) = [record.getMessage() for record in caplog.records if record.name == "disttrain"]
    assert re.match(r"input-bound: training waits (9\d|100) % of the time for data, 2\d\d ms for each batch", record)
    (row,) = summary["ranks"]
    assert (row["rank"], row["steps"], row["waited_seconds"]) == (0, 20, 0.0)
    assert row["input_seconds"] == pytest.approx(0.25, abs=0.05)
    assert summary["input_share"] > 0.9


def test_the_first_step_is_left_out_and_a_fast_one_says_nothing(local, caplog):
    with caplog.at_level(logging.WARNING, "disttrain"):
        summary = fit(local, batches(0.0), 1)
    assert (summary["ranks"][0]["steps"], summary["input_share"], caplog.records) == (0, 0.0, [])


def test_a_step_says_when_it_traced(local):
    """XLA compiles anew for every shape of batch, a graph is traced once."""
    for jit, wanted in ((False, [True, False, False, False]), (True, [True, False, True, False])):
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        loss = dt.losses.mean_squared_error()
        step = dt.TrainStep(model, keras.optimizers.SGD(0.01), loss_fn=loss, comm=local, jit=jit)
        outs = [step((tf.ones([n, 3]), tf.ones([n, 1]))) for n in (4, 4, 2, 4)]
        assert [out.traced for out in outs] == wanted
        assert [out.waited for out in outs] == [0.0] * 4
