"""The errors that this package raises on purpose, and the index of them.

A class's docstring says what is wrong and, in its second paragraph, what to do; ``iteris explain``
and ``docs/errors/index.md`` are made from those. A ``code`` never changes its meaning.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar


class IterisError(Exception):
    """Bad input or an impossible request.

    The message names the node or the input and what to change there.
    """

    code: ClassVar[str] = "IT-01"

    def __init_subclass__(cls, code: str = "") -> None:
        cls.code = code or cls.code


class UsageError(IterisError, code="IT-02"):
    """Options, arguments or methods that do not go together, or that are missing.

    `iteris COMMAND -h` lists the options of a command, with examples in front. The message suggests
    a known name where one is close.
    """


class SettingsError(IterisError, code="IT-03"):
    """A setting is unknown, out of range or contradicts another one.

    `iteris methods METHOD` lists the settings of a method with their ranges; all are on the page
    [Settings](../settings.md).
    """


class ConceptError(IterisError, code="IT-04"):
    """A concept is malformed, or has no trigger words.

    Write `FILE:TRIGGER:CLASS`, such as `cat.safetensors:sks:cat`, with `,KEY=VALUE` behind it;
    `iteris merge -h` shows all forms. Without a trigger word give `,prompts=FILE`, with one prompt
    a line.
    """


class MergeFileError(IterisError, code="IT-05"):
    """A merge file cannot be read, or has a wrong key or value.

    The message names the file and the key. Every long option of `iteris merge` is a key, with
    underscores; `iteris init FOLDER` writes a file that is right.
    """


class RecipeError(IterisError, code="IT-06"):
    """The recipe in a merged file is missing or broken, or its files are not found again.

    Give `--from` a file that IterIS wrote and no other tool has saved again, the folder of its
    LoRAs with `--loras`, and the base in front. The LoRAs must be the same files, byte by byte.
    """


class InputFileError(IterisError, code="IT-07"):
    """A text file, a picture or a folder that was named cannot be read.

    Check the path. Text files are UTF-8 with one line for each prompt; pictures are .png, .jpg,
    .jpeg, .webp or .bmp.
    """


class LoraFileError(IterisError, code="IT-08"):
    """A LoRA file cannot be read, or does not fit the base model.

    Download the file again where it is cut off, a web page or a Git LFS pointer. `iteris inspect
    FILE` shows for which base it was made. `--allow-partial` leaves out the parts that no LoRA can
    represent, and lists them.
    """


class BaseError(IterisError, code="IT-09"):
    """The base is not there, cannot be loaded, or is of a kind that LoRAs are not merged on.

    Give a folder with a pipeline of diffusers (it has a `model_index.json`), a .safetensors
    checkpoint or a name on the hub, `OWNER/NAME`. [Architectures](../architectures.md) lists the
    models that were tested.
    """


class DeviceError(IterisError, code="IT-10"):
    """A device that is not here, or too few rows for so many processes.

    Leave `--device` out for the best that there is; `iteris doctor` shows it. Start fewer
    processes, or take more `--samples`.
    """


class ModelStateError(IterisError, code="IT-11"):
    """A loaded model is in a state in which nothing can be merged on it.

    Load the model anew: in eval mode, not compiled, without adapters and without offload by groups
    of blocks. Compile it or load adapters after the merge.
    """


class MismatchError(IterisError, code="IT-12"):
    """The LoRAs do not fit each other, the base or the method.

    Merge LoRAs of one base model, on that base; `iteris inspect` shows what each was made for.
    """


class SiteError(IterisError, code="IT-13"):
    """A layer cannot be merged by its features.

    `--unmergeable skip` goes on without such layers and lists them; `--unmergeable mean` gives them
    the mean of the LoRAs.
    """


class SolveError(IterisError, code="IT-14"):
    """A site has no usable solution (NaN inputs, a singular system).

    Look for a LoRA with broken values, give more prompts (`--samples`), or more ridge (`--set
    ridge=0.01`). A base in float16 may overflow: `--base-dtype bfloat16`.
    """


class OutOfMemory(IterisError, code="IT-15"):
    """Memory of the device or of the host is not enough, in spite of what was tried.

    Try `--offload model`, `--base-dtype bfloat16`, a lower `--latent-size` or fewer `--frames`.
    `--plan` shows what a merge takes before it runs.
    """


class OutputError(IterisError, code="IT-16"):
    """A result cannot be written to that place, or not in that form.

    Choose another name or folder, or `--overwrite`. A result is a .safetensors, and for a model of
    transformers a folder. Values that float16 does not hold need `--dtype float32`.
    """


class SaveError(IterisError, code="IT-17"):
    """A file cannot be written; what had its name before still has.

    Make room on the disk, or choose a folder that you may write to. A merge that was finished is
    kept elsewhere; the message says where.
    """


class ScoreError(IterisError, code="IT-18"):
    """Pictures cannot be drawn or scored in the way that was requested.

    Give at least one picture and one reference, and one prompt for each picture. Placeholders in
    prompts are {each}, {all} and {1}, {2} …
    """


KINDS = (IterisError, *IterisError.__subclasses__())
"""The index: those that are declared here."""


def remedy_of(kind: type[IterisError]) -> str:
    """What to do, in Markdown."""
    return " ".join((kind.__doc__ or "").partition("\n\n")[2].split())


def brief(error: BaseException) -> str:
    """A library's message on one line, cut to 300 characters; its kind where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown ``name``, with the nearest of ``known``, if any."""
    near = get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else "."
