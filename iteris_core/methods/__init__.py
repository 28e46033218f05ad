"""Merge methods, one file each, registered by a decorator.

To add one, write a file like :mod:`.linear` and name it in the import below. A method is a function
``(task, settings) -> {site: (change, report)}``; ``settings`` is a frozen dataclass that is
declared once and read by the library, the command line and the nodes.
"""

from . import iteris, linear
from .registry import Method, Task, all_methods, find_method

__all__ = ["Method", "Task", "all_methods", "find_method", "iteris", "linear"]
