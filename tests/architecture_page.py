"""``docs/architectures.md`` from ``benchmarks/results/architectures.json``.

``python tests/architecture_page.py > docs/architectures.md``
"""

import json
import sys
import textwrap
from collections.abc import Mapping
from typing import Any

from architecture_results import FILE

HEAD = """\
# Tested architectures

Each row is a test on real classes at reduced widths with random weights, in float32. *version* is
the application's version in the test. The prompts differ in length and include the empty prompt and
one of more than 77 tokens. Nothing else is promised. The tests write the figures to
`benchmarks/results/architectures.json` (`WRITE_RESULTS=1`); `python tests/architecture_page.py >
docs/architectures.md` makes this page from it.

- **alone**: the merge of a single LoRA against that LoRA in the application's own loader, as a
  share of the LoRA's effect on the image. A test fails above 1e-3.
- **rows**: merges with 32 and with 5 rows per forward; the largest relative difference in any
  layer. A test fails above 5e-3.
- **file**: the saved file in the application's own loader against the merge itself, as a share of
  the merge's effect on the image. A test fails above 1e-3.
- **drift**: at how many layers the merge repairs what the concepts' interference leaves in the
  residual stream, and where saliency is measured. Layers behind gates are found by running the
  model. For ComfyUI this was measured on 0.8.0, and on 0.33.0 for the newest classes; some have no
  figure.

Layers that are *left out* cannot be merged by their features, because they mix the rows of a batch
or no forward reaches them. They are refused, or with `skip` left out and listed. The figures are
for the remaining layers.
"""

TITLES = {
    "comfyui": (
        "ComfyUI",
        "`tests/comfy/test_every_architecture.py`. In ComfyUI a LoRA file may use any name in the "
        "loaded class's own key map.",
    ),
    "diffusers": (
        "diffusers",
        "`tests/hosts/test_pipelines.py`. LoRA files in peft's and diffusers' layout work for all "
        "of them. Files in other layouts are read with built-in tables for Stable Diffusion and "
        "FLUX.1. For the others the pipeline's own converter reads them, if it loses nothing.",
    ),
}


def page(found: Mapping[str, Any]) -> str:
    """The page in Markdown."""
    parts = [HEAD]
    for key, (title, text) in TITLES.items():
        rows: Mapping[str, Mapping[str, Any]] = found.get(key, {})
        if not rows:
            continue
        text = textwrap.fill(f"{len(rows)} architectures, tested in {text}", 100)
        parts.append(f"## {title}\n\n{text}\n")
        lines = [
            ["architecture", "version", "alone", "rows", "file", "drift", "remarks"],
            ["---", "---", *["---:"] * 3, "---", "---"],
        ]
        for name in sorted(rows, key=str.lower):
            figures = rows[name]
            cells = [f"{figures[law]:.1e}" for law in ("alone", "rows", "file")]
            drift = figures.get("drift", "")
            lines.append([name, figures["version"], *cells, drift, _remarks(figures)])
        parts.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(parts)


def _remarks(figures: Mapping[str, Any]) -> str:
    said = {"left_out": "left out: {}", "settings": "merged with {}"}
    return "; ".join(text.format(figures[key]) for key, text in said.items() if key in figures)


if __name__ == "__main__":
    sys.stdout.write(page(json.loads(FILE.read_text(encoding="utf-8"))))
