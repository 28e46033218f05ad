"""``iteris merge`` on a transformers base: loads the base and peft adapter folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..concepts import Concept
from ..config import ConceptConfig
from ..errors import BaseError, ConceptError, UsageError, brief
from ..hosts.protocol import Host
from ..lora_files import read_header, read_tensors
from .base import INDEXES, loading
from .inputs import read_lines

_AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""peft's ``task_type`` → the model class on which its adapters are trained."""


def is_model(base: str, folders: Sequence[str]) -> bool:
    """True if the base is a single transformers model, not a diffusers pipeline."""
    folder = Path(base)
    if folder.is_dir():
        whole = any((folder / name).is_file() for name in INDEXES)
        return (folder / "config.json").is_file() and not whole
    return any((Path(name) / "adapter_config.json").is_file() for name in folders)


def load_adapters(
    base: str,
    adapters: Sequence[ConceptConfig],
    model_class: str | None,
    generate: int | None,
    device: str,
) -> tuple[Host, list[Concept]]:
    """The base on ``device``, and a concept per adapter, whose ``file`` is its folder.

    ``model_class``: the transformers class for loading the base (None: the class on which the first
    adapter was trained). ``generate``: collect features while each adapter generates up to that
    many tokens.
    """
    from ..hosts.transformers import TransformersHost

    model = _load(base, model_class, adapters[0].files[0]).to(device)
    host = TransformersHost(
        model, generate=None if generate is None else {"max_new_tokens": generate}
    )
    texts = any(one.samples.suffix != ".safetensors" for one in adapters if one.samples)
    tokenizer = _load_tokenizer(base) if texts else None
    return host, [
        replace(
            one.concept(host.read_lora(folder)),
            trigger=one.trigger or folder.name,
            inputs=_inputs(one.samples, tokenizer),
        )
        for one in adapters
        for folder in one.files
        if one.samples is not None
    ]


def check_adapters(adapters: Sequence[ConceptConfig]) -> None:
    """Raise :class:`IterisError` for a folder that is not an adapter, for unreadable samples, and
    for options that only LoRA files support."""
    for one in adapters:
        name = one.file or "a concept"
        if one.file is None or one.samples is None:
            raise ConceptError(
                f"{name} is not FOLDER:SAMPLES, such as adapters/joy:joy.txt; SAMPLES is a text "
                "file with one sample a line, or a .safetensors with the model's inputs."
            )
        if one.prompts is not None or one.class_word or one.text_strength is not None:
            raise ConceptError(
                f"{name}: prompts, class and text_strength are for diffusion bases; an adapter of "
                "a transformers model has samples, strength and weight."
            )
        if not (one.file / "adapter_config.json").is_file():
            raise ConceptError(
                f"{name} is not a peft adapter folder: it has no adapter_config.json."
            )
        if one.samples.suffix == ".safetensors":
            read_header(one.samples)
        elif not read_lines(one.samples):
            raise ConceptError(f"{one.samples} has no samples; write one per line.")


def _load(base: str, model_class: str | None, adapter: Path) -> Any:
    """The base, in the class on which the adapter was trained, in eval mode."""
    import transformers

    with loading(base, "transformers model (config.json and safetensors)"):
        name = model_class or _class_of(adapter)
        if name is None:
            config = transformers.AutoConfig.from_pretrained(base)
            name = (config.architectures or ["AutoModel"])[0]
        kind = getattr(transformers, name, None)
        if kind is None and model_class:
            raise UsageError(f"--model-class {name}: transformers has no class of that name.")
        if kind is None:
            raise BaseError(
                f"The adapter {adapter} is for {name}; transformers has no class of that "
                "name. Give one whose modules have the same names, such as --model-class "
                "AutoModelForSequenceClassification, or merge from Python with "
                "TransformersHost(model)."
            )
        return kind.from_pretrained(base, use_safetensors=True).eval()


def _class_of(adapter: Path) -> str | None:
    try:
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # reading the adapter later reports what is wrong
    mapping = config.get("auto_mapping") or {}
    return _AUTO.get(config.get("task_type") or "") or mapping.get("base_model_class")


def _load_tokenizer(base: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base)
    except Exception as error:
        raise BaseError(
            f"The base {base!r} has no tokenizer ({brief(error)}); give samples as .safetensors."
        ) from error


def _inputs(file: Path, tokenizer: Any) -> list[Mapping[str, Any]]:
    """Batches of inputs: all rows of a .safetensors, or one line of text each."""
    if file.suffix == ".safetensors":
        return [read_tensors(file)[0]]
    return [tokenizer([line], truncation=True, return_tensors="pt") for line in read_lines(file)]
