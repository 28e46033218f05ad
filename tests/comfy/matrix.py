"""The tests of the nodes over versions of ComfyUI, each with a Python that has its requirements.

``python tests/comfy/matrix.py COMFYUI=PYTHON [COMFYUI=PYTHON …] [-- PYTEST ARGUMENTS]``, or ``make
test-comfy MATRIX="…"``. Prints a line for each, and fails where one fails. Without arguments for
pytest the tests run that are neither slow nor of a server's front end.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
USUAL = ["-m", "comfyui and not slow", str(HERE)]
_PYTHON = "import platform; print(platform.python_version())"


def version_of(comfyui: Path) -> str:
    for name in ("comfyui_version.py", "pyproject.toml"):
        file = comfyui / name
        if file.is_file() and (
            found := re.search(r'version__?\s*=\s*"([^"]+)"', file.read_text(encoding="utf-8"))
        ):
            return found[1]
    return "?"


def run(comfyui: Path, python: str, arguments: list[str]) -> tuple[bool, str]:
    """Whether all passed, and what to say of it."""
    said = subprocess.run([python, "-c", _PYTHON], capture_output=True, text=True, check=True)
    started = time.monotonic()
    environment = {**os.environ, "COMFYUI_PATH": str(comfyui), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)  # this repository's `nodes` would shadow ComfyUI's
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    found = subprocess.run(
        command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True
    )
    last = (found.stdout.strip().splitlines() or ["no output"])[-1]
    if found.returncode:
        print(found.stdout[-6000:], found.stderr[-2000:], sep="\n")
    minutes = (time.monotonic() - started) / 60
    name = f"ComfyUI {version_of(comfyui)}, Python {said.stdout.strip()}"
    return found.returncode == 0, f"{name}: {last} ({minutes:.1f} min)"


def main(arguments: list[str]) -> int:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    pairs, given = arguments[:at], arguments[at + 1 :]
    if not pairs or not all("=" in pair for pair in pairs):
        print(__doc__)
        return 2
    results = []
    for pair in pairs:
        comfyui, _, python = pair.partition("=")
        results.append(run(Path(comfyui).resolve(), python, given or USUAL))
        print(results[-1][1], flush=True)
    return 0 if all(passed for passed, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
