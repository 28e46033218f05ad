"""Twenty concepts for one merge: the reported ten, and ten more behind words of their own.

``python benchmarks/twenty_concepts.py`` lays them out in ``build/twenty`` and trains the LoRAs that
are not there, by the rule of ``reported_concepts.py`` with another seed; ``--only WORD …`` trains
some of them. The base's ten rare tokens are taken, so that the further words come in pieces. Then
``python benchmarks/unseen.py --world twenty --sizes 20``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import reported_concepts
from outputs import ROOT as PROJECT

import toybox
from toybox.train.loras import train

ROOT = PROJECT / "build" / "twenty"
SEED = 2027
FIRST_NUMBER = 300
WORDS = ("zug", "wex", "vob", "kij", "hyd", "fum", "gax", "bip", "cuz", "jov")


def lay_out(root: Path) -> None:
    """world.json of all twenty, and the reported ten's pictures and LoRAs."""
    own, reported = toybox.concepts(), toybox.concepts(reported_concepts.ROOT)
    classes = [concept.class_word for concept in own.values()]
    known = [*own.values(), *reported.values()]
    more = reported_concepts.chosen(classes, SEED, known)
    more = [{**entry, "token": word} for entry, word in zip(more, WORDS, strict=True)]
    first = json.loads((reported_concepts.ROOT / "world.json").read_text())["concepts"]
    root.mkdir(parents=True, exist_ok=True)
    for folder in ("references", "weights/loras"):
        shutil.copytree(reported_concepts.ROOT / folder, root / folder, dirs_exist_ok=True)
    reported_concepts.write_world(root, FIRST_NUMBER, [*first, *more])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], choices=WORDS, metavar="WORD")
    if not (ROOT / "world.json").exists():
        lay_out(ROOT)
    work = ROOT.with_name("twenty-work")
    work.mkdir(exist_ok=True)
    train(work, toybox.ROOT / "weights", parser.parse_args().only, root=ROOT)
