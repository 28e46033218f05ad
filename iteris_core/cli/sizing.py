"""What resizing and extracting share on the command line: the size, the base and the output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..concepts import Calibration
from ..edit.resize import Reduced
from ..lora_files import DTYPES, Layout
from ..lora_files.experts import write_by_expert
from ..solve.ranks import Target
from .common import save_or_keep
from .options import (
    RESULT,
    AsJson,
    BaseDtype,
    Device,
    Dtype,
    Memory,
    Overwrite,
    bytes_of,
    option,
)


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """One field per option, with the option's name."""

    output: Annotated[Path, option("The .safetensors to write", "--output", "-o")]
    rank: Annotated[
        int | None, option("Make the file as small as this rank in every layer would")
    ] = None
    size: Annotated[float | None, option("Limit the file to this many megabytes")] = None
    energy: Annotated[
        float | None, option("Share to keep of what the LoRA adds to the layers' outputs")
    ] = None
    layout: Annotated[Layout | None, option("Naming scheme of the file", panel=RESULT)] = None
    dtype: Annotated[Dtype, option("Type of the file", panel=RESULT)] = "float16"
    overwrite: Overwrite = False
    as_json: AsJson = False
    quiet: Annotated[
        bool, option("Show only warnings and errors", "--quiet", "-q", panel=RESULT)
    ] = False
    device: Device = None
    base_dtype: BaseDtype = None
    memory: Memory = None

    @property
    def target(self) -> Target:
        return Target(self.rank, self.size, self.energy)

    def run(self, calibration: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments for the functions of :mod:`..edit`."""
        return {
            "calibration": Calibration.from_mapping(calibration),
            "itemsize": DTYPES[self.dtype].itemsize,
            "memory_budget": bytes_of(self.memory),
        }

    def save(
        self, made: Reduced, path: Path, layout: Layout | None, source: Path
    ) -> dict[str, Any]:
        """Write the LoRA that was made of ``source``, or keep it elsewhere if that fails; says so,
        and returns the report for JSON."""

        def write(path: Path, layout: Layout | None, dtype: str) -> list[Path]:
            return write_by_expert(
                made.lora, path, layout=layout, dtype=dtype, overwrite=self.overwrite
            )

        path = save_or_keep(path, write, layout, self.dtype)[0]
        sizes = [file.stat().st_size / 1e6 for file in (source, path) if file.is_file()]
        if not self.as_json and not self.quiet:
            typer.echo(escape(made.summary()))
            typer.echo(f"Wrote {path} ({' → '.join(f'{size:.3g}' for size in sizes)} MB).")
        return {"path": str(path), "megabytes": sizes, **made.to_dict()}
