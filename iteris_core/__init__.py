"""IterIS: merge several LoRAs into one by least squares on what the merged model really sees."""

from .concepts import Calibration, Concept
from .errors import IterisError, LoraFileError, MergeCancelled, SettingsError, SolveError
from .lora import Lora, LowRank
from .lora_files import write_lora
from .merge import MergeResult, merge_loras
from .methods import all_methods
from .methods.iteris_settings import IterisSettings
from .progress import Progress
from .report.report import MergeReport

__all__ = [
    "Calibration",
    "Concept",
    "IterisError",
    "IterisSettings",
    "Lora",
    "LoraFileError",
    "LowRank",
    "MergeCancelled",
    "MergeReport",
    "MergeResult",
    "Progress",
    "SettingsError",
    "SolveError",
    "all_methods",
    "merge_loras",
    "write_lora",
]
