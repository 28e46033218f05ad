"""Nodes that score pictures as the paper's table 1 does, and show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import folder_paths
from comfy_api.latest import io
from torch import Tensor

from ..iteris_core.errors import IterisError
from ..iteris_core.score import ClipScorer, ImageScorer, clip_score, without_tokens
from ..iteris_core.score.sheet import contact_sheet
from .comfy_runtime import show_text
from .comfy_scorer import ComfyScorer, ComfyVisionScorer
from .open_clip_names import PAPERS, architectures
from .pictures import figure_image, to_image, to_pil
from .schema import Scorer, schema
from .score_plots import plot_scores

_FOLDERS = ("clip_vision", "text_encoders")


def _weight_files() -> list[str]:
    files = [name for folder in _FOLDERS for name in folder_paths.get_filename_list(folder)]
    return list(dict.fromkeys(files))


def _weight_path(name: str) -> str:
    for folder in _FOLDERS:
        path = folder_paths.get_full_path(folder, name)
        if path is not None:
            return path
    raise IterisError(f"{name} is in none of the folders {', '.join(_FOLDERS)} any more.")


def _outputs() -> list[Any]:
    return [
        io.Float.Output(display_name="cosine", tooltip="Mean cosine, -1 to 1; what papers list."),
        io.Float.Output(
            display_name="clip_score",
            tooltip="The mean on CLIPScore's scale, 2.5 times max(cosine, 0).",
        ),
        io.String.Output(display_name="scores", tooltip="Cosine and CLIPScore of each picture."),
        io.Image.Output(display_name="plot", tooltip="A bar for each picture."),
    ]


def _score_output(values: Tensor, title: str, node_id: str | None) -> io.NodeOutput:
    mean, scaled = float(values.mean()), clip_score(values)
    lines = [
        f"picture {number}: cosine {cosine:.4f}, CLIPScore {score:.4f}"
        for number, (cosine, score) in enumerate(
            zip(values.tolist(), scaled.tolist(), strict=True), 1
        )
    ]
    lines.append(f"mean: cosine {mean:.4f}, CLIPScore {float(scaled.mean()):.4f}")
    show_text(f"{title}: {mean:.4f}", node_id)
    plot = figure_image(plot_scores(values.tolist(), title))
    return io.NodeOutput(mean, float(scaled.mean()), "\n".join(lines), plot)


class ClipScorerLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisClipScorerLoader",
            "IterIS CLIP Scorer Loader",
            ["clip score", "open_clip"],
            description="Loads a CLIP of open_clip to score pictures with.",
            inputs=[
                io.Combo.Input(
                    "architecture",
                    options=architectures(),
                    default=PAPERS,
                    tooltip="A model of open_clip; ViT-L-14-quickgelu is the paper's. Those that "
                    "would fetch something are not listed.",
                ),
                io.Combo.Input(
                    "weights",
                    options=_weight_files(),
                    tooltip="Weights of that architecture, from models/clip_vision or "
                    "models/text_encoders; nothing is downloaded.",
                ),
            ],
            outputs=[Scorer.Output(display_name="scorer", tooltip="For the alignment nodes.")],
        )

    @classmethod
    def execute(cls, architecture: str, weights: str) -> io.NodeOutput:
        if architecture not in architectures():
            raise IterisError(f"{architecture!r} is none of open_clip's own architectures.")
        return io.NodeOutput(ComfyScorer.load(architecture, _weight_path(weights)))


class VisionScorer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisVisionScorer",
            "IterIS Vision Scorer",
            ["dinov2", "dino score", "image similarity", "siglip"],
            description="Scores how alike pictures are by DINOv2, CLIP or SigLIP, as ComfyUI's own "
            "Load CLIP Vision has it.",
            inputs=[
                io.ClipVision.Input(
                    "clip_vision",
                    tooltip="From Load CLIP Vision: DINOv2 (large, giant) is harder on identity "
                    "than CLIP.",
                ),
            ],
            outputs=[Scorer.Output(display_name="scorer", tooltip="For CLIP Image Alignment.")],
        )

    @classmethod
    def execute(cls, clip_vision: Any) -> io.NodeOutput:
        return io.NodeOutput(ComfyVisionScorer(clip_vision))


class ClipImageAlignment(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisClipImageAlignment",
            "IterIS CLIP Image Alignment",
            ["clip score", "image similarity", "clip-i"],
            description="How much pictures look like reference pictures of a concept (CLIP-I).",
            inputs=[
                Scorer.Input(
                    "scorer", tooltip="From CLIP Scorer Loader, Vision Scorer or the toybox."
                ),
                io.Image.Input("images", tooltip="The pictures to score."),
                io.Image.Input("references", tooltip="Pictures of the concept."),
            ],
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, scorer: ImageScorer, images: Tensor, references: Tensor) -> io.NodeOutput:
        values = scorer.image_alignment(to_pil(images), to_pil(references))
        return _score_output(values, "image alignment", cls.hidden.unique_id)


class ClipTextAlignment(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisClipTextAlignment",
            "IterIS CLIP Text Alignment",
            ["clip score", "prompt alignment", "clip-t"],
            description="How well pictures show what their prompts say (CLIP-T).",
            inputs=[
                Scorer.Input("scorer", tooltip="From CLIP Scorer Loader or the toybox."),
                io.Image.Input("images", tooltip="The pictures to score."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="One prompt for all pictures, or one a line for each.",
                ),
                io.String.Input(
                    "leave_out",
                    default="",
                    tooltip="Rare tokens that mean nothing to CLIP, such as sks, with commas "
                    "between them; they are taken out of the prompts.",
                ),
            ],
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, scorer: ClipScorer, images: Tensor, prompts: str, leave_out: str
    ) -> io.NodeOutput:
        tokens = [token.strip() for token in leave_out.split(",")]
        lines = [without_tokens(p, tokens) for p in prompts.splitlines() if p.strip()]
        pictures = to_pil(images)
        if len(lines) == 1:
            lines *= len(pictures)
        values = scorer.text_alignment(pictures, lines)
        return _score_output(values, "text alignment", cls.hidden.unique_id)


class ScoreSheet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisScoreSheet",
            "IterIS Score Sheet",
            ["contact sheet", "image grid", "xy plot"],
            description="Pictures, scores and prompts on one labelled picture; a row for each "
            "batch that arrives.",
            inputs=[
                io.Image.Input("images", tooltip="One batch per row."),
                io.String.Input(
                    "labels",
                    default="",
                    multiline=True,
                    tooltip="A label per row: one a line, or a list as of Compare Merges.",
                ),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip="A label per column, one a line; one line is put above the sheet.",
                ),
                io.Float.Input(
                    "scores",
                    optional=True,
                    force_input=True,
                    tooltip="A score per row, such as the cosine of an alignment node.",
                ),
                io.Int.Input(
                    "cell",
                    default=192,
                    min=32,
                    max=1024,
                    tooltip="Side of a picture on the sheet, in pixels.",
                ),
            ],
            outputs=[io.Image.Output(display_name="sheet", tooltip="The sheet.")],
            is_input_list=True,
        )

    @classmethod
    def execute(
        cls,
        images: list[Tensor],
        labels: list[str],
        prompts: list[str],
        cell: list[int],
        scores: Sequence[float] = (),
    ) -> io.NodeOutput:
        names = _lines(labels) or [f"row {number + 1}" for number in range(len(images))]
        if len(names) < len(images):
            raise IterisError(f"Score Sheet has {len(images)} rows but {len(names)} labels.")
        rows = {}
        for index, (name, batch) in enumerate(zip(names, images, strict=False)):
            label = f"{name}  {scores[index]:.3f}" if index < len(scores) else name
            rows[label if label not in rows else f"{label} ({index + 1})"] = to_pil(batch)
        width = max(map(len, rows.values()))
        columns = _lines(prompts)
        title = columns.pop() if len(columns) == 1 and width > 1 else ""
        columns += [""] * (width - len(columns))
        sheet = contact_sheet(rows, columns[:width], cell=cell[0], title=title)
        return io.NodeOutput(to_image([sheet]))


def _lines(texts: Sequence[str]) -> list[str]:
    return [line.strip() for text in texts for line in text.splitlines() if line.strip()]
