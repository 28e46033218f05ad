"""The pages' figures match ``benchmarks/results``, and these match what the scripts produce."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import results_page
import tables

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
SPEED = BENCHMARKS / "speed"
DATA = json.loads((BENCHMARKS / "results" / "speed.json").read_text())
FLOORS = [part for part in DATA["raw"] if part.startswith("floor")]
SCRIPTS = [path for path in BENCHMARKS.rglob("*.py") if path.name != "outputs.py"]

MADE_ELSEWHERE = {
    "architectures.md",  # tests/hosts/test_architecture_page.py
    "layouts.md",
    "results.md",  # below
    "settings.md",  # tests/cli/test_settings.py
}
NOT_FROM_A_FILE = {
    "| path | what | parameters |",  # toybox/README.md: the sizes of what is there
    "| step | threads | time | result |",  # toybox/README.md: what its training says
    "| setting | affects | default | change it when |",
    "| method | repository | largest relative difference |",  # decisions.md: what a test finds
}
"""The first lines of tables with numbers that no JSON has."""


def test_every_table_is_what_its_json_says():
    assert tables.renew(write=False) == []


def test_the_page_of_results_and_its_plots_are_what_the_figures_make():
    assert results_page.stale(write=False) == []


@pytest.mark.parametrize(
    "page", [p for p in tables.PAGES if p.name not in MADE_ELSEWHERE], ids=lambda page: page.name
)
def test_every_table_of_figures_is_made_from_a_json(page):
    found = re.findall(r"(?:^ *\|.*\|\n)+", tables.outside(page.read_text()), re.MULTILINE)
    by_hand = [table for table in found if is_of_figures(table)]
    assert not [t for t in by_hand if t.splitlines()[0].strip() not in NOT_FROM_A_FILE]


def is_of_figures(table: str) -> bool:
    """Whether a cell behind the first begins with a number."""
    rows = [line.strip().strip("|").split("|")[1:] for line in table.splitlines()[2:]]
    return any(re.match(r"\s*[*+-]*\.?\d", cell) for row in rows for cell in row)


def test_a_place_is_filled_and_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(tables, "TABLES", {"one": lambda: ["| a |", "|---|", "| 2 |"]})
    page = "text\n  <!-- table one -->\n  | a |\n  |---|\n  | 1 |\n  <!-- end -->\nmore\n"
    new, stale = tables.rewritten(page)
    assert stale == ["one"]
    assert new == page.replace("1", "2")
    assert tables.rewritten(new) == (new, [])
    assert tables.outside(new) == "text\n\nmore\n"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_get_the_file_that_they_write_from_outputs(script):
    """Which a run that is made smaller does not write over: the test below."""
    assert not re.search(r"/ \"results\"|results/\w+\.json\"", script.read_text())


@pytest.mark.parametrize("quick", ["", "1"])
def test_what_is_a_part_is_written_beside(quick):
    script = """
import outputs
print(outputs.result_file("a.json"), outputs.result_file("a.json", whole=False))
"""
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "QUICK": quick, "PYTHONPATH": str(BENCHMARKS)},
        capture_output=True,
        text=True,
    )
    beside = str(ROOT / "build" / "quick" / "a.json")
    whole = beside if quick else str(BENCHMARKS / "results" / "a.json")
    assert ran.stdout.split() == [whole, beside], ran.stderr


def test_the_ratios_are_those_of_the_figures():
    script = f"""
import json, sys
sys.path[:0] = [{str(SPEED)!r}, {str(ROOT)!r}]
import run
print(json.dumps([run.ratios(json.loads(run.FILE.read_text())["raw"]), list(run.PARTS)]))
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
