"""Merge methods, one file each, registered by a decorator of :mod:`.registry`.

To add one, write a file like :mod:`.linear` in this folder; nothing else has to change.
"""

from __future__ import annotations

import importlib
import pkgutil

from .registry import Method, all_methods, find_method

for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")

__all__ = ["Method", "all_methods", "find_method"]
