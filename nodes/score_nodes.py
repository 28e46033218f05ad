"""Nodes that score images as in the paper's table 1, and show them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import folder_paths
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..iteris_core.concepts import lines_of
from ..iteris_core.errors import IterisError
from ..iteris_core.score import ClipScorer, ImageScorer, clip_score, contact_sheet, without_tokens
from .comfy_runtime import show_text
from .comfy_scorer import ARCHITECTURES, ComfyScorer, ComfyVisionScorer, check_open_clip
from .pictures import to_image, to_pil, to_plot
from .schema import Scorer, schema

_FOLDERS = ("clip_vision", "text_encoders")
_SCORED = ("cosine", "clip_score", "scores", "plot")


def _score_output(values: Tensor, title: str, hidden: Any) -> io.NodeOutput:
    mean, scaled = float(values.mean()), clip_score(values)
    pairs = zip(values.tolist(), scaled.tolist(), strict=True)
    lines = [
        f"image {number}: cosine {cosine:.4f}, CLIPScore {score:.4f}"
        for number, (cosine, score) in enumerate(pairs, 1)
    ]
    lines.append(f"mean: cosine {mean:.4f}, CLIPScore {float(scaled.mean()):.4f}")
    show_text(f"{title}: {mean:.4f}", hidden.unique_id)
    plot = to_plot(plot_scores(values.tolist(), title))
    return io.NodeOutput(mean, float(scaled.mean()), "\n".join(lines), plot)


class ClipScorerLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        listed = [name for folder in _FOLDERS for name in folder_paths.get_filename_list(folder)]
        files = [name for name in listed if name.lower().endswith((".safetensors", ".sft"))]
        return schema(
            "IterisClipScorerLoader",
            ["clip score", "open_clip"],
            inputs=[
                io.Combo.Input("architecture", options=list(ARCHITECTURES)),
                io.Combo.Input("weights", options=list(dict.fromkeys(files))),
            ],
            group="compare",
            outputs=("scorer",),
        )

    @classmethod
    def execute(cls, architecture: str, weights: str) -> io.NodeOutput:
        check_open_clip()
        if architecture not in ARCHITECTURES:
            raise IterisError(
                f"{architecture!r} is not one of {', '.join(ARCHITECTURES)}; with others score by "
                "`iteris score`."
            )
        paths = (folder_paths.get_full_path(folder, weights) for folder in _FOLDERS)
        path = next(filter(None, paths), None)
        if path is None:
            raise IterisError(f"{weights} is not in any of the folders {', '.join(_FOLDERS)}.")
        scorer = ComfyScorer.load(architecture, path)
        return io.NodeOutput(lambda: scorer)


class VisionScorer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisVisionScorer",
            ["dinov2", "dino score", "image similarity", "siglip"],
            inputs=[io.ClipVision.Input("clip_vision")],
            group="compare",
            outputs=("scorer",),
        )

    @classmethod
    def execute(cls, clip_vision: Any) -> io.NodeOutput:
        return io.NodeOutput(lambda: ComfyVisionScorer(clip_vision))


class ClipImageAlignment(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisClipImageAlignment",
            ["clip score", "image similarity", "clip-i"],
            inputs=[Scorer.Input("scorer"), io.Image.Input("images"), io.Image.Input("references")],
            group="compare",
            outputs=_SCORED,
        )

    @classmethod
    def execute(
        cls, scorer: Callable[[], ImageScorer], images: Tensor, references: Tensor
    ) -> io.NodeOutput:
        values = scorer().image_alignment(to_pil(images), to_pil(references))
        return _score_output(values, "image alignment", cls.hidden)


class ClipTextAlignment(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisClipTextAlignment",
            ["clip score", "prompt alignment", "clip-t"],
            inputs=[
                Scorer.Input("scorer"),
                io.Image.Input("images"),
                io.String.Input("prompts", multiline=True, default=""),
                io.String.Input("leave_out", default=""),
            ],
            group="compare",
            outputs=_SCORED,
        )

    @classmethod
    def execute(
        cls, scorer: Callable[[], ClipScorer], images: Tensor, prompts: str, leave_out: str
    ) -> io.NodeOutput:
        tokens = [token.strip() for token in leave_out.split(",")]
        lines = [without_tokens(p, tokens) for p in prompts.splitlines() if p.strip()]
        pictures = to_pil(images)
        if len(lines) == 1:
            lines *= len(pictures)
        values = scorer().text_alignment(pictures, lines)
        return _score_output(values, "text alignment", cls.hidden)


class ScoreSheet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisScoreSheet",
            ["contact sheet", "image grid", "xy plot"],
            inputs=[
                io.Image.Input("images"),
                io.String.Input("labels", default="", multiline=True),
                io.String.Input("prompts", default="", multiline=True),
                io.Float.Input("scores", optional=True, force_input=True),
                io.Int.Input("cell", default=192, min=32, max=1024),
            ],
            group="compare",
            outputs=("sheet",),
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
        names = lines_of("\n".join(labels)) or [f"row {n + 1}" for n in range(len(images))]
        if len(names) < len(images):
            raise IterisError(f"Score Sheet has {len(images)} rows but {len(names)} labels.")
        rows: dict[str, list[Image.Image]] = {}
        starts = set[int]()  # of batches in their rows
        for index, (name, batch) in enumerate(zip(names, images, strict=False)):
            label = f"{name}  {scores[index]:.3f}" if index < len(scores) else name
            row = rows.setdefault(label, [])
            starts.add(len(row))
            row += to_pil(batch)
        width = max(map(len, rows.values()))
        titles = list(dict.fromkeys(lines_of("\n".join(prompts))))
        title = titles.pop() if len(titles) == 1 and width > 1 else ""
        places = sorted(starts) if len(titles) == len(starts) else range(width)
        columns = dict(zip(places, titles, strict=False))
        headings = [columns.get(place, "") for place in range(width)]
        sheet = contact_sheet(rows, headings, cell=cell[0], title=title)
        return io.NodeOutput(to_image([sheet]))


def plot_scores(values: Sequence[float], title: str) -> Any:
    """One bar per image and a line at the mean, as a matplotlib Figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4, 1 + 0.5 * len(values)), 3), layout="constrained")
    axis = figure.subplots()
    numbers = range(1, len(values) + 1)
    axis.bar(numbers, values)
    mean = sum(values) / len(values)
    axis.axhline(mean, color="black", linestyle="--", label=f"mean {mean:.3f}")
    axis.set(xticks=list(numbers), xlabel="picture", ylabel="cosine", title=title)
    axis.legend()
    return figure
