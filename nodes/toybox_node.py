"""The toybox as native ComfyUI objects."""

from __future__ import annotations

from comfy_api.latest import io
from PIL import Image

from ..iteris_core.config import ConceptConfig
from ..iteris_core.errors import IterisError
from ..toybox import BASE, TEMPLATES, ToyConcept, load_clip, pivotal_concepts
from ..toybox import concepts as toy_concepts
from .comfy_scorer import ComfyScorer, LazyScorer
from .comfy_toybox import load_world
from .concept_specs import make_spec
from .pictures import to_image
from .schema import schema


class IterisToybox(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisToybox",
            ["demo", "test model", "example"],
            inputs=[io.String.Input("tokens", default="sks1, sks6")],
            outputs=("MODEL", "CLIP", "VAE", "concepts", "references", "prompts", "scorer"),
            lists=("references", "prompts"),
        )

    @classmethod
    def execute(cls, tokens: str) -> io.NodeOutput:
        chosen = _chosen(tokens)
        model, clip, vae = load_world(BASE)
        return io.NodeOutput(
            model,
            clip,
            vae,
            tuple(_spec(concept) for concept in chosen),
            [to_image([Image.open(path) for path in concept.references]) for concept in chosen],
            [_prompt(concept) for concept in chosen],
            LazyScorer(lambda: ComfyScorer(*load_clip())),
        )


def _spec(concept: ToyConcept) -> ConceptConfig:
    """Prompts in the toybox's vocabulary."""
    subject = f"{concept.token} {concept.class_word}"
    return make_spec(
        concept.lora,
        trigger=concept.token,
        class_word=concept.class_word,
        prompts="\n".join(template.format(subject) for template in TEMPLATES),
    )


def _prompt(concept: ToyConcept) -> str:
    """The concept's training prompt, with embeddings in ComfyUI's notation."""
    token = concept.token.strip("<>")
    call = concept.token if concept.embedding is None else f"embedding:{token}"
    return concept.instance_prompt.replace(concept.token, call)


def _chosen(tokens: str) -> list[ToyConcept]:
    concepts = {**toy_concepts(), **pivotal_concepts()}
    known = {token.strip("<>"): concept for token, concept in concepts.items()}
    names = [name.strip(" <>") for name in tokens.split(",") if name.strip(" <>")]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise IterisError(
            f"The toybox has no concept {', '.join(unknown) or 'of that name'}; its concepts are: "
            f"{', '.join(known)}."
        )
    return [known[name] for name in names]
