"""The step ``references``: features of pictures of each held-out thing that no LoRA learns from.

The pictures themselves stay out of this repository, as their package's licence is another one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from emoji.features import Features
from safetensors.torch import save_file

from .. import REFERENCES
from ..things import cutouts, references, world

EACH = 14


def train(work: Path, weights: Path) -> dict[str, float]:
    """Two on each background; how many further pictures the features tell apart."""
    cuts, reader = cutouts(work / "package"), Features()
    known, read = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for number, (token, file, *_) in enumerate(world()["held_out"]):
        features = reader.embed_images(references(cuts[file], number, 2 * EACH))
        known[token], read[token] = features[:EACH], features[EACH:]
    save_file({name: of.half().contiguous() for name, of in known.items()}, weights / REFERENCES)
    means = torch.stack([of.mean(0) for of in known.values()])
    right = [
        float(((of @ means.T).argmax(1) == i).float().mean()) for i, of in enumerate(read.values())
    ]
    likeness = [float((of @ means[i]).mean()) for i, of in enumerate(read.values())]
    return {"drawn_judge": round(float(np.mean(right)), 3),
            "drawn_likeness": round(float(np.mean(likeness)), 3)}  # fmt: skip
