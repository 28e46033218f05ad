"""The pages' figures match ``benchmarks/results``, and these match what the scripts produce."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = sorted(file.stem for file in BENCHMARKS.glob("*.py"))
IMPORTS = """
import importlib, sys
broken, path = [], list(sys.path)
for name in sys.argv[1:]:
    sys.path[:] = path
    sys.modules.pop("conftest", None)
    try:
        importlib.import_module(name)
    except ImportError as error:
        broken.append(f"{name}: {error}")
if broken:
    sys.exit("\\n".join(broken))
import run
"""

sys.path.append(str(BENCHMARKS))

import results_page  # noqa: E402
import tables  # noqa: E402

MADE_ELSEWHERE = {
    "architectures.md",  # tests/hosts/test_architecture_page.py
    "layouts.md",
    "settings.md",  # tests/cli/test_settings.py
}
NOT_FROM_A_FILE = {
    "| path | what | parameters |",  # toybox/README.md: the sizes of what is there
    "| step | threads | time | result |",  # toybox/README.md: what its training says
    "| setting | affects | default | change it when |",
}
"""The first lines of tables with numbers that no JSON has."""


def python(code: str, *arguments: str, **environment: str) -> str:
    """What another Python prints that runs ``code`` among the scripts."""
    path = os.pathsep.join(map(str, (BENCHMARKS, BENCHMARKS / "speed", ROOT)))
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


def test_every_page_is_what_its_figures_make():
    assert tables.renew(write=False) == []
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


@pytest.mark.slow
def test_every_script_imports_and_floors_are_of_their_times():
    """The former finds names that the code no longer has."""
    python(IMPORTS, *SCRIPTS)
    data = json.loads((BENCHMARKS / "results" / "speed.json").read_text())
    for entry in (entry for part, entry in data["raw"].items() if part.startswith("floor")):
        assert entry["floor"] == entry["merge"] / entry["bare"]


@pytest.mark.parametrize("quick", ["", "1"])
def test_what_is_a_part_is_written_beside(quick):
    code = (
        'import outputs as o; print(o.result_file("a.json"), o.result_file("a.json", whole=False))'
    )
    beside = str(ROOT / "build" / "quick" / "a.json")
    whole = beside if quick else str(BENCHMARKS / "results" / "a.json")
    assert python(code, QUICK=quick).split() == [whole, beside]
