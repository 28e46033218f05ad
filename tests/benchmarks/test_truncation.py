"""Weighted truncation is better than plain SVD on the toybox's own inputs."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytest.importorskip("toybox")


@pytest.mark.slow
def test_weighted_truncation_wins_at_every_rank():
    path = Path(__file__).parents[2] / "benchmarks" / "truncation.py"
    table = runpy.run_path(str(path))["measure"](["sks1", "sks2"])
    assert len(table) == 6
    for rank, errors in table.items():
        assert errors["weighted"] < errors["plain"], rank
