"""A world of one's own: a base, LoRAs, prompts and pictures that a YAML file names.

``open/README.md`` has such a file whole. Its relative paths are relative to it, and its concepts
have the keys of a merge file's. Everything that can be wrong is found before the base is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from protocol.drawing import draw
from protocol.world import KINDS, Wanted
from torch import Tensor

from iteris_core import Calibration, Concept
from iteris_core.cli.base import check_base, device_of, load_base
from iteris_core.cli.inputs import check_concepts, open_images
from iteris_core.cli.merge_file import base_in, beside, concept_of, read_mapping
from iteris_core.cli.options import check_settings
from iteris_core.config import read_concept
from iteris_core.errors import ConceptError, MergeFileError, ScoreError, brief, did_you_mean
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.hosts.diffusers_loop import is_modular
from iteris_core.lora import Lora
from iteris_core.passes.changes import added, changes_always
from iteris_core.score import ClipScorer, ImageScorer, without_tokens
from iteris_core.settings import Settings, setting

NEEDED = ("base", "concepts", "seen", "new", "plain")
CHOICES = {"base_dtype": ("float16", "bfloat16", "float32"), "offload": ("model", "sequential")}
KEYS = (*NEEDED, *CHOICES, "device", "drawing", "calibration", "clip", "clip_weights", "dino")
SLOTS = {"seen": (1, 2), "new": (1,), "plain": (0,)}
"""How often templates, and prompts of the base's own, hold "{}"."""

SPREAD = 4
"""Seeds of the one prompt on which the spread of pictures is measured."""


@dataclass(frozen=True)
class Subject:
    """A concept: its LoRA files, one of each training, and the pictures that show it."""

    trainings: Sequence[Concept]
    references: Sequence[Image.Image]


@dataclass(frozen=True)
class Drawing(Settings):
    """Settings for drawing; the paper uses 100 DDPM steps at guidance 12."""

    images_per_prompt: int = setting(4, "Seeds per prompt.", low=1)
    steps: int = setting(25, "Denoising steps of the images.", low=1)
    guidance: float = setting(7.5, "Guidance scale of the images.")
    seed: int = setting(0, "Seed of each prompt's first image, and of the calibration.")
    batch: int = setting(8, "Images per batch.", low=1)
    width: int | None = setting(
        None, "Width of the images in pixels.", none="the pipeline's", low=8
    )
    height: int | None = setting(
        None, "Height of the images in pixels.", none="the pipeline's", low=8
    )


class DinoScorer(ImageScorer):
    """Cosines of class tokens of a transformers vision model (Dinov2, DINO ViT-S/16). It judges
    identity more strictly than CLIP, and cannot score text."""

    def __init__(self, name: str, *, device: torch.device | str = "cpu") -> None:
        """From a hub name, or a folder with a model and an image processor."""
        from transformers import AutoImageProcessor, AutoModel

        try:
            self._processor = AutoImageProcessor.from_pretrained(name)
            model = AutoModel.from_pretrained(name, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise ScoreError(f"The DINO model {name!r} cannot be loaded ({brief(error)}).") from (
                error
            )
        super().__init__(model, device, 64)

    def _embed_images(self, images: list[Image.Image]) -> Tensor:
        pictures = [image.convert("RGB") for image in images]
        pixels = self._processor(images=pictures, return_tensors="pt").to(self._device)
        return self._model(**pixels).last_hidden_state[:, 0]


class OwnWorld:
    """Likeness is the mean cosine to a concept's references by CLIP, ``dino`` by a DINO model if
    the file names one, and ``text`` by CLIP to the prompt without trigger words. Nothing judges
    attributes or backgrounds.

    A LoRA counts at the strength that the file gives it, alone and in a merge. Raises
    :class:`IterisError` for a mistake in the file.
    """

    kinds = KINDS

    def __init__(self, path: Path) -> None:
        data = checked(read_mapping(path), path)
        self._path = path
        self._known = dict(map(self._subject, data["concepts"]))
        self.subjects = tuple(self._known)
        if len(self.subjects) < max(2, len(data["concepts"])):
            raise MergeFileError(f"{path}: concepts must be two or more, each of another trigger.")
        self.trained = min(len(of.trainings) for of in self._known.values())
        configs = [config for of in self._known.values() for config in of.trainings]
        check_concepts(configs)
        self._set_prompts(path, data)
        given = check_settings(Drawing, data.get("drawing") or {}, f"{path}: drawing")
        self._drawing = Drawing(**given)
        self._load(data)

    def _subject(self, entry: Any) -> tuple[str, Subject]:
        where = f"{self._path}: concepts"
        if not isinstance(entry, Mapping):
            raise MergeFileError(f"{where}: each must be a mapping, not {entry!r}.")
        where = f"{where}: {entry.get('trigger', entry)}"
        for key in ("file", "trigger", "references"):
            if not entry.get(key):
                raise MergeFileError(f"{where}: the key {key!r} is missing.")
        files = entry["file"] if isinstance(entry["file"], list) else [entry["file"]]
        others = {key: value for key, value in entry.items() if key != "references"}
        find = partial(beside, self._path)
        trainings = [
            concept_of({**others, "file": str(find(str(file)))}, where, find) for file in files
        ]
        if trainings[0].always_on != "no" or trainings[0].kind != "subject":
            raise MergeFileError(
                f"{where}: only subjects are measured, by the templates of seen; put a speed LoRA "
                "into the base first (iteris bake)."
            )
        _, pictures = open_images(find(str(entry["references"])))
        return trainings[0].trigger, Subject(trainings, pictures)

    def _set_prompts(self, path: Path, data: Mapping[str, Any]) -> None:
        where = f"{path}: calibration"
        given = check_settings(Calibration, data.get("calibration") or {}, where)
        self.half: dict[str, Any] = {**given, "templates": tuple(data["seen"])}
        self._seen = Calibration(templates=self.half["templates"]).templates
        self._new, self._plain = data["new"], [str(prompt) for prompt in data["plain"]]
        known = _words(self.half["templates"])
        named = _words([p for c in self._known.values() for p in c.trainings[0].phrases])
        self.words = frozenset(_words(self._new) - known - named)
        for template in self._new:
            if not _words([template]) - known:
                raise MergeFileError(
                    f"{path}: new: {template!r} has no word that the templates of seen lack."
                )
        for prompt in self._plain:
            named = [name for name in self.subjects if _words([name]) <= _words([prompt])]
            if named:
                raise MergeFileError(f"{path}: plain: {prompt!r} has the trigger {named[0]!r}.")

    def _load(self, data: Mapping[str, Any]) -> None:
        base, device = base_in(self._path, str(data["base"])), device_of(data.get("device"))
        check_base(base)
        clip = str(data.get("clip", "ViT-L-14"))
        self._clip = ClipScorer.load(clip, data.get("clip_weights"), device=device)
        self._scorers: dict[str, ClipScorer | DinoScorer] = {"likeness": self._clip}
        if data.get("dino"):
            name = base_in(self._path, str(data["dino"]))
            self._scorers["dino"] = DinoScorer(name, device=device)
        self._references = {
            (figure, name): scorer.embed_images(of.references)
            for figure, scorer in self._scorers.items()
            for name, of in self._known.items()
        }
        pipeline = load_base(base, device, data.get("base_dtype"), data.get("offload"))
        if is_modular(pipeline):
            raise MergeFileError(f"{self._path}: base: a modular pipeline cannot be measured.")
        self.host = DiffusersHost(pipeline)
        self._concepts = {
            (name, number): self._read(config)
            for name, of in self._known.items()
            for number, config in enumerate(of.trainings)
        }

    def _read(self, config: Concept) -> Concept:
        """The concept with its strength in the LoRA."""
        concept = read_concept(config, self.host)
        lora = concept.lora
        assert lora is not None
        if lora.embeddings:
            raise ConceptError(
                f"{config.file} brings embeddings ({', '.join(lora.embeddings)}), without which "
                "the other LoRAs would be measured; leave it out."
            )
        lora = replace(lora, sites=changes_always([concept]))
        return replace(concept, lora=lora, strength=1.0, text_strength=None)

    def concepts(self, names: Sequence[str], trained: int) -> list[Concept]:
        return [self._concepts[name, trained] for name in names]

    def prompted(self, kind: str, names: Sequence[str], seed: int) -> list[Wanted]:
        first = self._drawing.seed + 100 * seed
        if kind == "no trigger":
            return [Wanted((), prompt, first) for prompt in self._plain]
        templates = {"seen": self._seen, "new words": self._new, "spread": self._new[:1]}[kind]
        count = {"seen": 1, "spread": SPREAD}.get(kind, self._drawing.images_per_prompt)
        return [
            Wanted((name,), template.replace("{}", self._concepts[name, 0].subject), one)
            for name in names
            for template in templates
            for one in range(first, first + count)
        ]

    def draw(self, lora: Lora | None, wanted: Sequence[Wanted]) -> list[Image.Image]:
        """With the LoRA beside the weights, which may be of any dtype and on any device."""
        how = self._drawing
        sizes = {"width": how.width, "height": how.height}
        options = {name: size for name, size in sizes.items() if size is not None}
        options |= {"num_inference_steps": how.steps, "guidance_scale": how.guidance}
        pipeline = self.host.pipeline
        with nullcontext() if lora is None else added(self.host, changes_always([Concept(lora)])):
            try:
                return draw(pipeline, self.host, None, wanted, how.batch, **options)
            except ValueError as error:  # for a size, a number of steps, …
                raise ScoreError(
                    f"{type(pipeline).__name__} cannot draw with these settings ({brief(error)})."
                ) from error

    def read(
        self, images: Sequence[Image.Image], wanted: Sequence[Wanted]
    ) -> list[Mapping[str, float]]:
        vectors = {figure: of.embed_images(images) for figure, of in self._scorers.items()}
        prompts = [without_tokens(w.prompt, self.subjects) for w in wanted]
        texts = (vectors["likeness"] * self._clip.embed_texts(prompts)).sum(1)
        columns = {"text": texts.tolist()}
        for figure, some in vectors.items() if wanted[0].shown else ():
            columns[figure] = [
                float((self._references[figure, w.shown[0]] @ vector).mean())
                for w, vector in zip(wanted, some, strict=True)
            ]
        return [dict(zip(columns, one, strict=True)) for one in zip(*columns.values(), strict=True)]

    def pictures_of(self, name: str) -> Sequence[Image.Image]:
        return self._known[name].references

    def embedded(self, images: Sequence[Image.Image]) -> Tensor:
        return self._clip.embed_images(images)


def checked(data: Mapping[Any, Any], path: Path) -> Mapping[str, Any]:
    """``data`` without keys that are null."""
    for key in data:
        if key not in KEYS:
            guess = did_you_mean(str(key), KEYS)
            raise MergeFileError(
                f"{path}: there is no key {key!r}{guess} The keys are {', '.join(KEYS)}."
            )
    for key in NEEDED:
        if not data.get(key):
            raise MergeFileError(f"{path}: the key {key!r} is missing.")
        if key != "base" and not isinstance(data[key], list):
            raise MergeFileError(f"{path}: {key} must be a list, not {data[key]!r}.")
    for key, known in CHOICES.items():
        if data.get(key) not in (None, *known):
            raise MergeFileError(f"{path}: {key} must be {' or '.join(known)}, not {data[key]!r}.")
    for key in ("drawing", "calibration"):
        if not isinstance(data.get(key) or {}, Mapping):
            raise MergeFileError(f"{path}: {key} must be a mapping, not {data[key]!r}.")
    for key, slots in SLOTS.items():
        for text in data[key]:
            if str(text).count("{}") not in slots:
                holds = "hold" if slots[0] else "not hold"
                raise MergeFileError(
                    f'{path}: {key}: {text!r} must {holds} "{{}}" where a concept goes.'
                )
    return {key: value for key, value in data.items() if value is not None}


def _words(texts: Sequence[str]) -> set[str]:
    return {word for text in texts for word in re.findall(r"\w+", text.lower())}
