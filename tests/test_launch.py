"""The scripts of launch/ that start a training, as they are but for its length."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
SCRIPTS = sorted(path.name for path in (REPOSITORY / "launch").iterdir())


@pytest.mark.parametrize(
    ("script", "backend"), [("single_node.sh", "multiworker"), ("mpirun.sh", "horovod"), ("horovodrun.sh", "horovod")]
)
def test_a_script_trains_on_two_ranks_of_this_machine(script, backend, tmp_path):
    # As in an environment that is active; without GPUs, whatever this machine has.
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["bash", REPOSITORY / "launch" / script, "--steps", "3", "--out", tmp_path],
        cwd=tmp_path,  # scripts find their way themselves
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^disttrain: 2 ranks on \S+ came to their end", done.stderr, re.MULTILINE)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["replicas"], summary["backend"], summary["steps"]) == (2, backend, 3)
    assert (tmp_path / "digits.keras").exists()


def test_scripts_are_sound():
    words = [BIN / "shellcheck", "--external-sources", "--shell=bash", "--exclude=SC1091", *SCRIPTS]
    done = subprocess.run(words, cwd=REPOSITORY / "launch", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert len(SCRIPTS) >= 7
