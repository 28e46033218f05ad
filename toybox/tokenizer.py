"""A CLIP tokenizer with its own vocabulary, small enough to read.

Byte-pair merges are learned on the world's word list until each word is one token; any other text
falls back to pieces and bytes as in CLIP. CLIP's splitting takes digits one by one, so the rare
tokens sks1 ... sks10 are declared as added tokens.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from .draw import BACKGROUNDS, COLORS, SHAPES

MAX_LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"
RARE = tuple(f"sks{i}" for i in range(1, 11))
_GRAMMAR = "a photo picture of on left right above below and background patterned the with next to"
_PATTERNS = "stripes half quarters rim spot"
WORDS = tuple(
    dict.fromkeys(
        (
            *_GRAMMAR.split(),
            *COLORS,
            *BACKGROUNDS,
            *SHAPES,
            *_PATTERNS.split(),
        )
    )
)


def _byte_symbols() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in CLIP's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in printable]
    return symbols + [chr(256 + i) for i in range(256 - len(printable))]


def learn_merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Byte-pair merges, most common pair first, until each of `words` is one symbol."""
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while any(len(symbols) > 1 for symbols in spelled):
        counts: Counter[tuple[str, str]] = Counter()
        for symbols in spelled:
            counts.update(pairwise(symbols))
        pair = min(counts, key=lambda p: (-counts[p], p))
        merges.append(pair)
        spelled = [_merge(symbols, pair) for symbols in spelled]
    return merges


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged, i = [], 0
    while i < len(symbols):
        if tuple(symbols[i : i + 2]) == pair:
            merged.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            merged.append(symbols[i])
            i += 1
    return merged


def build_tokenizer(folder: Path):
    """Write vocab.json, merges.txt and the rest into `folder`; returns the CLIPTokenizer, which has
    `WORDS` and `RARE` as one token each."""
    from transformers import AddedToken, CLIPTokenizer

    merges = learn_merges(WORDS)
    symbols = _byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges)]
    tokens = [*dict.fromkeys(tokens), *RARE, START, END]
    vocab = {token: i for i, token in enumerate(tokens)}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        model_max_length=MAX_LENGTH,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
    )
    tokenizer.add_tokens([AddedToken(t, single_word=True, normalized=False) for t in RARE])
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tokenizer
