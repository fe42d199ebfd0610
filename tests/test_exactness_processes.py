"""The exactness matrix in real processes, on every engine: the update of one device on the whole batch, the same bits on
all ranks."""

import itertools

import pytest
from helpers import relative_error
from problem import CLIPS, OPTIMIZERS, SPLITS, expected

from launch import BACKEND, launch

CASES = list(itertools.product([1, 2, 5], CLIPS, OPTIMIZERS))


def weights_of(arrays, case, split, moment):
    return [arrays[f"{' '.join(map(str, case))} {split} {moment} {i}"] for i in range(4)]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("engine", ["horovod", "gloo", "mpi", "multiworker"])
def test_update_is_that_of_one_device(engine, ranks):
    result = launch(engine, ranks, "exactness", timeout=1200).check()
    assert [(r["rank"], r["size"], r["backend"]) for r in result.reports] == [
        (rank, ranks, BACKEND[engine]) for rank in range(ranks)
    ]
    wrong = []
    for case, split in itertools.product(CASES, SPLITS[ranks]):
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


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("engine", ["horovod", "gloo", "mpi", "multiworker"])
def test_models_are_those_of_one_device(engine, ranks):
    """BatchNormalization over all ranks, embeddings, tied weights, masks, sample weights: judged in the ranks."""
    result = launch(engine, ranks, "models", timeout=900).check()
    assert result.reports == [{"done": True}] * ranks
