"""LoRA files: reading in every layout, and writing in those that everybody reads.

Only safetensors is read. To teach the reader a layout, add its names to :mod:`.names`; to teach it
a parametrisation, add its leaves to :mod:`.parts` and its formula to :mod:`.rebuild`.
"""

from .reading import ReadOptions, read_lora_file
from .tensors import read_tensors
from .writing import DTYPES, Layout, check_target, write_lora

__all__ = [
    "DTYPES",
    "Layout",
    "ReadOptions",
    "check_target",
    "read_lora_file",
    "read_tensors",
    "write_lora",
]
