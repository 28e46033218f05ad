"""Three LoRAs of photographs in one picture: ``python benchmarks/three_loras.py``.

What it shows was fixed before it was drawn: the first set of ``frozen/photos.yaml`` with three
LoRAs, the first two prompts on new words of each, and their seeds. Writes
``docs/images/three-loras.jpg``.
"""

from __future__ import annotations

from typing import Any

from outputs import ROOT
from PIL import Image
from protocol.classes import SeveralClasses
from protocol.held_out import merged
from protocol.plan import Unit
from worlds import WORLDS

from iteris_core.score import contact_sheet

ROWS = {
    "average": "average",
    "all at once": "sum",
    "Chain of Merges": "chain-of-merges:conditions=0",
    "IterIS": "iteris",
}
PROMPTS = 2
"""Of each LoRA."""


def main() -> None:
    world: Any = WORLDS["photos"]()
    (names,) = SeveralClasses(world, [], [3], 1, per_size=1).sets(3, 0)
    concepts = world.concepts(names, 0)
    every = world.prompted("new words", names, 1)
    wanted = [one for name in names for one in [w for w in every if w.shown == (name,)][:PROMPTS]]
    alone = [
        image
        for concept in concepts
        for image in world.draw(concept.lora, [w for w in wanted if w.shown == (concept.name,)])
    ]
    rows: dict[str, list[Image.Image | None]] = {
        "no LoRA": list(world.draw(None, wanted)),
        "each LoRA alone": alone,
    }
    for label, method in ROWS.items():
        how = Unit.parsed(method)
        options = {"settings": how.settings, "calibration": how.calibration}
        rows[label] = list(world.draw(merged(world, concepts, how.method, **options), wanted))
    sheet = contact_sheet(rows, [one.prompt for one in wanted], cell=128)
    sheet.save(ROOT / "docs" / "images" / "three-loras.jpg", quality=90)


if __name__ == "__main__":
    main()
