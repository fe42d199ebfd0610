"""`disttrain why`, as a user runs it: in a process of its own, which TensorFlow has not started in."""

import json
import os
import subprocess
import sys

import pytest

RUN = "from disttrain.cli.why import why; why()"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("why") / "results"
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", RUN, "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "global_clipnorm=0.1" in done.stdout
    assert "why.png" in done.stdout.splitlines()[-1]
    return out


@pytest.fixture(scope="module")
def cases(folder):
    rows = json.loads((folder / "why.json").read_text())["cases"]
    return {row["case"]: row for row in rows}


def test_disttrain_keeps_its_promise_in_every_case(cases):
    assert {key: row["disttrain_error"] for key, row in cases.items() if not row["disttrain_error"] <= 1e-6} == {}


def test_plain_fit_is_right(cases):
    assert cases["plain"]["peer_error"] <= 1e-6


@pytest.mark.parametrize("key", ["global_clipnorm", "clipvalue", "sample_weights"])
def test_fit_on_two_replicas_is_far_off(cases, key):
    assert cases[key]["peer_error"] > 0.3


@pytest.mark.parametrize(("key", "name"), [("accumulation", "RuntimeError"), ("ragged", "InvalidArgumentError")])
def test_fit_on_two_replicas_raises(cases, key, name):
    assert cases[key]["peer_failure"] == name
    assert cases[key]["peer_error"] is None


@pytest.mark.parametrize("key", ["ragged_last", "uneven_accumulation"])
def test_a_mean_of_means_is_off(cases, key):
    assert 0.03 < cases[key]["peer_error"] < 0.2


@pytest.mark.parametrize("key", ["minimize", "reduced_twice"])
def test_an_own_loop_makes_twice_the_update(cases, key):
    assert cases[key]["peer_error"] == pytest.approx(1.0, abs=1e-4)


def test_horovod_is_far_off(cases):
    assert cases["horovod"]["peer_error"] == pytest.approx(0.5, abs=0.1)


def test_files(folder, cases):
    assert (folder / "why.png").read_bytes().startswith(b"\x89PNG")
    table = [line for line in (folder / "why.md").read_text().splitlines() if line.startswith("|")]
    assert len(table) == len(cases) + 2
    assert all(line.count("|") == 5 for line in table)


def test_an_error_of_our_own_is_said():
    from disttrain.cli import why
    from disttrain.errors import DisttrainError
    from disttrain.lesson.case import Outcome
    from disttrain.lesson.cases import CASES

    why._check([Outcome(CASES[0], 0.5, None, None, 1e-7)])
    for broken in (2e-6, float("nan")):
        with pytest.raises(DisttrainError, match="disttrain's own error is above 1e-06: plain"):
            why._check([Outcome(CASES[0], 0.5, None, None, broken)])


def test_a_sentence_that_the_run_belies_is_not_printed():
    from disttrain.lesson.case import Outcome
    from disttrain.lesson.cases import CASES
    from disttrain.lesson.report import lesson

    accumulation = next(case for case in CASES if case.key == "accumulation")
    assert lesson(Outcome(accumulation, None, "RuntimeError", "merge_call", 1e-7)) == accumulation.lesson
    assert "(raises): the update is right" in lesson(Outcome(accumulation, 1e-7, None, None, 1e-7))
    assert "(right): no such device" in lesson(Outcome(CASES[0], None, "ValueError", "no such device", 1e-7))
