"""``benchmarks/results/speed.json`` is what its script makes of the figures in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEED = ROOT / "benchmarks" / "speed"
DATA = json.loads((ROOT / "benchmarks" / "results" / "speed.json").read_text())
FLOORS = [part for part in DATA["raw"] if part.startswith("floor")]


def test_the_ratios_are_those_of_the_figures():
    script = f"""
import json, sys
sys.path[:0] = [{str(SPEED)!r}, {str(ROOT)!r}]
import run
print(json.dumps([run.ratios(json.loads(run.RESULTS.read_text())["raw"]), list(run.PARTS)]))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    ratios, parts = json.loads(ran.stdout)
    assert ratios == DATA["ratios"]
    assert set(DATA["raw"]) <= set(parts)
    assert set(DATA["rounds"]) == set(DATA["raw"])


@pytest.mark.parametrize("part", FLOORS)
def test_a_floor_is_the_merge_over_the_bare_forward(part):
    entry = DATA["raw"][part]
    assert entry["floor"] == entry["merge"] / entry["bare"]
    if "merge without repair" in entry:
        assert entry["floor without repair"] == entry["merge without repair"] / entry["bare"]
