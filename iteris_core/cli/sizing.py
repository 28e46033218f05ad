"""Options that several :mod:`..edit` commands share: the size, the base and the output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..concepts import Calibration
from ..edit.reduced import Reduced
from ..lora_files import DTYPES, Layout
from ..solve.ranks import Target
from .common import CALIBRATION, RESULT, BaseDtype, Device, Memory, bytes_of, option
from .options import Dtype, given_by, settings_of
from .saving import save_lora, save_or_keep

Energy = Annotated[float, option("Share to keep of changes that are not low rank")]
Partial = Annotated[
    bool, option("Leave out what a LoRA cannot represent, and list it", "--allow-partial")
]
Overwrite = Annotated[bool, option("Replace an existing file", "--overwrite")]


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """One field per option, with the option's name."""

    output: Path = given_by(
        "The .safetensors to write; for several files, a folder", "--output", "-o", default=MISSING
    )
    rank: int | None = given_by("Make the file as small as this rank in every layer would")
    size: float | None = given_by("Limit the file to this many megabytes")
    energy: float | None = given_by("Share to keep of what the LoRA adds to the layers' outputs")
    calibration: Mapping[str, Any] = settings_of(Calibration, CALIBRATION)
    layout: Layout | None = given_by("Naming scheme of the file", panel=RESULT)
    dtype: Dtype = given_by("Type of the file", panel=RESULT, default="float16")
    overwrite: Overwrite = False
    as_json: bool = given_by("Print the report as JSON", "--json", panel=RESULT, default=False)
    quiet: bool = given_by(
        "Show only warnings and errors", "--quiet", "-q", panel=RESULT, default=False
    )
    device: Device = None
    base_dtype: BaseDtype = None
    memory: Memory = None

    @property
    def target(self) -> Target:
        return Target(self.rank, self.size, self.energy)

    @property
    def run(self) -> dict[str, Any]:
        """Arguments for the functions of :mod:`..edit`."""
        return {
            "calibration": Calibration.from_mapping(self.calibration),
            "itemsize": DTYPES[self.dtype].itemsize,
            "memory_budget": bytes_of(self.memory),
        }

    def save(
        self, made: Reduced, path: Path, layout: Layout | None, source: Path
    ) -> dict[str, Any]:
        """Write the LoRA that was made of ``source``, or keep it elsewhere if that fails; says so,
        and returns the report for JSON."""
        write = partial(save_lora, made.lora, self.overwrite)
        path = save_or_keep(path, write, layout, self.dtype)[0]
        sizes = [file.stat().st_size / 1e6 for file in (source, path) if file.is_file()]
        if not self.as_json and not self.quiet:
            typer.echo(escape(made.summary()))
            typer.echo(f"Wrote {path} ({' → '.join(f'{size:.3g}' for size in sizes)} MB).")
        return {"path": str(path), "megabytes": sizes, **made.to_dict()}
