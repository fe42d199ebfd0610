"""What the API server accepts, and what then hangs, fails, runs on the launcher alone, or keeps GPUs for nothing.

A rule looks at one thing and yields faults. Where one fault would make another rule complain too, that rule keeps silent:
one cause, one fault.
"""

from __future__ import annotations

from collections.abc import Iterator

from disttrain.launcher.kubernetes.places import Document, Fault
from disttrain.launcher.kubernetes.rules import indexed, mpijob, trainer


def check(document: Document, others: list[Document]) -> Iterator[Fault]:
    """The faults of a document that is sound. `others`: what stands in the same file."""
    root = document.root
    if document.kind == "MPIJob":
        yield from mpijob.mpijob(root)
    elif document.kind == "Job":
        yield from indexed.job(root, others)
    elif document.kind == "JobSet":
        yield from indexed.jobset(root)
    elif document.kind == "TrainJob":
        yield from trainer.trainjob(root, others)
    elif document.kind in ("TrainingRuntime", "ClusterTrainingRuntime"):
        yield from trainer.runtime(root)
