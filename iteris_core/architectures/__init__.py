"""Known base models: their names in LoRA files, wiring and released sizes."""

from .detection import ARCHITECTURES, architecture, architecture_of_file, architecture_of_sites
from .record import Architecture

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "architecture",
    "architecture_of_file",
    "architecture_of_sites",
]
