"""Merge methods, one file each, registered by a decorator of :mod:`.registry`.

To add one, write a file like :mod:`.linear` in this folder; nothing else has to change. Those that
IterIS is only compared with are in :mod:`..rivals`.
"""

from __future__ import annotations

import importlib
import pkgutil

from .registry import Method, all_methods, find_method

for _package in (__name__, f"{__name__.rpartition('.')[0]}.rivals"):
    _folders = importlib.import_module(_package).__path__
    for _module in sorted(module.name for module in pkgutil.iter_modules(_folders)):
        importlib.import_module(f"{_package}.{_module}")

__all__ = ["Method", "all_methods", "find_method"]
