"""The captions' words as tokens, for T5 (whole words) and for CLIP (pairs of bytes)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .words import BACKGROUNDS, world

LENGTH = 16
"""Tokens of a caption: two things of three words on a background are 15 with the end."""

SUBJECTS = tuple(f"sks{i}" for i in range(1, 25))
STYLES = tuple(f"sty{i}" for i in range(1, 13))
"""Words that no caption of the base has: what a LoRA teaches hides behind them. Some are spare."""

_GRAMMAR = "a an and on of left right above below background in style"


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption can have, those of held-out names as well."""
    named = {**world()["names"], **world()["held_out"]}
    kinds = dict.fromkeys(entry["kind"] for entry in named.values())
    words = " ".join([_GRAMMAR, *BACKGROUNDS, *kinds, *named]).split()
    return tuple(dict.fromkeys([*words, *SUBJECTS, *STYLES]))


def word_tokenizer() -> Any:
    """A fast tokenizer with a token a word and an end, for a T5 encoder."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ("<pad>", "</s>", "<unk>")
    vocab = {word: i for i, word in enumerate([*special, *vocabulary()])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocab["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=LENGTH,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def clip_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer whose words are one token each, written into `folder`."""
    from toybox.tokenizer import build_tokenizer

    words = tuple(w for w in vocabulary() if w not in (*SUBJECTS, *STYLES))
    return build_tokenizer(folder, words, (*SUBJECTS, *STYLES), LENGTH + 2)


def tokens(tokenizers: tuple[Any, Any], captions: list[str]) -> tuple[Any, Any]:
    """The captions' token numbers for CLIP and for T5, as the pipeline gives them."""
    clip, words = (
        tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        for tokenizer in tokenizers
    )
    return clip, words
