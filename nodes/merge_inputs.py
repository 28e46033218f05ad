"""Inputs that the merging nodes share; those of the advanced group are folded in the front end."""

from __future__ import annotations

from typing import Any, Literal

from comfy_api.latest import io

from ..iteris_core.lora_files import DTYPES
from .schema import Concepts, advanced


def model_inputs() -> list[Any]:
    return [
        io.Model.Input("model", tooltip="The base model; it is only run, never changed."),
        io.Clip.Input("clip", tooltip="The base model's text encoders."),
        Concepts.Input("concepts", tooltip="What is to be merged: two concepts or more."),
    ]


def sampling_inputs() -> list[Any]:
    return [
        io.Int.Input(
            "samples",
            default=50,
            min=1,
            max=1000,
            tooltip="Prompts per concept on which features are collected. Below 20 the merge "
            "fits its prompts too closely.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=False,
            tooltip="Decides prompts and latents. The same seed gives the same LoRA.",
        ),
    ]


def latent_inputs() -> list[Any]:
    return advanced(
        io.Int.Input(
            "timesteps",
            default=4,
            min=1,
            max=10,
            tooltip="Latents per prompt, from different steps of denoising.",
        ),
        io.Int.Input(
            "latent_size",
            default=0,
            min=0,
            max=256,
            tooltip="Side of the latents, an eighth of the picture's. 0 stands for 64.",
        ),
        io.Combo.Input(
            "latents",
            options=["denoising", "noise"],
            default="denoising",
            tooltip="denoising runs each LoRA's own ten steps. noise skips them: quick, a little "
            "worse.",
        ),
    )


def advanced_inputs() -> list[Any]:
    return advanced(
        io.Combo.Input(
            "schedule",
            options=["sweep", "jacobi"],
            default="sweep",
            tooltip="sweep solves every layer once, in order. jacobi is the paper's iteration: the "
            "same result, later.",
        ),
        io.Float.Input(
            "ridge",
            default=0.0,
            min=0.0,
            max=0.5,
            step=1e-7,
            round=False,
            tooltip="How strongly a layer is drawn toward the plain LoRAs. 0 chooses by the number "
            "of samples (0.000001 from 50 on). Above 0.001 it gives most of the merge away.",
        ),
        io.Combo.Input(
            "balance",
            options=["tokens", "adapter", "full", "none"],
            default="tokens",
            tooltip="What evens out the concepts: the number of tokens, the size of each LoRA's "
            "own outputs (paper), the layer's whole output, or nothing.",
        ),
        io.Boolean.Input(
            "repair",
            default=True,
            tooltip="Also changes layers that no LoRA changes, to take out what the concepts leave "
            "of each other: nearer to each LoRA alone, in a larger file.",
        ),
        *latent_inputs(),
        io.Int.Input(
            "rank",
            default=0,
            min=0,
            max=1024,
            tooltip="Largest rank of the merged LoRA. 0 keeps the sum of the LoRAs' ranks.",
        ),
        io.Combo.Input(
            "dtype",
            options=list(DTYPES),
            default="float16",
            tooltip="Precision of the merged LoRA.",
        ),
        *memory_inputs(),
    )


def memory_inputs() -> list[Any]:
    return advanced(
        io.Float.Input(
            "memory",
            default=0.0,
            min=0.0,
            max=1024.0,
            step=0.1,
            optional=True,
            tooltip="GiB that the merge may take beyond the model. 0 takes what is free. Where "
            "that is not enough for all samples, some are left out, and the report says so.",
        ),
    )


def budget_of(memory: float) -> int | Literal["free"]:
    """Bytes, from the input ``memory``."""
    return round(memory * 2**30) if memory else "free"
