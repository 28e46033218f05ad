"""The settings of ``iteris``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import SettingsError
from ..settings import Settings, setting
from .registry import micro_batch_setting, rank_setting


@dataclass(frozen=True)
class IterisSettings(Settings):
    objective: Literal["output", "adapter"] = setting(
        "output",
        "What a layer is held against: its whole output under each LoRA, or what each LoRA adds to "
        "it (adapter: the paper's eq. 5).",
    )
    schedule: Literal["sweep", "jacobi"] = setting(
        "sweep",
        "sweep solves every layer once, in order. jacobi is the paper's iteration over all layers: "
        "many passes, and another result where it does not converge, as may be with repair or "
        "saliency; the report says so. The paper's whole algorithm is the preset paper.",
    )
    iterations: int = setting(10, "jacobi: at most so many iterations.", low=1, most=100)
    tolerance: float | None = setting(
        None,
        "jacobi: stop as soon as no layer's change moves by more than this share of itself, such "
        "as 0.001.",
        none="run all iterations",
        above=0,
        below=1,
    )
    weighting: Literal["tokens", "adapter", "full", "none"] = setting(
        "tokens",
        "What evens out the concepts: the number of tokens, the size of each LoRA's own outputs "
        "(adapter: the paper's eq. 8), the layer's whole output, or nothing.",
    )
    ridge: float | None = setting(
        None,
        "How strongly a layer is drawn toward the plain LoRAs (the paper's eq. 7). Above 0.001 it "
        "gives most of the merge away.",
        none="by the number of prompts that ran: 1e-6 from 50 for each of two LoRAs, 20 of five or "
        "10 of ten on; below, more",
        low=0,
        below=1,
        most=0.5,
        step=1e-7,
    )
    pull: Literal["mean", "size"] | None = setting(
        None,
        "What the ridge draws a layer toward: the weighted mean of the LoRAs, as in the paper, or "
        "that mean made as large as the LoRAs are (size), since a mean of unlike changes is small.",
        none="mean; with so few prompts that the ridge, chosen as well, is larger, size",
    )
    shrink: float = setting(
        1.0,
        "What off-diagonal entries of the moments are multiplied by; less than 1 where a concept "
        "has not many more tokens than a layer has inputs, such as 0.5 for text classifiers.",
        above=0,
        high=1,
    )
    rank: int | float | None = rank_setting(
        "Largest rank of the merged LoRA.", share="output energy", most=1024
    )
    share_ranks: bool = setting(
        False,
        "The rank is that of the file: it is as large as with that rank in every layer that a LoRA "
        "changes, and each layer has what it is worth. The model is swept twice.",
    )
    micro_batch: int = micro_batch_setting()
    row_tokens: int | Literal["all"] | None = setting(
        None,
        "At most so many tokens of every row are counted, chosen at random by the seed.",
        none="of pictures 128, or what gives a concept 32 for each of a layer's inputs; of texts "
        "all",
        low=1,
        most=100_000,
    )
    saliency: float | None = setting(
        None,
        "How much more those places of a picture count where a LoRA acts.",
        none="1 - 2 / LoRAs, since two hardly compete",
        low=0,
        high=1,
    )
    precision: Literal["float32", "float64"] = setting("float32", "dtype of the moments.")
    repair: bool = setting(
        True,
        "Also changes layers that no LoRA changes, to take out what the concepts leave of each "
        "other: nearer to each LoRA alone, in a larger file.",
    )
    repair_inputs: float | None = setting(
        None,
        "The share of a feed-forward's hidden units that a repair may use.",
        none="half for two LoRAs of a model that makes pictures, else all",
        above=0,
        high=1,
    )
    block_steps: int = setting(
        0,
        "Adam steps on what each block gives, block by block after the closed form: gradients, but "
        "never through the whole model, and no data. For two LoRAs; for more, in proportion. "
        "120 are worth their time for several concepts in one picture, for many, or a low rank.",
        low=0,
        most=1000,
    )
    block_rate: float = setting(
        0.05, "Learning rate of those steps, relative to the size of what is trained.", above=0
    )
    block_pairs: float = setting(
        0.5,
        "The share of those steps on pictures that show two of the concepts, from prompts that "
        "name both: each half is drawn toward what its own LoRA makes of it.",
        low=0,
        below=1,
    )
    polish_steps: int = setting(
        0,
        "Adam steps on the final output after the closed form: gradients through the whole model, "
        "but no data. Not in ComfyUI.",
        low=0,
    )
    polish_rate: float = setting(5e-4, "Learning rate of the polish.", above=0)

    def check(self) -> None:
        super().check()
        if not self.share_ranks:
            return
        if not isinstance(self.rank, int):
            raise SettingsError("share_ranks wants a whole rank to share, such as rank=16.")
        if self.schedule != "sweep" or self.objective != "output":
            raise SettingsError("share_ranks is for schedule=sweep with objective=output.")
