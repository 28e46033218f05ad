"""The settings of ``iteris``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..errors import SettingsError
from ..settings import Settings, setting
from .registry import micro_batch_setting, rank_setting


@dataclass(frozen=True)
class IterisSettings(Settings):
    objective: Literal["output", "adapter"] = setting(
        "output",
        "Targets of a layer: its whole output under each LoRA, or only what each LoRA adds to it "
        "(adapter: the paper's eq. 5).",
    )
    schedule: Literal["sweep", "jacobi"] = setting(
        "sweep",
        "sweep solves every layer once, in order. jacobi is the paper's iteration over all "
        "layers, with many passes. With repair or saliency it may not converge; the report says "
        "so. For the paper's whole algorithm use the preset paper.",
    )
    iterations: int = setting(10, "jacobi: maximum number of iterations.", low=1, most=100)
    tolerance: float | None = setting(
        None,
        "jacobi: stop when every layer's change moves by less than this share of itself, such as "
        "0.001.",
        none="run all iterations",
        above=0,
        below=1,
    )
    weighting: Literal["auto", "tokens", "adapter", "full", "none"] = setting(
        "auto",
        "How to balance the concepts: by the number of tokens, the size of each LoRA's own "
        "outputs (adapter: the paper's eq. 8), the layer's whole output, or not at all. auto is "
        "tokens, and none for models of texts.",
    )
    ridge: float | None = setting(
        None,
        "How strongly a layer is pulled toward the plain LoRAs (the paper's eq. 7). Above 0.001 "
        "most of the merge is lost.",
        none="set by the number of prompts: 1e-6 from 50 per LoRA with two LoRAs, 20 with five or "
        "10 with ten; more with fewer",
        low=0,
        below=1,
        most=0.5,
        step=1e-7,
    )
    pull: Literal["mean", "size"] | None = setting(
        None,
        "What the ridge pulls a layer toward: the weighted mean of the LoRAs, as in the paper, or "
        "that mean scaled to the LoRAs' size (size), because a mean of unlike changes is small.",
        none="mean; size, if prompts are few and the automatic ridge is larger",
    )
    bound: float | None = setting(
        None,
        "Largest norm of a layer's change, as a multiple of what the LoRAs together have there. A "
        "layer's ridge is raised until it holds, so that the merge also works at other strengths "
        "and beside other LoRAs. 0: no bound.",
        none="4; none in a model whose blocks gate what they add, but where a layer's output is "
        "not gated",
        low=0,
        most=1000,
    )
    shrink: float | None = setting(
        None,
        "Factor on off-diagonal entries of the moments. Less than 1 is for a concept that has "
        "hardly more tokens than a layer has inputs.",
        none="1; less for models of texts, in layers where tokens are few",
        above=0,
        high=1,
    )
    rank: int | float | None = rank_setting(
        "Largest rank of the merged LoRA.", share="output energy", most=1024
    )
    share_ranks: bool = setting(
        False,
        "rank limits the file as a whole: it is as large as with that rank in every layer that a "
        "LoRA changes, and each layer gets the rank it is worth. The model is swept twice.",
    )
    micro_batch: int = micro_batch_setting()
    row_tokens: int | Literal["all"] | None = setting(
        None,
        "Maximum number of tokens used from each row, chosen at random by the seed.",
        none="for images 128, or as many as give a concept 32 per input of a layer; for texts all",
        low=1,
        most=100_000,
    )
    saliency: float | None = setting(
        None,
        "How much more the image regions count where a LoRA acts.",
        none="1 - 2 / LoRAs, because two hardly compete",
        low=0,
        high=1,
    )
    precision: Literal["float32", "float64"] = setting("float32", "dtype of the moments.")
    repair: bool = setting(
        True,
        "Also change layers that no LoRA changes, to remove interference between the concepts. "
        "The result is nearer to each LoRA alone; the file is larger.",
    )
    repair_inputs: float | None = setting(
        None,
        "Share of a feed-forward's hidden units that a repair may use.",
        none="half for two LoRAs on an image model, otherwise all",
        above=0,
        high=1,
    )
    block_steps: int = setting(
        0,
        "Adam steps on each block's output, block by block after the closed form. Uses gradients, "
        "but never through the whole model, and no data. The number is for two LoRAs and grows in "
        "proportion with more. 120 are worth their time for several concepts in one image, many "
        "concepts or a low rank.",
        low=0,
        most=1000,
    )
    block_rate: float = setting(
        0.05, "Learning rate of block_steps, relative to the size of the trained factors.", above=0
    )
    block_pairs: float = setting(
        0.5,
        "Share of block_steps on images of two concepts, from prompts that name both. Each half "
        "is trained toward its own LoRA's output.",
        low=0,
        below=1,
    )
    removed: ClassVar[Mapping[str, str]] = {"polish_steps": "block_steps", "polish_rate": ""}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.share_ranks:
            return
        if not isinstance(self.rank, int):
            raise SettingsError("share_ranks needs a whole number as rank, such as rank=16.")
        if self.schedule != "sweep" or self.objective != "output":
            raise SettingsError("share_ranks needs schedule=sweep and objective=output.")
