"""Every benchmark script imports; this finds names that the code no longer has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(file.stem for file in (ROOT / "benchmarks").glob("*.py"))
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
sys.exit("\\n".join(broken) or 0)
"""


def test_every_script_imports():
    path = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'benchmarks')]!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", path + IMPORTS, *SCRIPTS], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
