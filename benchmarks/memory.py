"""The planned memory of merging two LoRAs on full-size models, with default samples, on no device.

``python benchmarks/memory.py`` writes ``results/memory.json``. The models are diffusers' classes on
the meta device, in half precision, at their pipelines' own sizes; attention is counted as one
fused kernel, as GPUs run it. There is a plan for each of :data:`HOSTS`. ``left_out`` are samples
that do not fit into the budget, the memory that the merge may use beyond the model. ``waiting_mib``
is the peak memory of a sample's two waiting rows, if they wait at the end of every level.
``forwards`` of one row include denoising and the sweep, without block replays; ``tera_operations``
are theirs, without attention.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from outputs import read, result_file, write
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from iteris_core import Calibration, Concept, Lora, LowRank
from iteris_core.activations.host_pool import HostPool, Pieces
from iteris_core.activations.rows import Row
from iteris_core.architectures import unet
from iteris_core.architectures.sites import residual_streams
from iteris_core.hosts.protocol import Stage
from iteris_core.lora import SiteChanges
from iteris_core.methods.fitting import IterisSettings, solver_of, with_repairs
from iteris_core.passes.batches import ExecutionConfig, limit_of, sampled_rows
from iteris_core.passes.footprint import ON_DEVICE, Footprint, Measure, Strategy
from iteris_core.passes.job import Job, Trace
from iteris_core.passes.planner import find, others, plan_stage

FILE = result_file("memory.json")
GIB = 2**30
HOSTS = (18, 45, 80)
"""GiB of host memory that a merge may use: on PCs with 32 and 64 GiB, and on a large one."""
RANK, LORAS, AT_ONCE = 16, 2, 32
HALF = torch.bfloat16
WORDS = 64
"""Tokens of a text, if the model does not pad it."""


@dataclass(frozen=True)
class Model:
    """A class of diffusers and its arguments, without which it has the released model's size;
    ``call(rows)`` are the arguments of one forward; ``parts`` occur in the names of sites that a
    LoRA changes."""

    kind: str
    size: Mapping[str, Any]
    call: Callable[[int], Mapping[str, Any]]
    budget_gib: float
    parts: tuple[str, ...] = (".to_q", ".to_k", ".to_v", ".to_out.0", ".ff.net")


def empty(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def tensors(rows: int, **shapes: tuple[int, ...]) -> dict[str, Any]:
    """One of each shape for every row."""
    return {name: empty(rows, *shape) for name, shape in shapes.items()}


def unet_call(side: int, width: int, **more: tuple[int, ...]) -> Callable[[int], Mapping[str, Any]]:
    def call(rows: int) -> Mapping[str, Any]:
        read = {"sample": (4, side, side), "encoder_hidden_states": (77, width)}
        added = {"added_cond_kwargs": tensors(rows, **more)} if more else {}
        return tensors(rows, timestep=(), **read) | added

    return call


def flux_call(rows: int) -> Mapping[str, Any]:
    read = {"hidden_states": (4096, 64), "encoder_hidden_states": (512, 4096)}
    places = {"img_ids": empty(4096, 3), "txt_ids": empty(512, 3)}
    return tensors(rows, timestep=(), guidance=(), pooled_projections=(768,), **read) | places


def z_image_call(rows: int) -> Mapping[str, Any]:
    pictures, words = ([empty(*s) for _ in range(rows)] for s in ((16, 1, 128, 128), (WORDS, 2560)))
    return {"x": pictures, "t": empty(rows), "cap_feats": words}


def qwen_image_call(rows: int) -> Mapping[str, Any]:
    read = {"hidden_states": (4096, 64), "encoder_hidden_states": (WORDS, 3584)}
    return tensors(rows, timestep=(), **read) | {"img_shapes": [[(1, 64, 64)]] * rows}


def klein_call(rows: int) -> Mapping[str, Any]:
    read = {"hidden_states": (4096, 128), "encoder_hidden_states": (512, 7680)}
    places = {"img_ids": (4096, 4), "txt_ids": (512, 4)}
    return tensors(rows, timestep=(), **read, **places) | {"guidance": None}


def krea2_call(rows: int) -> Mapping[str, Any]:
    read = {"hidden_states": (4096, 64), "encoder_hidden_states": (WORDS, 12, 2560)}
    return tensors(rows, timestep=(), **read) | {"position_ids": empty(WORDS + 4096, 3)}


def anima_call(rows: int) -> Mapping[str, Any]:
    read = {"hidden_states": (16, 1, 128, 128), "encoder_hidden_states": (512, 1024)}
    return tensors(rows, timestep=(), **read) | {"padding_mask": empty(1, 1, 128, 128)}


def wan_call(rows: int) -> Mapping[str, Any]:
    read = {"hidden_states": (16, 5, 60, 104), "encoder_hidden_states": (512, 4096)}
    return tensors(rows, timestep=(), **read)


SD15 = {"cross_attention_dim": 768, "sample_size": 64}
SDXL = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048, "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
MODELS = {
    "SD 1.5, 512 px": Model("UNet2DConditionModel", SD15, unet_call(64, 768), 4),
    "SDXL, 1024 px": Model(
        "UNet2DConditionModel", SDXL,
        unet_call(128, 2048, text_embeds=(1280,), time_ids=(6,)), 8,
    ),
    "FLUX.1, 1024 px": Model(
        "FluxTransformer2DModel", {"guidance_embeds": True}, flux_call, 12,
        (".to_", ".add_", ".ff.net", ".ff_context.net", ".proj_mlp", ".proj_out"),
    ),
    "FLUX.2 Klein 4B, 1024 px": Model(
        "Flux2Transformer2DModel",
        {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24,
         "joint_attention_dim": 7680, "guidance_embeds": False},
        klein_call, 8, (".to_", ".add_", ".ff.", ".ff_context."),
    ),
    "Krea 2, 1024 px": Model(
        "Krea2Transformer2DModel", {}, krea2_call, 10, ("transformer_blocks.",),
    ),
    "Anima, 1024 px": Model(
        "CosmosTransformer3DModel",
        {"num_attention_heads": 16, "extra_pos_embed_type": None},
        anima_call, 8, (".to_", ".ff.net"),
    ),
    "Z-Image, 1024 px": Model(
        "ZImageTransformer2DModel", {}, z_image_call, 8, (".to_", ".feed_forward."),
    ),
    "Qwen-Image, 1024 px": Model(
        "QwenImageTransformer2DModel", {}, qwen_image_call, 10, (".to_", ".add_", "_mlp.net"),
    ),
    "Wan 14B, 17 frames of 832 x 480": Model(
        "WanTransformer3DModel", {}, wan_call, 12, (".to_", ".ffn.net"),
    ),
}  # fmt: skip


class MetaHost:
    """A host with only the members that a plan needs."""

    pictures = True

    def __init__(self, name: str, model: nn.Module, parts: tuple[str, ...]) -> None:
        self._model = model
        self._sites = {
            f"{name}.{path}": module
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear)
        }
        self.changed = [
            site
            for site in self._sites
            if "block" in site or "layers" in site
            if any(part in site for part in parts)
        ]

    def sites(self) -> Mapping[str, nn.Module]:
        return self._sites

    def streams(self, sites: Any) -> Mapping[str, nn.Module]:
        return residual_streams(self._model, self._sites, unet.WIRINGS)


class Nowhere(HostPool):
    """A place for storages without bytes."""

    def __init__(self, device: torch.device, bits: int | None = None) -> None:
        super().__init__(device, 0, bits)

    def _piece(self, size: int) -> tuple[Tensor, int, int]:
        return torch.empty(size, dtype=torch.uint8, device="meta"), 0, size

    def free(self, pieces: Pieces) -> None: ...


def fused(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def planned(model: Model) -> dict[str, Any]:
    with torch.device("meta"):
        network = getattr(diffusers, model.kind)(**model.size).eval().requires_grad_(False)
    network = network.to(HALF)
    host: Any = MetaHost("denoiser", network, model.parts)
    changes: dict[str, SiteChanges] = {}
    for site in host.changed:
        out, width = host.sites()[site].weight.shape
        change = LowRank(torch.ones(out, RANK), torch.ones(RANK, width))
        changes[site] = SiteChanges((change,) * LORAS)
    calibration, generator = Calibration().settled(LORAS, pictures=True), torch.Generator()
    concepts = [Concept(Lora({}), trigger=str(number)) for number in range(LORAS)]
    trace = Trace(norms=dict.fromkeys(host.sites(), 1.0))
    job = Job(host, concepts, changes, calibration, generator, lambda *_: None, trace=trace)
    job, repairs = with_repairs(job)
    each = calibration.samples * calibration.rows_each

    def run(rows: Any, copies: int) -> None:
        network(**model.call(len(rows) * copies), return_dict=False)

    rows = [Row(number // each, number) for number in range(LORAS * each)]
    stage = Stage("denoiser", list(job.changes), rows, run, spatial=True, samples=each)
    solver = solver_of(job, set(), repairs, IterisSettings(), stage)
    batching = ExecutionConfig(AT_ONCE, "enough")
    with (
        job.run() as session,
        patch("torch.nn.functional.scaled_dot_product_attention", fused),
        patch("torch.is_autocast_enabled", lambda *_: False),  # it knows no meta device
        patch("iteris_core.activations.trace.alike", lambda *_: True),  # nothing to compare
        patch("iteris_core.passes.planner.is_apart", lambda *_: True),
        patch("iteris_core.passes.planner.HostPool", Nowhere),
    ):
        lockstep, limit = session.lockstep, limit_of(stage, batching)
        measure = Measure(stage, lockstep, 2, limit, solver.dtype.itemsize)
        sites = {site: solver.bytes(site, True) for site in stage.sites}
        steps, fixed = measure.row(), lockstep.cast_bytes
        with FlopCounterMode(display=False) as counter:
            run(rows[:1], 1)
        sampled = len(sampled_rows(stage, batching.thresholds))
        first = Footprint(stage, ON_DEVICE, steps, sites, fixed, sampled)
        footprints = [first, *others(first, measure, batching.thresholds)]
        levels = Strategy(barriers=find(stage, lockstep).barriers())
        place = Nowhere(torch.device("meta"))
        waiting = max(step.waiting for step in measure.row(levels, place))
    denoised = LORAS * calibration.samples * calibration.denoising_steps
    found: dict[str, Any] = {
        "budget_gib": model.budget_gib,
        "waiting_mib": round(waiting / 2**20, 1),
        "by_host": {},
    }
    for host_gib in HOSTS:
        budget = round(model.budget_gib * GIB)
        made = plan_stage(footprints, budget, AT_ONCE, host_gib * GIB)
        forwards = denoised + 2 * made.rows
        found["by_host"][str(host_gib)] = {
            "peak_gib": round(made.bytes / GIB, 2),
            "way": made.strategy.name,
            "rows": made.rows,
            "at_once": made.at_once,
            "left_out": made.offered - made.rows,
            "host_gib": round(made.host_bytes / GIB, 1),
            "forwards": forwards,
            "tera_operations": round(forwards * counter.get_total_flops() / 1e12),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="models whose name has this text")
    options = parser.parse_args()
    for name, model in MODELS.items():
        if options.only in name:
            found = planned(model)
            print(name, json.dumps(found), flush=True)
            results = {**read(FILE), name: found}
            write(FILE, {known: results[known] for known in MODELS if known in results})


if __name__ == "__main__":
    main()
