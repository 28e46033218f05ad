"""The commands' help: plain text in groups, examples first, for 80 columns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from typer.core import TyperCommand, TyperGroup

_TYPES = {
    **{"<path>": "FILE", "<list[path]>": "FILE", "<str>": "TEXT", "<list[str]>": "TEXT"},
    **{"<int>": "N", "<float>": "X", "<float range>": "X", "<int range>": "N"},
}
"""typer's name of a type → the name in the help."""

EXAMPLES = {
    "bake": ("iteris bake model.safetensors --lora cat.safetensors:0.8 -o model-cat.safetensors",),
    "merge": (
        "iteris merge BASE --concept cat.safetensors:sks:cat "
        "--concept dog.safetensors:zwx:dog -o both.safetensors",
        "iteris merge merge.yaml --preset best -o both.safetensors",
    ),
    "compare": (
        "iteris compare BASE -o results --methods base,alone,average,iteris "
        "--concept cat.safetensors:sks:cat --refs pictures/cat "
        "--concept dog.safetensors:zwx:dog --refs pictures/dog",
    ),
    "convert": ("iteris convert cat.safetensors --layout comfyui -o cat-comfyui.safetensors",),
    "explain": ("iteris explain IT-09",),
    "extract": ("iteris extract BASE TUNED --rank 32 -o tuned.safetensors",),
    "init": ("iteris init loras", "iteris init loras --base models/sdxl -o people.yaml --yes"),
    "inspect": ("iteris inspect cat.safetensors dog.safetensors",),
    "resize": (
        "iteris resize cat.safetensors:sks:cat --base BASE --rank 8 -o cat-8.safetensors",
        "iteris resize cat.safetensors dog.safetensors --size 20 -o smaller",
    ),
    "score": ("iteris score pictures --refs references --prompts prompts.txt",),
}
"""Command → its example lines; a test checks them against the options."""

CONCEPT = (
    ("FILE", "a LoRA with its trigger words in its metadata"),
    ("FILE:TRIGGER:CLASS", 'cat.safetensors:sks:cat, in prompts "sks cat"'),
    ("FILE:TRIGGER:CLASS:0.8", "at strength 0.8; 0.8/0.5: model and text encoders"),
    ("HIGH+LOW:TRIGGER:CLASS", "two files, for a base with two experts"),
    ("FOLDER:SAMPLES", "a peft adapter for a transformers model; or with :0.8"),
    (",weight=2", "how much it counts in the merge (1)"),
    (",prompts=FILE", "its own prompts, one per line, not templates"),
    (",kind=style", "templates for a style; also tags, video (subject)"),
    (",always_on=include", "a speed LoRA: on in every merge, and in the file"),
    (",blocks= ,layers=*attn2*", "a part of it: block weights, or names of layers"),
    (",trigger= ,class= ,strength= ,text_strength= ,samples=", "the same by name"),
)
"""The forms of ``--concept``, and the keys that may follow."""


class Command(TyperCommand):
    """A command whose help is plain text, under its options' headings."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        if examples := EXAMPLES.get(self.name or ""):
            with formatter.section("Examples"):
                for line in examples:
                    formatter.write_text(line)
        groups = _groups(self, ctx)
        if any("--concept" in names for names, _ in groups["Options"]):
            groups["A concept"] = list(CONCEPT)
        order = dict.fromkeys(("Arguments", "Options", "A concept", *groups))
        _write(formatter, {name: groups[name] for name in order if name in groups})


class Group(TyperGroup):
    """The program, whose help is plain text too."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        commands = [(name, self.commands[name]) for name in self.list_commands(ctx)]
        texts = [(name, one.get_short_help_str(200)) for name, one in commands]
        groups = {"Commands": texts, **_groups(self, ctx)}
        _write(formatter, groups)


def _write(formatter: Any, groups: Mapping[str, Any]) -> None:
    for heading, rows in groups.items():
        with formatter.section(heading):
            formatter.write_dl(rows, col_max=24)


def _groups(command: Any, ctx: Any) -> dict[str, list[tuple[str, str]]]:
    """Heading → names and help of its parameters. A name includes its type in one word; choices
    appear without brackets."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is None:
            continue
        argument = parameter.param_type_name == "argument"
        heading = getattr(parameter, "rich_help_panel", None)
        heading = heading or ("Arguments" if argument else "Options")
        heading = "Help" if parameter.name == "help" and command.name == "merge" else heading
        names = re.sub(
            r"<[^<>]+>",
            lambda tag: _TYPES.get(tag[0].lower(), tag[0][1:-1]),
            record[0].replace(" <bool>", ""),
        )
        names = parameter.metavar if argument and parameter.metavar else names
        groups.setdefault(heading, []).append((names, record[1]))
    return groups
