"""Peak memory of accumulation against one big batch, each in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from disttrain.errors import DisttrainError

_EXAMPLES = 2048
_STEPS = 3


def compare_memory(accumulate: int = 16) -> list[dict[str, Any]]:
    """Peak resident memory above that before the first step, for a CNN and 2,048 images."""
    rows = [{"accumulate": k, "peak_mib": _measure(k)} for k in (1, accumulate)]
    return [{**row, "ratio": row["peak_mib"] / rows[0]["peak_mib"]} for row in rows]


def _measure(accumulate: int) -> float:
    command = [sys.executable, "-m", "disttrain.bench.memory", str(accumulate)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise DisttrainError(f"measuring memory failed: {result.stderr.strip().splitlines()[-1]}")
    return float(result.stdout.split()[-1])


def _peak_of_steps(accumulate: int) -> float:
    import keras
    import tensorflow as tf

    import disttrain as dt
    from disttrain.bench.workloads import batch_for
    from disttrain.models import cnn

    model = cnn()
    batch = tuple(map(tf.constant, batch_for(model, _EXAMPLES)))
    step = dt.TrainStep(
        model,
        keras.optimizers.Adam(1e-3),
        loss_fn=dt.losses.sparse_categorical_crossentropy(),
        comm=dt.init("local"),
        accumulate=accumulate,
        jit=False,
    )
    before = _peak_mib()
    for _ in range(_STEPS):
        step(batch)
    return _peak_mib() - before


def _peak_mib() -> float:
    """Of this process. getrusage would not do: its maximum is inherited from the parent through fork and exec."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


if __name__ == "__main__":
    sys.stdout.write(f"{_peak_of_steps(int(sys.argv[1])):.1f}\n")
