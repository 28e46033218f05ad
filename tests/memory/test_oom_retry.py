"""Out of memory is always handled by a retry with less."""

from __future__ import annotations

import pytest
import torch

from iteris_core.activations.meter import is_out_of_memory
from iteris_core.activations.oom_retry import halved, with_less
from iteris_core.errors import OutOfMemory


@pytest.mark.parametrize(("rows", "wanted"), [(1, [1]), (8, [8, 4, 2, 1]), (11, [11, 5, 2, 1])])
def test_rows_are_halved_down_to_one(rows, wanted):
    assert list(halved(rows)) == wanted


def needs(most, error):
    def run(rows):
        if rows > most:
            raise error
        return -rows

    return run


def complaint(said, tried):
    return f"{said} {tried}"


def test_the_first_way_for_which_there_is_memory_is_taken():
    freed = []
    error = RuntimeError("CUDA out of memory")
    found = with_less(halved(8), needs(2, error), complaint, release=lambda: freed.append(1))
    assert found == (-2, 2)
    assert len(freed) == 2


def test_without_any_the_ways_that_were_tried_are_reported():
    with pytest.raises(OutOfMemory, match=r"can't allocate memory.* \[2, 1\]"):
        with_less(halved(2), needs(0, RuntimeError("can't allocate memory")), complaint)


def test_other_errors_are_passed_on():
    with pytest.raises(ValueError, match="wrong"):
        with_less(halved(8), needs(2, ValueError("wrong")), complaint)
    assert with_less([8, 1], needs(2, ValueError()), complaint, ran_out=lambda _: True) == (-1, 1)


def test_g13_an_older_torch_has_cuda_s_error_alone(monkeypatch):
    monkeypatch.delattr(torch, "OutOfMemoryError")
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(ValueError("another error, which is not masked"))
