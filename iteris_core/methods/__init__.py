"""Merge methods, registered by a decorator of :mod:`.registry`.

To add one, write a file like :mod:`.linear` in this folder and import it here. A package outside
this one registers its own in the same way.
"""

from __future__ import annotations

from . import elected_signs, iteris, linear, regmean
from .registry import Method, all_methods, find_method

__all__ = ["Method", "all_methods", "elected_signs", "find_method", "iteris", "linear", "regmean"]
