"""Nodes that compare merges, save LoRAs and look into them."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..iteris_core.errors import IterisError, SaveError
from ..iteris_core.lora_files.tensors import save_atomically
from ..iteris_core.methods import all_methods, find_method
from ..iteris_core.report.inspection import describe, interference, numbered, to_table
from ..iteris_core.report.plots import plot_interference
from .comfy_host import ComfyHost
from .comfy_lora import apply_lora
from .comfy_runtime import files_behind, show_text
from .concept_specs import ConceptSpec
from .embedding_files import save_embeddings
from .lora_rank import cut_tensors
from .merge_inputs import (
    Extras,
    budget_of,
    calibration_of,
    extra_inputs,
    latent_inputs,
    memory_inputs,
    model_inputs,
    sampling_inputs,
)
from .merging import as_lora_model, merge_on
from .pictures import figure_image
from .schema import LoraModel, schema

_BASE = "base"


class CompareMerges(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisCompareMerges",
            "IterIS Compare Merges",
            ["compare lora merges", "xy plot"],
            description="Merges with several methods; a sampler behind it draws one picture each.",
            inputs=[
                *model_inputs(),
                io.String.Input(
                    "methods",
                    default="iteris, average, sum, ties",
                    tooltip="Names with commas between them. base stands for no LoRA at all. There "
                    f"are: {', '.join(method.name for method in all_methods())}.",
                ),
                *sampling_inputs(),
                *latent_inputs(),
                *memory_inputs(),
                *extra_inputs(),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL", is_output_list=True, tooltip="One MODEL per method."
                ),
                io.Clip.Output(
                    display_name="CLIP", is_output_list=True, tooltip="One CLIP per method."
                ),
                io.String.Output(
                    display_name="labels",
                    is_output_list=True,
                    tooltip="The methods' names, for Score Sheet.",
                ),
                io.String.Output(display_name="report", tooltip="The report of every merge."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        concepts: tuple[ConceptSpec, ...],
        methods: str,
        samples: int,
        seed: int,
        timesteps: int,
        latent_size: int,
        latents: str,
        memory: float = 0.0,
        frames: int = 0,
        **extra: Any,
    ) -> io.NodeOutput:
        calibration = calibration_of(
            {
                "samples": samples,
                "seed": seed,
                "timesteps": timesteps,
                "latent_size": latent_size,
                "latents": latents,
                "frames": frames,
            }
        )
        extras = Extras.of(files_behind(cls.hidden, "model"), **extra)
        names = [name.strip() for name in methods.split(",") if name.strip()]
        if not names:
            raise IterisError("Compare Merges has no methods; write iteris, average for example.")
        for name in names:
            if name != _BASE:
                find_method(name)
        models, clips, reports = [], [], []
        for name in names:
            merged = model, clip
            if name != _BASE:
                result = merge_on(
                    model,
                    clip,
                    concepts,
                    name,
                    {},
                    calibration,
                    cls.hidden.unique_id,
                    memory_budget=budget_of(memory),
                    **extras.options,
                )
                merged = apply_lora(model, clip, as_lora_model(result, concepts, "float16"))
                reports.append(result.report.summary())
            models.append(merged[0])
            clips.append(merged[1])
        report = "\n".join(reports) + extras.note
        show_text(report, cls.hidden.unique_id)
        return io.NodeOutput(models, clips, names, report)


class SaveMergedLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisSaveLora",
            "IterIS Save Merged LoRA",
            ["save lora", "export lora"],
            description="Writes a LoRA into models/loras, each time under a new name, and its "
            "embeddings into models/embeddings.",
            inputs=[
                LoraModel.Input("lora", tooltip="The merged LoRA."),
                io.String.Input(
                    "filename_prefix",
                    default="iteris/merged",
                    tooltip="Folder and name below models/loras; a number is added.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=1024,
                    optional=True,
                    tooltip="Largest rank of the file; 0 keeps the rank of the merge. Another rank "
                    "here does not merge again.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="lora_name", tooltip="The name as Load LoRA lists it."
                )
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, lora: dict[str, Any], filename_prefix: str, rank: int = 0) -> io.NodeOutput:
        tensors, metadata = dict(lora), dict(getattr(lora, "metadata", {}))
        if rank:
            ordered = getattr(lora, "ordered", False)
            tensors, metadata = cut_tensors(tensors, metadata, rank, ordered=ordered)
        file, subfolder = _new_file(filename_prefix)
        try:
            embeddings = save_embeddings(tensors, subfolder)
            save_atomically(tensors, file, metadata)
        except SaveError as error:
            raise SaveError(f"{error} The merge is kept: queue again, and it is saved.") from error
        text = f"{file}{embeddings}"
        show_text(f"Saved {text}", cls.hidden.unique_id)
        return io.NodeOutput(str(Path(subfolder) / file.name), ui={"text": [text]})


class InspectLoras(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisInspectLoras",
            "IterIS Inspect LoRAs",
            ["lora info", "lora interference"],
            description="Where LoRAs would get into each other's way, before they are merged.",
            inputs=model_inputs(),
            outputs=[
                io.Image.Output(
                    display_name="plot", tooltip="Interference of each pair in each block."
                ),
                io.String.Output(
                    display_name="table", tooltip="Sites, ranks and size of each LoRA, and pairs."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, concepts: tuple[ConceptSpec, ...]) -> io.NodeOutput:
        host = ComfyHost(model, clip)
        named = [(concept.name, concept.lora) for concept in (c.read(host) for c in concepts)]
        loras = numbered([replace(lora, name=name) for name, lora in named if lora is not None])
        if len(loras) < 2:
            raise IterisError("Inspect LoRAs compares LoRAs: connect two concepts or more.")
        pairs = [interference(one, two) for one, two in combinations(loras, 2)]
        if not any(pair.shared for pair in pairs):
            raise IterisError("The LoRAs change no site in common; they cannot interfere.")
        table = to_table([describe(lora) for lora in loras], pairs)
        show_text(table, cls.hidden.unique_id)
        return io.NodeOutput(figure_image(plot_interference(pairs)), table)


def _new_file(prefix: str) -> tuple[Path, str]:
    """A name in models/loras that is not taken, and the folder below it; ``prefix`` may hold what
    Save Image understands, such as %year%."""
    root = os.path.abspath(folder_paths.get_folder_paths("loras")[0])
    wanted = os.path.normpath(os.path.join(root, prefix.strip()))
    if not prefix.strip() or prefix.endswith(("/", os.sep)) or wanted == root:
        raise IterisError("Save Merged LoRA has no name; write one as filename_prefix.")
    if not wanted.startswith(root + os.sep):
        raise IterisError(f"{prefix} leads out of {root}; write a name or folder/name.")
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix.strip(), root)
    return Path(folder) / f"{name}_{counter:05}_.safetensors", subfolder
