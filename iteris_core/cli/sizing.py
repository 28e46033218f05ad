"""Options that several commands of :mod:`..edit` share: how small, on what, and where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from ..concepts import Calibration
from ..lora import Lora
from ..lora_files import DTYPES, Layout
from ..solve.ranks import Target
from .common import CALIBRATION, RESULT, BaseDtype, Device, Memory, bytes_of, option
from .options import Dtype, given_by, settings_of
from .saving import save_lora, save_or_keep

Energy = Annotated[float, option("Share kept of changes that are not low rank by themselves")]
Partial = Annotated[
    bool, option("Leave out what no LoRA can represent, and list it", "--allow-partial")
]
Overwrite = Annotated[bool, option("Replace what has that name", "--overwrite")]


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """A field for each option, named like it."""

    output: Path = given_by(
        "The .safetensors to write; for several files a folder", "--output", "-o", default=MISSING
    )
    rank: int | None = given_by("As small as with this rank in every layer")
    size: float | None = given_by("At most so many megabytes")
    energy: float | None = given_by("The share kept of what is added to the layers' outputs")
    calibration: Mapping[str, Any] = settings_of(Calibration, CALIBRATION)
    layout: Layout | None = given_by("Of the file", panel=RESULT)
    dtype: Dtype = given_by("Of the file", panel=RESULT, default="float16")
    overwrite: Overwrite = False
    as_json: bool = given_by("Print the report as JSON", "--json", panel=RESULT, default=False)
    quiet: bool = given_by(
        "Show nothing but what is wrong", "--quiet", "-q", panel=RESULT, default=False
    )
    device: Device = None
    base_dtype: BaseDtype = None
    memory: Memory = None

    @property
    def target(self) -> Target:
        return Target(self.rank, self.size, self.energy)

    @property
    def run(self) -> dict[str, Any]:
        """The arguments for the functions of :mod:`..edit`."""
        return {
            "calibration": Calibration.from_mapping(self.calibration),
            "itemsize": DTYPES[self.dtype].itemsize,
            "memory_budget": bytes_of(self.memory),
        }

    def save(self, lora: Lora, path: Path, layout: Layout | None) -> Path:
        """Write ``lora``, or keep it elsewhere; returns where it is."""
        write = partial(save_lora, lora, self.overwrite)
        return save_or_keep(path, write, layout, self.dtype)[0]
