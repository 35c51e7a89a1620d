"""What does not fit into memory is done in smaller parts."""

import pytest
import torch

from apiq.errors import ApiqError
from apiq.memory import in_parts


def test_parts_shrink_where_memory_runs_out_and_cover_everything_once():
    done = []

    def do(part):
        if part.stop - part.start > (2 if part.start >= 6 else 4):
            raise torch.OutOfMemoryError
        done.append(part)

    in_parts(11, 6, do, "it")
    assert [number for part in done for number in range(part.start, part.stop)] == list(range(11))
    assert [part.stop - part.start for part in done][:2] == [3, 3]


def test_one_that_does_not_fit_is_refused():
    def do(part):
        raise torch.OutOfMemoryError

    with pytest.raises(ApiqError, match="not enough memory for a cake with one window"):
        in_parts(5, 4, do, "a cake")


def test_other_failures_are_not_swallowed():
    def do(part):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        in_parts(5, 4, do, "it")
