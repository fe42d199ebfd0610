"""The command line, as a user types it: each command in a process of its own."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import disttrain
from disttrain.observe.summary import make_folder


def run(*arguments, folder, code=0, **variables):
    """Runs `disttrain` and returns what it printed on stdout and stderr."""
    command = [str(Path(sys.executable).parent / "disttrain"), *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TF_")} | {"COLUMNS": "100", **variables}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


def load_in_plain_keras(path, script):
    """Loads a saved model in a process that has never heard of disttrain, and evaluates an expression of it."""
    code = f"import keras, sys, numpy as np; model = keras.models.load_model({str(path)!r}); print('RESULT', {script})"
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("RESULT", 1)[1].strip()


def test_version_and_help_are_quick_and_say_what_there_is(tmp_path):
    assert run("--version", folder=tmp_path)[0].strip().endswith(disttrain.__version__)
    said = run("--help", folder=tmp_path)[0]
    assert all(word in said for word in ("train", "why", "bench"))
    said = run("train", "digits", "--help", folder=tmp_path)[0]
    options = [
        "backend",
        "replicas",
        "batch-size",
        "accumulate",
        "epochs",
        "steps",
        "lr",
        "clip-norm",
        "precision",
        "seed",
        "out",
    ]
    assert all(f"--{option}" in said for option in options)


def test_train_digits(tmp_path):
    out = tmp_path / "results"
    options = ["--replicas", 2, "--accumulate", 2, "--epochs", 3, "--batch-size", 32, "--out", out]
    said, progress = run("train", "digits", *options, folder=tmp_path)
    assert "held out: loss" in said
    assert "examples/s" in said
    assert "Traceback" not in progress
    summary = json.loads((out / "summary.json").read_text())
    assert summary["backend"] == "mirrored"
    assert summary["replicas"] == 2
    assert summary["steps"] == 3 * 45  # 1437 images: 44 batches of 32 and one of 29
    assert summary["examples"] == 3 * 1437
    assert summary["config"]["accumulate"] == 2
    assert summary["config"]["lr"] == 3e-3
    assert summary["command"][1:3] == ["train", "digits"]
    assert summary["versions"]["disttrain"] == disttrain.__version__
    assert summary["validation"]["accuracy"] > 0.95
    assert (
        load_in_plain_keras(out / "digits.keras", "model.predict(np.zeros((2, 8, 8, 1)), verbose=0).shape") == "(2, 10)"
    )


def test_train_finetune_moves_the_head_alone(tmp_path):
    run("train", "finetune", "--replicas", 2, "--epochs", 3, "--out", tmp_path, folder=tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    first, second = summary["digits 0 to 4"], summary["digits 5 to 9"]
    assert first["validation"]["accuracy"] > 0.9
    assert second["validation"]["accuracy"] > 0.5
    assert [name.split("/")[-2:] for name in second["trained_variables"]] == [["head", "kernel"], ["head", "bias"]]
    assert len(first["trained_variables"]) > 2


def test_train_charlm_on_a_text_of_ones_own(tmp_path):
    text = tmp_path / "a text.txt"
    text.write_bytes(b"to be or not to be, that is the question. " * 400)
    options = [
        "--text",
        text,
        "--steps",
        6,
        "--batch-size",
        8,
        "--precision",
        "mixed_bfloat16",
        "--out",
        tmp_path / "lm",
    ]
    run("train", "charlm", *options, folder=tmp_path)
    summary = json.loads((tmp_path / "lm" / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["validation"]["loss"] < 5.6  # nats per byte; log(256) is 5.5
    shape = load_in_plain_keras(tmp_path / "lm" / "charlm.keras", "model(np.zeros((1, 16), 'int32')).shape")
    assert shape == "(1, 16, 256)"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "charlm", "--text", "missing.txt"], "cannot read the text missing.txt: No such file or directory"),
        (["train", "digits", "--backend", "nccl"], "unknown backend 'nccl': use 'auto', 'local', 'mirrored',"),
        (
            ["train", "digits", "--backend", "local", "--replicas", "2"],
            "backend 'local' has one replica a process, 2 asked for",
        ),
        (["train", "digits", "--batch-size", "5000"], "--batch-size 5000 is more than the 1437 examples there are"),
        (["train", "digits", "--lr", "-1"], "--lr -1.0: must be above zero"),
        (["train", "digits", "--out", "/proc/nowhere"], "cannot write to the folder /proc/nowhere"),
    ],
)
def test_errors_are_one_line(tmp_path, arguments, sentence):
    _, said = run(*arguments, folder=tmp_path, code=1)
    assert said.startswith("disttrain: error: ")
    assert sentence in said
    assert len(said.strip().splitlines()) == 1


def test_keras_is_told_to_run_on_tensorflow(tmp_path):
    said, _ = run("train", "digits", "--steps", 1, folder=tmp_path, KERAS_BACKEND="jax")
    assert "1 steps on 1 replicas (local)" in said


def test_debug_shows_the_traceback(tmp_path):
    _, said = run("--debug", "train", "charlm", "--text", "missing.txt", folder=tmp_path, code=1)
    assert "Traceback (most recent call last)" in said
    assert "cannot read the text missing.txt" in said


def test_wrong_usage_says_what_is_right(tmp_path):
    _, said = run("train", "digits", "--epochs", "1", "--steps", "2", folder=tmp_path, code=2)
    assert "--epochs and --steps: give one of the two" in said


def test_bench_checkpoint(tmp_path):
    said, _ = run("bench", "checkpoint", "--millions", 1, "--saves", 2, "--out", tmp_path, folder=tmp_path)
    assert "by the call" in said
    row = json.loads((tmp_path / "checkpoint.json").read_text())
    assert 0.5e6 < row["parameters"] < 2e6
    assert 12 * row["parameters"] < row["bytes"] < 13 * row["parameters"]  # weights and Adam's two slots
    assert row["steps"] >= 2
    assert row["held_up"] == pytest.approx(row["call"] + row["steps_during"])
    assert row["mb_per_s"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.json"]


def test_bench_step(tmp_path):
    said, _ = run("bench", "step", "--model", "cnn", "--rounds", 5, "--out", tmp_path, folder=tmp_path)
    assert "TrainStep" in said
    results = json.loads((tmp_path / "step.json").read_text())
    assert [row["jit"] for row in results["step"]] == ["False", "True", "auto"]
    assert all(0.2 < row["ratio"] < 5 for row in results["step"])
    big, accumulated = results["memory"]
    assert (big["accumulate"], accumulated["accumulate"]) == (1, 16)
    assert accumulated["peak_mib"] < 0.6 * big["peak_mib"]


def test_bench_input(tmp_path):
    said, _ = run("bench", "input", "--source", "tfrecords", "--rounds", 1, "--out", tmp_path, folder=tmp_path)
    assert "reading alone" in said
    (row,) = json.loads((tmp_path / "input.json").read_text())
    assert (row["source"], 0.2 < row["ratio"] < 5, 0 < row["alone_ms"] < row["fed_ms"]) == ("tfrecords", True, True)


def test_ranks_may_make_a_folder_at_the_same_time(tmp_path):
    with ThreadPoolExecutor(8) as ranks:
        for number in range(20):
            folder = tmp_path / f"{number}" / "out"
            assert list(ranks.map(make_folder, [folder] * 100)) == [folder] * 100
            assert list(folder.iterdir()) == []
