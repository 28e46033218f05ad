"""The errors that this package raises on purpose, and their index.

A class's docstring says what is wrong and, in its second paragraph, what to do; ``iteris explain``
and ``docs/errors/index.md`` are generated from it. A ``code`` never changes its meaning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches
from textwrap import shorten
from typing import Any, ClassVar

from pydantic import ValidationError


class IterisError(Exception):
    """Bad input or an impossible request.

    The message names the node or the input, and what to change there.
    """

    code: ClassVar[str] = "IT-01"

    def __init_subclass__(cls, code: str = "") -> None:
        cls.code = code or cls.code


class UsageError(IterisError, code="IT-02"):
    """Options, arguments or methods are missing or do not go together.

    `iteris COMMAND -h` lists a command's options, with examples. The message suggests a known name
    if one is close.
    """


class SettingsError(IterisError, code="IT-03"):
    """A setting is unknown, out of range or contradicts another.

    `iteris methods METHOD` lists a method's settings with their ranges; the page
    [Settings](../settings.md) lists all.
    """


class ConceptError(IterisError, code="IT-04"):
    """A concept is malformed, or has no trigger words.

    Write `FILE:TRIGGER:CLASS`, such as `cat.safetensors:sks:cat`, followed by any `,KEY=VALUE`;
    `iteris merge -h` shows all forms. If there is no trigger word, add `,prompts=FILE`, with one
    prompt per line.
    """


class MergeFileError(IterisError, code="IT-05"):
    """A merge file cannot be read, or has a wrong key or value.

    The message names the file and the key. The long names of `iteris merge`'s options are keys,
    with underscores. [Command line](../command-line.md#a-merge-file) has an example.
    """


class RecipeError(IterisError, code="IT-06"):
    """The recipe in a merged file is missing or broken, or its files cannot be found.

    Pass `option from` a file that IterIS wrote and no other tool has saved since, the folder of its
    LoRAs with `option loras`, and the base first. The LoRAs must be the same files, byte for byte.
    """


class InputFileError(IterisError, code="IT-07"):
    """A text file, image or folder cannot be read.

    Check the path. Text files must be UTF-8 with one prompt per line; images must be .png, .jpg,
    .jpeg, .webp or .bmp.
    """


class LoraFileError(IterisError, code="IT-08"):
    """A LoRA file cannot be read, or does not fit the base model.

    If the file is truncated, a web page or a Git LFS pointer, download it again. `iteris inspect
    FILE` shows for which base it was made. `option allow_partial` leaves out the parts that a LoRA
    cannot represent, and lists them.
    """


class BaseError(IterisError, code="IT-09"):
    """The base does not exist, cannot be loaded, or does not support merging.

    Give a diffusers pipeline folder (it contains a `model_index.json`), a .safetensors checkpoint
    or a hub name, `OWNER/NAME`. [Architectures](../architectures.md) lists the tested models.
    """


class DeviceError(IterisError, code="IT-10"):
    """The device does not exist.

    Omit `option device` to use the best available.
    """


class ModelStateError(IterisError, code="IT-11"):
    """The loaded model is in a state that does not allow a merge.

    Reload the model in eval mode, not compiled, without adapters and without group offload. Compile
    it or load adapters after the merge.
    """


class MismatchError(IterisError, code="IT-12"):
    """The LoRAs do not match each other, the base or the method.

    Merge LoRAs for one base model, on that base; `iteris inspect` shows the base of each.
    """


class SiteError(IterisError, code="IT-13"):
    """A layer cannot be merged by its features.

    `option unmergeable skip` continues without these layers and lists them; `option unmergeable
    mean` gives them the mean of the LoRAs.
    """


class SolveError(IterisError, code="IT-14"):
    """A site has no usable solution (NaN inputs, a singular system).

    Look for a LoRA with broken values, use more prompts (`option samples`), or more ridge
    (`ridge=0.001`; above that most of a merge is lost). A float16 base may overflow: use `option
    base_dtype bfloat16`.
    """


class OutOfMemory(IterisError, code="IT-15"):
    """The device or the host ran out of memory, in spite of retries.

    Try `option offload model`, `option base_dtype bfloat16`, a smaller `option latent_size` or
    fewer `option frames`. `option plan` shows how much memory a merge needs before it runs.
    """


class OutputError(IterisError, code="IT-16"):
    """The result cannot be written to that path, or not in that form.

    Choose another name or folder, or use `option overwrite`. A result is a .safetensors file.
    Values that do not fit in float16 need `option dtype float32`.
    """


class SaveError(IterisError, code="IT-17"):
    """A file cannot be written; an existing file of that name is unchanged.

    Make room on the disk, or choose a folder that you can write to. A finished merge is kept
    elsewhere; the message says where.
    """


class ScoreError(IterisError, code="IT-18"):
    """Images cannot be drawn or scored as requested.

    Give at least one image and one reference, and one prompt per image. Placeholders in prompts are
    {each}, {all} and {1}, {2} …
    """


KINDS = (IterisError, *IterisError.__subclasses__())
"""The index: all errors declared here."""


def meaning_of(kind: type[IterisError]) -> str:
    """What is wrong."""
    return (kind.__doc__ or "").partition("\n\n")[0]


def remedy_of(kind: type[IterisError]) -> str:
    """What to do, in Markdown."""
    return " ".join((kind.__doc__ or "").partition("\n\n")[2].split())


def with_options(text: str, name: Callable[[str], str]) -> str:
    """Replace each ``option NAME`` in a message by ``name(NAME)``: what the command line or a node
    calls that option."""
    return re.sub(r"\boption ([a-z_]+)", lambda found: name(found[1]), text)


def brief(error: BaseException) -> str:
    """A library's message on one line, at most 300 characters; its class name if empty."""
    return shorten(str(error), 300, placeholder=" …") or type(error).__name__


def first_mistake(error: ValidationError) -> str:
    """The first error of pydantic: what is wrong with which key."""
    mistake = error.errors()[0]
    return f"{mistake['loc'][0]}: {mistake['msg']}, not {mistake['input']!r}."


def unknown(what: str, name: Any, known: Collection[str]) -> str:
    """The nearest and all ``known`` names of a kind, such as keys, for one that is unknown."""
    guess = did_you_mean(str(name), known)
    return f"there is no {what} {name!r}{guess} The {what}s are {', '.join(known)}."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown ``name``, with the nearest of ``known``."""
    near = get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else "."
