"""What LoRA files say about themselves: in metadata, in their names, and in files beside them.

LoRA browsers and download helpers keep trigger words beside a LoRA: Lora-Manager in
``.metadata.json``, Civitai Helper in ``.civitai.info``, rgthree in
``.rgthree-info.json``, and Automatic1111's user interface in ``.json``. All of this is untrusted
and may contain any text. Common words and booru tags invoke no LoRA: the base knows them already,
and captions of other LoRAs contain them too.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import dropwhile
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

Purpose = Literal["speed", "edit", "slider", "detailer", "style", "tags"]
"""What a LoRA is for, other than a subject: it makes a base draw in few steps without guidance, or
edit images; it acts on every prompt, by its strength; it is a style; it was trained on booru
tags."""
ALWAYS_ON = "speed", "slider", "detailer"
"""Purposes of LoRAs that act on every prompt."""

_TURBO = re.compile(r"(z[-_ ]?image|sd|sdxl|sd3(\.5)?)[-_ ]?turbo|qwen[-_ ]?image[-_ ]?edit", re.I)
"""Bases with these words in their names, which their LoRAs' names repeat."""
_PLAIN = re.compile(r"lightning|turbo|schnell", re.I)
"""Words for speed that names of people and things contain too."""
_PURPOSES: Mapping[Purpose, re.Pattern[str]] = {
    "speed": re.compile(
        r"lightning|turbo|schnell|lightx2v|caus(al)?vid|\bdistill(ed|ation)?\b|self[-_ ]?forcing"
        r"|\b(lcm|tcd|pcm|dmd2?|accvid(eo)?)\b|\bhyper[-_ ]?(sd|flux)"
        r"|\b(1|2|4|6|8|12|16)[-_ ]?steps?\b",
        re.I,
    ),
    "edit": re.compile(
        r"kontext|\bedit(ing|or)?\b|instruct[-_ ]?pix2pix|\bip2p\b|in[-_ ]?context", re.I
    ),
    "slider": re.compile(r"\bsliders?\b", re.I),
    "detailer": re.compile(r"\bdetailers?\b|\bdetail[- ]?tweak|\b(add|more)[- ]?details?\b", re.I),
    "style": re.compile(r"(?<!hair[- ])\b(art[- ]?)?styles?\b", re.I),
}
_BOORU = re.compile(r"illustrious|noob[-_ ]?ai|animagine|\bpony\b|pony[-_ ]?diffusion", re.I)
_BASE_NAMES = ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")
_NAMED = ("ss_output_name", "modelspec.title")


def parse_object(text: str | None) -> dict[str, Any]:
    """A JSON object; empty for anything else."""
    if not text:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """A LoRA's trigger words, as its trainer recorded them, best first.

    ``modelspec.trigger_phrase``; the triggers in a merged file; the names of sd-scripts' dataset
    folders (``10_sks dog``); the tag in every caption (``ss_tag_frequency``). The last two are
    guesses, so common words and tags are left out.
    """
    words = _named(metadata)
    words += [str(concept.get("trigger") or "") for concept in merged_concepts(metadata)]
    for folder in parse_object(metadata.get("ss_dataset_dirs")):
        number, _, name = folder.partition("_")
        if number.isdigit() and not is_common(name):
            words.append(name.strip())
    for tags in tag_frequency(metadata).values():
        telling = {tag: count for tag, count in tags.items() if not is_common(tag)}
        first = Counter(telling).most_common(2)
        if first and (len(first) == 1 or first[0][1] > first[1][1]):
            words.append(first[0][0].strip())
    return list(dict.fromkeys(word for word in words if word))


def noted_phrases(metadata: Mapping[str, str]) -> list[str]:
    """Every phrase that the file names: a merged one, or ``modelspec.trigger_phrase``."""
    phrases: list[str] = []
    for concept in merged_concepts(metadata):
        called = concept.get("called") or concept.get("subjects")
        several = [str(phrase) for phrase in called] if isinstance(called, list) else []
        phrases += several or [f"{concept.get('trigger') or ''} {concept.get('class') or ''}"]
    phrases = phrases or _named(metadata)
    return list(dict.fromkeys(phrase.strip() for phrase in phrases if phrase.strip()))


def _named(metadata: Mapping[str, str]) -> list[str]:
    return [cleaned(part) for part in metadata.get("modelspec.trigger_phrase", "").split(",")]


def merged_concepts(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """The concepts with a LoRA in a merged file."""
    concepts = parse_object(metadata.get("iteris")).get("concepts")
    concepts = concepts if isinstance(concepts, list) else []
    return [c for c in concepts if isinstance(c, dict) and c.get("lora") is not None]


def tag_frequency(metadata: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """``ss_tag_frequency``: dataset folder → tag → count, without what is malformed."""
    tables: dict[str, dict[str, int]] = {}
    for folder, tags in parse_object(metadata.get("ss_tag_frequency")).items():
        if isinstance(tags, dict):
            counts = {str(t): n for t, n in tags.items() if type(n) is int and 0 <= n < 1 << 53}
            tables[folder] = counts
    return tables


def merge_tag_frequency(inputs: Sequence[Mapping[str, str]]) -> dict[str, dict[str, int]]:
    """The tables of all inputs combined; counts of equal tags in equal folders are added."""
    merged: dict[str, Counter[str]] = {}
    for metadata in inputs:
        for folder, tags in tag_frequency(metadata).items():
            merged.setdefault(folder, Counter()).update(tags)
    return {folder: dict(tags) for folder, tags in merged.items()}


_ON_THE_HUB = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def public_name(base: str) -> str:
    """A hub name, or the last part of a path: a local folder is useless elsewhere, and private."""
    path = Path(os.path.expanduser(base))  # unchanged if there is no such user
    if base and path.exists():
        return path.resolve().name
    return base if _ON_THE_HUB.fullmatch(base) else PureWindowsPath(base).name


def purpose_of(
    name: str,
    metadata: Mapping[str, str],
    tags: Iterable[str] = (),
    phrases: Sequence[str] = (),
) -> Purpose | None:
    """The purpose of a LoRA that is no subject, from its metadata, its file's ``name``, and the
    ``tags`` in the notes beside it. With trigger ``phrases`` of its own, words such as "lightning"
    do not make it a speed LoRA."""
    for text in (*(metadata.get(key, "") for key in _NAMED), name):
        text = _words(_TURBO.sub(" ", text))
        for purpose, words in _PURPOSES.items():
            if words.search(_PLAIN.sub(" ", text) if phrases else text):
                return purpose
    if "style" in tags:
        return "style"
    bases = (_words(metadata.get(key, "")) for key in _BASE_NAMES)
    frequent = (Counter(table).most_common(5) for table in tag_frequency(metadata).values())
    tagged = any(_COUNT.fullmatch(tag.strip()) for table in frequent for tag, _ in table)
    return "tags" if tagged or any(map(_BOORU.search, bases)) else None


def _words(text: str) -> str:
    """Separate words by spaces, also at capitals or underscores."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|[_.]", " ", text)


_FOLDER = Path(__file__).parents[1] / "prompts"
_COMMON_WORDS = frozenset((_FOLDER / "common_words.txt").read_text(encoding="utf-8").split())
_TAGS = frozenset(re.split(r", |\n", (_FOLDER / "common_tags.txt").read_text(encoding="utf-8")))
_COUNT = re.compile(r"\d+\+?(girl|boy|other)s?")
_LOOKS = (" hair", " eyes", " background", " breasts", " quality")
_LORA = re.compile(r"<(lora|lyco|hypernet):[^>]*>", re.I)
_LEADING = re.compile(r"^\s*((a|an|the|(photo|photograph|picture|image) of)\s+)*(?=\S)", re.I)


def cleaned(phrase: str) -> str:
    """``phrase`` without ``<lora:…>`` and without common tags at its start; may be empty."""
    parts = filter(None, (part.strip() for part in _LORA.sub(" ", phrase).split(",")))
    return ", ".join(dropwhile(_is_tag, parts))


def is_common(phrase: str) -> bool:
    """True if ``phrase`` is a common tag, or all its words are common: it then invokes no LoRA."""
    return _is_tag(phrase) or all(map(_is_common, phrase.split()))


def bare(phrase: str) -> str:
    """``phrase`` without leading articles and "photo of", which the templates have."""
    return _LEADING.sub("", phrase).strip()


def parted(phrase: str) -> tuple[str, str, str]:
    """The words before the first one that is not common, that word, and those after it."""
    words = phrase.split()
    at = next((n for n, word in enumerate(words) if not _is_common(word)), len(words))
    before, word, after = map(" ".join, (words[:at], words[at : at + 1], words[at + 1 :]))
    return before, word, after


def _is_tag(phrase: str) -> bool:
    tag = phrase.strip().lower()
    if _COUNT.fullmatch(tag) or tag in _TAGS or tag.replace("_", " ") in _TAGS:
        return True
    return tag.replace("_", " ").endswith(_LOOKS) and all(map(_is_common, tag.split()))


def _is_common(word: str) -> bool:
    word = word.lower().strip(".,;:!?()\"'").removesuffix("'s")
    if _COUNT.fullmatch(word) or word in _TAGS:
        return True
    parts = filter(None, re.split(r"[-_'/]", word))
    return all(part.isdigit() or {part, part.removesuffix("s")} & _COMMON_WORDS for part in parts)


_PREVIEWS = tuple(f".preview.{kind}" for kind in ("png", "jpg", "jpeg", "webp"))
_ENDINGS = (".metadata.json", ".civitai.info", ".rgthree-info.json", ".json")
_NAMES = ("trainedWords", "trigger_words")


def find_phrases(file: Path, metadata: Mapping[str, str]) -> tuple[tuple[str, ...], str]:
    """A LoRA's trigger phrases and their source: those in ``metadata`` (``"file"``), else beside
    the file (a sidecar's extension), else a guess from the trainer's notes (``"captions"``), else
    none and an empty text."""
    if noted := noted_phrases(metadata):
        return tuple(noted), "file"
    for path in sidecars(file):
        content = _content(path)
        tables = [content, content.get("civitai")]
        lists = [table.get(name) for table in tables if isinstance(table, dict) for name in _NAMES]
        words = [word for listed in lists if isinstance(listed, list) for word in listed]
        words.append(content.get("activation text"))  # Automatic1111's, the words as one text
        texts = [word.get("word") if isinstance(word, dict) else word for word in words]
        phrases = [cleaned(text) for text in texts if isinstance(text, str)]
        if any(phrases):
            ending = next(end for end in _ENDINGS if path.name.endswith(end))
            return tuple(dict.fromkeys(filter(None, phrases))), ending
    guessed = trigger_words(metadata)[:1]
    return tuple(guessed), "captions" if guessed else ""


def noted_tags(file: Path) -> set[str]:
    """What a site's users call the LoRA, as the files beside ``file`` record it, in lower case."""
    contents = [_content(path) for path in sidecars(file)]
    tables = [*contents, *(content.get("model") for content in contents)]
    lists = [table.get("tags") for table in tables if isinstance(table, dict)]
    return {str(tag).lower() for tags in lists if isinstance(tags, list) for tag in tags}


def sidecars(file: Path) -> list[Path]:
    """The files beside ``file`` that may have words, named with or without its extension."""
    paths = [file.with_name(f"{base}{end}") for end in _ENDINGS for base in (file.stem, file.name)]
    return [path for path in paths if path.is_file()]


def previews(file: Path) -> list[Path]:
    """The images beside ``file`` that LoRA browsers show for it."""
    paths = [file.with_name(f"{file.stem}{end}") for end in _PREVIEWS]
    return [path for path in paths if path.is_file()]


def _content(path: Path) -> dict[str, Any]:
    try:
        return parse_object(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError):
        return {}
