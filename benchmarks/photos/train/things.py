"""The step ``things``: which cut-outs the base learns and which are held out, into world.json."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from ..things import ROOT, listed, split


def train(work: Path, weights: Path) -> dict[str, int]:
    """Download the package unless it is there, and write the list."""
    package = work / "package"
    if not package.exists():
        work.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "tuxpaint-stamps-default"], cwd=work, check=True)
        archive = next(work.glob("tuxpaint-stamps-default_*.deb"))
        subprocess.run(["dpkg-deb", "-x", archive.name, package.name], cwd=work, check=True)
    known, held = split(list(listed(package)))
    path = ROOT / "world.json"
    given = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    given = {"sampling": {"guidance": 3.0, "steps": 12}, **given, "held_out": held, "things": known}
    text = json.dumps(given, indent=1)
    # A thing a line.
    text = re.sub(r"\[\s+(\"[^\[\]]+?\")\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    path.write_text(text + "\n", encoding="utf-8")
    return {"things": len(known), "held_out": len(held)}
