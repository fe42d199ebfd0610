"""The short form of `python -m tests.soak`: one kill of each kind."""

from soak import KINDS, soak


def test_a_training_that_is_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path):
    counts = soak(tmp_path, kills=len(KINDS), minutes=10, steps=160)
    assert counts.pop("steps") >= 160
    assert counts.pop("seconds") > 0
    assert counts == {
        "kills": dict.fromkeys(KINDS, 1),
        "lost": 0,
        "repeated": 0,
        "unreadable": 0,
        "different": 0,
    }
