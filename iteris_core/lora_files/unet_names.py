"""What the original (LDM, SGM) code calls the modules of a UNet that diffusers names."""

from __future__ import annotations

import re
from collections.abc import Iterable

_TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}

_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}

_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}

_BLOCK = re.compile(
    r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
_MID = re.compile(r"mid_block\.((?:resnets|attentions)\.\d+)\.(.+)")


def original_names(paths: Iterable[str]) -> dict[str, str]:
    """Original name of every module path of one whole UNet; modules without one are left out.

    The numbering follows from the paths: ``layers`` resnets per down block, one more per up block.
    """
    paths = list(paths)
    found = [match for match in map(_BLOCK.fullmatch, paths) if match]
    first = [int(m[4]) for m in found if (m[1], m[2], m[3]) == ("down", "0", "resnets")]
    layers = max(first, default=0) + 1
    attentive = {m[2] for m in found if (m[1], m[3]) == ("up", "attentions")}
    names: dict[str, str] = {}
    for path in paths:
        if path in _TOP:
            names[path] = _TOP[path]
        elif mid := _MID.fullmatch(path):
            if mid[1] in _MIDDLE:
                names[path] = f"middle_block.{_MIDDLE[mid[1]]}.{_inner(mid[1], mid[2])}"
        elif block := _BLOCK.fullmatch(path):
            names[path] = _block_name(block, layers, block[2] in attentive)
    return names


def _inner(kind: str, rest: str) -> str:
    return _RESNET.get(rest, rest) if kind.startswith("resnets") else rest


def _block_name(match: re.Match[str], layers: int, attentive: bool) -> str:
    side, kind, rest = match[1], match[3], match[5]
    block, layer = int(match[2]), int(match[4])
    start = block * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{start + layers + 1}.0.{'op' if rest == 'conv' else rest}"
    if kind == "upsamplers":
        return f"output_blocks.{start + layers}.{2 if attentive else 1}.{rest}"
    part = 0 if kind == "resnets" else 1
    number = start + layer + (1 if side == "down" else 0)
    name = "input_blocks" if side == "down" else "output_blocks"
    return f"{name}.{number}.{part}.{_inner(kind, rest)}"
