"""Formulas for changes that depend on the base's own weight W: OFT, BOFT, GLoRA and DoRA.

* OFT (arXiv 2306.07280): W' = s · R W with R block-diagonal and orthogonal, each block a Cayley
  transform of a skew-symmetric Q. BOFT (arXiv 2311.06243): R is a product of such, with rows
  shuffled in a butterfly. ``rescale`` is s, a factor for each output. ``alpha`` times the number of
  outputs bounds ‖Q‖; 0 is no bound.
* GLoRA (arXiv 2306.07967) as LyCORIS writes it: ΔW = (W a₁ a₂ + b₁ b₂) alpha / rank, low rank
  exactly. Older files have the halves the other way round (W a₂ a₁ + b₂ b₁).

If ComfyUI differs from LyCORIS, LyCORIS is followed: ComfyUI omits OFT's rescale, and bounds ‖Q‖ by
alpha alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import LoraFileError
from .factors import Factors
from .formulas import Parts, Rebuilt, ScaleAt, Shape, require

GLORA = {"a1", "a2", "b1", "b2"}


def needs_weight(parts: Parts) -> str | None:
    """The parametrisation of ``parts`` if its change is unknown without the base's weight. DoRA is
    not included: it has a change of its own."""
    if "oft_blocks" in parts:
        return "a BOFT" if parts["oft_blocks"].ndim == 4 else "an OFT"
    return "a GLoRA" if parts.keys() & GLORA else None


def rotation(parts: Parts, weight: Tensor, alpha: float) -> Tensor:
    """W' − W for OFT, with blocks (count, size, size), or for BOFT, (stages, count, size, size);
    ``weight`` is (out, in·kh·kw)."""
    blocks, (outputs, width) = parts["oft_blocks"], weight.shape
    require(blocks.ndim in (3, 4) and blocks.shape[-1] == blocks.shape[-2])
    count, size = blocks.shape[-3:-1]
    require(count * size == outputs)
    skew = blocks - blocks.mT
    norm, bound = float(skew.norm()), alpha * outputs
    if 0 < bound < norm:
        skew = skew * (bound / norm)
    one = torch.eye(size)
    turns = torch.linalg.solve(one - skew, one + skew, left=False)
    if blocks.ndim == 3:
        moved = (turns.mT @ weight.view(count, size, width)).flatten(0, 1)
    else:
        moved = _butterfly(turns, weight)
    if (rescale := parts.get("rescale")) is not None:
        require(rescale.numel() == outputs)
        moved = moved * rescale.reshape(-1, 1)
    return moved - weight


def _butterfly(turns: Tensor, weight: Tensor) -> Tensor:
    """R W. In stage i, rows at distance 2^i · size / 2 are placed next to each other while the
    blocks rotate them."""
    stages, count, size, _ = turns.shape
    require(size % 2 == 0 and count % 2 ** (stages - 1) == 0)
    rows = torch.arange(len(weight))
    for stage, turn in enumerate(turns):
        order = rows.view(-1, 2, 2**stage * size // 2).mT.flatten()
        weight = (turn @ weight[order].view(count, size, -1)).flatten(0, 1)[order.argsort()]
    return weight


def glora(parts: Parts, shape: Shape, scale: ScaleAt, weight: Tensor) -> Rebuilt:
    """ΔW for GLoRA; ``weight`` is (out, in·kh·kw)."""
    require(all(parts[name].ndim >= 2 for name in GLORA))
    a1, a2, b1, b2 = (parts[name].flatten(1) for name in sorted(GLORA))
    outputs, inputs, taps = shape[0], shape[1], math.prod(shape[2:])

    def fits() -> bool:
        rank = len(a2)
        return (a1.shape, a2.shape) == ((inputs, rank), (rank, inputs)) and (
            (b1.shape, b2.shape) == ((outputs, rank), (rank, inputs * taps))
        )

    if not fits():
        a1, a2, b1, b2 = a2, a1, b2, b1
        require(fits())
    rank = len(a2)
    read = torch.einsum("oik,ir->ork", weight.view(outputs, inputs, taps), a1).flatten(1)
    up, down = torch.cat([read, b1], 1), torch.cat([torch.kron(a2, torch.eye(taps)), b2])
    made = Factors(up, down, scale(rank))
    return made if made.rank < min(weight.shape) else made.dense()


def fold_magnitude(change: Tensor, weight: Tensor, parts: Parts, place: str) -> Tensor:
    """W' − W for DoRA, W' = m · (W + ΔW) / ‖W + ΔW‖; ``change``, ``weight`` are (out, in·kh·kw).

    m is the part ``output_magnitude`` (peft's ``lora_magnitude_vector``; one number per output, the
    norm over everything else) or ``magnitude`` (``dora_scale`` in LyCORIS and kohya; its shape
    gives the axis: (out, 1, …) outputs, (1, in, …) inputs). Source: arXiv 2402.09353, eq. 5. Raises
    :class:`LoraFileError`, starting with ``place``, if it does not fit.
    """
    moved = weight + change
    outputs, width = moved.shape
    by_output = "output_magnitude" in parts
    scale = parts["output_magnitude" if by_output else "magnitude"].float()
    size = scale.numel()
    by_input = not by_output and scale.ndim >= 2 and scale.shape[0] == 1 and outputs > 1
    if (size != scale.shape[1] or width % size) if by_input else size != outputs:
        raise LoraFileError(
            f"{place}: the magnitude of this DoRA has shape {tuple(scale.shape)}, but the base "
            f"model's weight there is {tuple(moved.shape)}; it was made for another base model."
        )
    # (outputs, inputs, kernel), or (outputs, 1, all the rest)
    cube = moved.reshape(outputs, size if by_input else 1, -1)
    norm = cube.norm(dim=(0, 2) if by_input else (1, 2), keepdim=True)
    new = cube * (scale.reshape(norm.shape) / (norm + torch.finfo(torch.float32).eps))
    return new.reshape(outputs, width) - weight
