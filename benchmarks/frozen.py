"""A comparison that is named before it is run: ``python benchmarks/frozen.py frozen/photos.yaml``.

The file names the state of the code, what is merged, by which methods, and what is compared. It has
to be committed, and :data:`CODE` has to be as in the commit that it names. Then its merges are run,
into ``results/unseen_WORLD_frozen_runs.jsonl``; a run that was stopped goes on (``--seconds``).
What comes out is printed, whatever it is.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from outputs import ROOT

CODE = (
    "iteris_core",
    "toybox",
    "benchmarks/rivals",
    "benchmarks/protocol",
    "benchmarks/photos",
    "benchmarks/minilm",
    "benchmarks/emoji",
    "benchmarks/captions.py",
)


def git(*arguments: str) -> str:
    """Its output; SystemExit with what it says against it."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr or f"git {' '.join(arguments)} failed")
    return done.stdout.strip()


def check(path: Path, plan: dict[str, Any]) -> None:
    """Raise SystemExit unless the file is committed as it is and the code is as it says."""
    if not git("log", "--format=%H", "-1", "--", str(path)):
        raise SystemExit(f"{path} is not committed: commit it before anything of it is run.")
    if changed := git("diff", "--name-only", "HEAD", "--", str(path)):
        raise SystemExit(f"{changed} was changed after its commit.")
    if changed := git("diff", "--name-only", plan["code"], "--", *CODE):
        raise SystemExit(f"The code is not that of {plan['code']}:\n{changed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing after")
    given = parser.parse_args()
    path, until = given.file.resolve(), time.monotonic() + given.seconds
    plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    check(path, plan)
    for world, sizes in plan["worlds"].items():
        options = {"world": world, "sizes": ",".join(map(str, sizes)), "tag": "frozen",
                   "methods": ",".join(plan["methods"]), "replicates": plan["trainings"],
                   "sets": plan["sets"], "seconds": max(0.0, until - time.monotonic())}  # fmt: skip
        command = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        script = str(Path(__file__).with_name("unseen.py"))
        subprocess.run([sys.executable, script, *command], check=True)


if __name__ == "__main__":
    main()
