"""IterIS: merges several LoRAs into one, by least squares on the inputs of the merged model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calibration import Calibration
    from .concepts import Concept
    from .edit.loaded import add_merged_adapter, merge_loaded
    from .errors import IterisError, LoraFileError, SettingsError, SolveError
    from .hosts.diffusers import DiffusersHost
    from .hosts.sample_store import SampleStore
    from .hosts.transformers import TransformersHost
    from .lora import Lora, LowRank
    from .lora_files import write_lora
    from .lora_files.peft_folder import read_heads, write_adapter
    from .merge import MergeResult, merge_loras
    from .methods import all_methods
    from .methods.fitting import IterisSettings
    from .passes.report import MergeReport
    from .progress import Progress

_MODULES = {
    "calibration": "Calibration",
    "concepts": "Concept",
    "edit.loaded": "add_merged_adapter merge_loaded",
    "errors": "IterisError LoraFileError SettingsError SolveError",
    "hosts.diffusers": "DiffusersHost",
    "hosts.sample_store": "SampleStore",
    "hosts.transformers": "TransformersHost",
    "lora": "Lora LowRank",
    "lora_files": "write_lora",
    "lora_files.peft_folder": "read_heads write_adapter",
    "merge": "MergeResult merge_loras",
    "methods": "all_methods",
    "methods.fitting": "IterisSettings",
    "progress": "Progress",
    "passes.report": "MergeReport",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}
"""Name → its module, imported on first use. Importing torch takes seconds, diffusers and
transformers longer; without them the command line can still report what is missing."""

__all__ = [
    "Calibration",
    "Concept",
    "DiffusersHost",
    "IterisError",
    "IterisSettings",
    "Lora",
    "LoraFileError",
    "LowRank",
    "MergeReport",
    "MergeResult",
    "Progress",
    "SampleStore",
    "SettingsError",
    "SolveError",
    "TransformersHost",
    "add_merged_adapter",
    "all_methods",
    "merge_loaded",
    "merge_loras",
    "read_heads",
    "write_adapter",
    "write_lora",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
