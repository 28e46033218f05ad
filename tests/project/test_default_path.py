"""A merge with default settings enters few parts of the core, and never more than before."""

from __future__ import annotations

from default_path import default_merge

BOUNDS = {"modules": 89, "functions": 625, "classes": 74, "two-way pairs": 22}
"""The issue on the core's size wants 45 modules, 300 functions and 4 pairs."""


def test_a_default_merge_enters_few_parts(tmp_path):
    found = default_merge(tmp_path)
    assert min(found.values()) > 0
    assert {name: count for name, count in found.items() if count > BOUNDS[name]} == {}
