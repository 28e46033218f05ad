"""LoRA files: reads every layout, and writes layouts that every tool reads.

Only safetensors is read. Names are defined in :mod:`.aliases`, or in :mod:`..architectures` if only
one architecture uses them. To add a parametrisation, add its leaves to :mod:`.tensors` and its
formula to :mod:`.formulas`.
"""

from ..architectures.record import BaseModel
from .aliases import base_model, released_base
from .read import ReadOptions, read_for_released, read_lora_file
from .tensors import is_lora, read_header, read_tensors
from .write import DTYPES, Layout, check_target, to_tensors, write_lora, write_loras

__all__ = [
    "DTYPES",
    "BaseModel",
    "Layout",
    "ReadOptions",
    "base_model",
    "check_target",
    "is_lora",
    "read_for_released",
    "read_header",
    "read_lora_file",
    "read_tensors",
    "released_base",
    "to_tensors",
    "write_lora",
    "write_loras",
]
