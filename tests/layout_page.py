"""``docs/layouts.md`` from ``benchmarks/results/architectures.json``.

``python tests/layout_page.py > docs/layouts.md``
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

from architecture_results import FILE

HEAD = """\
# Layouts and kinds of LoRA files

The LoRA file layouts and kinds that IterIS reads and writes. The tests write the figures to
`benchmarks/results/architectures.json`; `python tests/layout_page.py > docs/layouts.md` makes this
page from it. For ComfyUI's names of other architectures see [architectures](architectures.md).

## Layouts

*error* compares images from reduced models: the file as IterIS reads it, against the LoRA added to
the weights by hand. It is the largest over all bases and alphas. *diffusers' own loader* says what
that loader gets wrong with the same file; an empty cell means that its image is the same. IterIS
reads all names and alphas from every layout. `iteris convert` writes those that have an option.
"""

KINDS = """\
## Kinds

The figures are errors: a weight's change as IterIS reads it from a file, against the change that
the named program computes from the same file. Each is the largest over linear layers and
convolutions. The output is always a plain LoRA; *becomes* says what is lost. `energy` is the share
of a layer's change to keep, 99.9 % by default.
"""

REFUSED = """\
IterIS refuses OFT, BOFT, GLoRA, IA3, LoHa and LoKr in Tucker's form, and changes of biases,
normalisations and shapes. The message names them; with `--allow-partial` they are left out and
listed.
Learned embeddings in the file are read, and written beside the merged file.
"""

BASES = {"sd1": "SD 1.x", "sdxl": "SDXL", "sd3": "SD 3", "flux": "FLUX.1"}
LAYOUTS = {
    "kohya": ("sd-scripts", "`lora_unet_….lora_down.weight`", "kohya"),
    "kohya_sgm": ("sd-scripts, the original code's blocks", "`lora_unet_input_blocks_…`", ""),
    "peft": ("diffusers today", "`unet.….lora_A.weight`", "peft"),
    "peft_new": ("diffusers with transformers 5", "`text_encoder.….lora_A.weight`", ""),
    "peft_raw": ("peft's own", "`unet.base_model.model.….lora_A.weight`", ""),
    "diffusers_old": ("diffusers before", "`….processor.to_q_lora.down.weight`", ""),
    "diffusers_oldest": ("diffusers' first", "the same without a component", ""),
    "onetrainer": ("OneTrainer", "`lora_transformer_….lora_down.weight`", ""),
    "simpletuner": ("SimpleTuner's LyCORIS", "`lycoris_….lora_down.weight`", ""),
    "original": ("ComfyUI, ai-toolkit", "`diffusion_model.….lora_A.weight`", ""),
    "bfl": ("Black Forest Labs", "`double_blocks.….lora_A.weight`", ""),
    "xlabs": ("XLabs", "`double_blocks.….processor.qkv_lora1.down.weight`", ""),
}
"""layout → who writes it, names, and ``iteris convert --layout``"""

EXACT, CUT, WEIGHTS = (
    "the same change",
    "cut to `energy`",
    "cut to `energy`; reads the base's weights",
)
TITLES = {
    "lora": ("LoRA", EXACT), "locon": ("LoCon", EXACT),
    "loha": ("LoHa", f"{EXACT} where its rank is low, else {CUT}"),
    "lokr": ("LoKr", f"{EXACT} where its rank is low, else {CUT}"),
    "full difference": ("full difference", CUT), "dora": ("DoRA", WEIGHTS),
}  # fmt: skip


def page(found: Mapping[str, Any]) -> str:
    """The page in Markdown."""
    return "\n".join([HEAD, _layouts(found["layouts"]), KINDS, _kinds(found["kinds"]), REFUSED])


def _layouts(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    rows = [["written by", "names", "bases", "error", "`--layout`", "diffusers' own loader"]]
    rows.append(["---", "---", "---", "---:", "---", "---"])
    for layout, (who, names, option) in LAYOUTS.items():
        bases = found[layout]
        error = max(of["error"] for of in bases.values())
        said: dict[str, list[str]] = {}
        for base in BASES:
            if base in bases and bases[base]["diffusers"]:
                said.setdefault(bases[base]["diffusers"], []).append(BASES[base])
        wrong = "; ".join(f"{', '.join(of)}: {text}" for text, of in said.items())
        known = ", ".join(title for base, title in BASES.items() if base in bases)
        rows.append([who, names, known, f"{error:.1e}", f"`{option}`" if option else "", wrong])
    return _table(rows)


def _kinds(found: Mapping[str, Mapping[str, float]]) -> str:
    oracles = sorted({oracle for errors in found.values() for oracle in errors})
    rows = [["kind", *oracles, "becomes"], ["---", *["---:"] * len(oracles), "---"]]
    for kind, (title, becomes) in TITLES.items():
        cells = [f"{found[kind][o]:.1e}" if o in found[kind] else "" for o in oracles]
        rows.append([title, *cells, becomes])
    return _table(rows)


def _table(rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    sys.stdout.write(page(json.loads(FILE.read_text(encoding="utf-8"))))
