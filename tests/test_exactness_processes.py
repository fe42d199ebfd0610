"""The exactness matrix in real processes, on every engine: the update of one device on the whole batch, the same bits on
all ranks."""

import itertools

import numpy as np
import pytest
from helpers import relative_error, share
from once import once
from problem import SPLITS, Training, batches, cases_of_processes, clipping, expected

from launch import BACKEND, launch


def weights_of(arrays, case, split, moment):
    return [arrays[f"{' '.join(map(str, case))} {split} {moment} {i}"] for i in range(4)]


@pytest.fixture
def trained(tmp_path_factory):
    """(engine, ranks) -> what the ranks of that job have left. Each job runs once, for all tests."""

    def run(engine, ranks):
        name = f"exactness-{engine}-{ranks}"
        return once(tmp_path_factory, name, lambda: launch(engine, ranks, "exactness", timeout=1200).check())

    return run


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("engine", ["horovod", "gloo", "mpi", "multiworker"])
def test_update_is_that_of_one_device(trained, engine, ranks):
    result = trained(engine, ranks)
    assert [(r["rank"], r["size"], r["backend"]) for r in result.reports] == [
        (rank, ranks, BACKEND[engine]) for rank in range(ranks)
    ]
    wrong = []
    for case, split in itertools.product(cases_of_processes(ranks), SPLITS[ranks]):
        _, clip, optimizer = case
        before_ref, first_ref, last_ref = expected(clip, optimizer, sum(SPLITS[ranks][split]))
        before, first, last = (weights_of(result.arrays[0], case, split, m) for m in ("before", "first", "last"))
        assert [w.tobytes() for w in before] == [w.tobytes() for w in before_ref]
        errors = relative_error(first, before, first_ref), relative_error(last, before, last_ref)
        if errors[0] > 1e-6 or errors[1] > 1e-5:
            wrong.append((*case, split, *errors))
    assert not wrong
    for other in result.arrays[1:]:
        assert other.keys() == result.arrays[0].keys()
        assert all(other[name].tobytes() == w.tobytes() for name, w in result.arrays[0].items())


def test_engines_make_the_same_update(trained, local, two):
    """Two mirrored replicas, two ranks of each engine, and one device."""
    case = (2, "global_norm", "adam")

    def here(comm, sizes):
        training = Training(comm, "adam", accumulate=2, after_reduce=clipping("global_norm"), jit=False)
        return training.run(lambda i: share(comm, batches(29)[i], np.roll(sizes, i)), steps=1)

    before, alone, _ = here(local, [29])
    updates = {"local": alone, "mirrored": here(two, [20, 9])[1]}
    for engine in BACKEND:
        updates[engine] = weights_of(trained(engine, 2).arrays[0], case, "ragged", "first")
    for one, other in itertools.combinations(updates, 2):
        assert relative_error(updates[one], before, updates[other]) <= 1e-6, (one, other)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("engine", ["horovod", "gloo", "mpi", "multiworker"])
def test_models_are_those_of_one_device(engine, ranks):
    """BatchNormalization over all ranks, embeddings, tied weights, masks, sample weights: judged in the ranks."""
    result = launch(engine, ranks, "models", timeout=900).check()
    assert result.reports == [{"done": True}] * ranks
