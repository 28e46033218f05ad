"""The errors that this package raises on purpose, and the index of them.

Every class that is raised is in :data:`KINDS`, from which ``iteris explain`` and
``docs/errors/index.md`` are made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches


class IterisError(Exception):
    """Bad input or an impossible request.

    The message says what is wrong, where (file, key, site) and what to do.
    """


class UsageError(IterisError):
    """Options, arguments or methods that do not go together, or that are missing."""


class SettingsError(IterisError):
    """A setting is unknown, out of range or contradicts another one."""


class ConceptError(IterisError):
    """A concept is malformed, or has no trigger words."""


class MergeFileError(IterisError):
    """A merge file cannot be read, or has a wrong key or value."""


class RecipeError(IterisError):
    """The recipe in a merged file is missing or broken, or its files are not found again."""


class InputFileError(IterisError):
    """A text file, a picture or a folder that was named cannot be read."""


class LoraFileError(IterisError):
    """A LoRA file cannot be read, or does not fit the base model."""


class BaseError(IterisError):
    """The base is not there, cannot be loaded, or is of a kind that LoRAs are not merged on."""


class DeviceError(IterisError):
    """A device that is not here, or too few rows for so many processes."""


class ModelStateError(IterisError):
    """A loaded model is in a state in which nothing can be merged on it."""


class MismatchError(IterisError):
    """The LoRAs do not fit each other, the base or the method."""


class SiteError(IterisError):
    """A layer cannot be merged by its features."""


class SolveError(IterisError):
    """A site has no usable solution (NaN inputs, a singular system)."""


class OutOfMemory(IterisError):
    """Memory of the device or of the host is not enough, in spite of what was tried."""


class OutputError(IterisError):
    """A result cannot be written to that place, or not in that form."""


class SaveError(IterisError):
    """A file cannot be written; what had its name before still has."""


class ScoreError(IterisError):
    """Pictures cannot be drawn or scored in the way that was requested."""


@dataclass(frozen=True)
class Kind:
    """The index entry of an error beyond its docstring; a code never changes its meaning."""

    code: str
    remedy: str


KINDS: Mapping[type[IterisError], Kind] = {
    IterisError: Kind(
        "IT-01",
        "The message names the node or the input and what to change there.",
    ),
    UsageError: Kind(
        "IT-02",
        "`iteris COMMAND -h` lists the options of a command, with examples in front. The message "
        "suggests a known name where one is close.",
    ),
    SettingsError: Kind(
        "IT-03",
        "`iteris methods METHOD` lists the settings of a method with their ranges; all are on the "
        "page [Settings](../settings.md).",
    ),
    ConceptError: Kind(
        "IT-04",
        "Write `FILE:TRIGGER:CLASS`, such as `cat.safetensors:sks:cat`, with `,KEY=VALUE` behind "
        "it; `iteris merge -h` shows all forms. Without a trigger word give `,prompts=FILE`, with "
        "one prompt a line.",
    ),
    MergeFileError: Kind(
        "IT-05",
        "The message names the file and the key. Every long option of `iteris merge` is a key, "
        "with underscores; `iteris init FOLDER` writes a file that is right.",
    ),
    RecipeError: Kind(
        "IT-06",
        "Give `--from` a file that IterIS wrote and no other tool has saved again, the folder of "
        "its LoRAs with `--loras`, and the base in front. The LoRAs must be the same files, byte "
        "by byte.",
    ),
    InputFileError: Kind(
        "IT-07",
        "Check the path. Text files are UTF-8 with one line for each prompt; pictures are .png, "
        ".jpg, .jpeg, .webp or .bmp.",
    ),
    LoraFileError: Kind(
        "IT-08",
        "Download the file again where it is cut off, a web page or a Git LFS pointer. `iteris "
        "inspect FILE` shows for which base it was made. `--allow-partial` leaves out the parts "
        "that no LoRA can represent, and lists them.",
    ),
    BaseError: Kind(
        "IT-09",
        "Give a folder with a pipeline of diffusers (it has a `model_index.json`), a .safetensors "
        "checkpoint or a name on the hub, `OWNER/NAME`. [Architectures](../architectures.md) lists "
        "the models that were tested.",
    ),
    DeviceError: Kind(
        "IT-10",
        "Leave `--device` out for the best that there is; `iteris doctor` shows it. Start fewer "
        "processes, or take more `--samples`.",
    ),
    ModelStateError: Kind(
        "IT-11",
        "Load the model anew: in eval mode, not compiled, without adapters and without offload by "
        "groups of blocks. Compile it or load adapters after the merge.",
    ),
    MismatchError: Kind(
        "IT-12",
        "Merge LoRAs of one base model, on that base; `iteris inspect` shows what each was made "
        "for.",
    ),
    SiteError: Kind(
        "IT-13",
        "`--unmergeable skip` goes on without such layers and lists them; `--unmergeable mean` "
        "gives them the mean of the LoRAs.",
    ),
    SolveError: Kind(
        "IT-14",
        "Look for a LoRA with broken values, give more prompts (`--samples`), or more ridge "
        "(`--set ridge=0.01`). A base in float16 may overflow: `--base-dtype bfloat16`.",
    ),
    OutOfMemory: Kind(
        "IT-15",
        "Try `--offload model`, `--base-dtype bfloat16`, a lower `--latent-size` or fewer "
        "`--frames`. `--plan` shows what a merge takes before it runs.",
    ),
    OutputError: Kind(
        "IT-16",
        "Choose another name or folder, or `--overwrite`. A result is a .safetensors, and for a "
        "model of transformers a folder. Values that float16 does not hold need `--dtype float32`.",
    ),
    SaveError: Kind(
        "IT-17",
        "Make room on the disk, or choose a folder that you may write to. A merge that was "
        "finished is kept elsewhere; the message says where.",
    ),
    ScoreError: Kind(
        "IT-18",
        "Give at least one picture and one reference, and one prompt for each picture. "
        "Placeholders in prompts are {each}, {all} and {1}, {2} …",
    ),
}
"""Class → its code and remedy, in the order of the index."""


def kind_of(error: IterisError) -> Kind:
    """The entry of an error's own class, or of the nearest that it is derived from."""
    return next(KINDS[one] for one in type(error).__mro__ if one in KINDS)


def brief(error: BaseException) -> str:
    """A library's message on one line, cut to 300 characters; its kind where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown ``name``, with the nearest of ``known``, if any."""
    near = get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else "."
