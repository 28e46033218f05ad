"""Merge methods, one file each, registered by a decorator.

To add one, write a file like :mod:`.linear` and name it in the import below. A method is a function
``(job, settings) -> {site: (change, report)}``; ``settings`` is a dataclass over
:class:`..settings.Settings`, declared once and read by the library, the command line and the nodes.
"""

from ..passes.job import Job
from . import (
    custom_diffusion,
    dare,
    iteris,
    iteris_subspace,
    knots,
    linear,
    orthogonal,
    regmean,
    ssr,
    ties,
)
from .registry import Method, all_methods, find_method

__all__ = [
    "Job",
    "Method",
    "all_methods",
    "custom_diffusion",
    "dare",
    "find_method",
    "iteris",
    "iteris_subspace",
    "knots",
    "linear",
    "orthogonal",
    "regmean",
    "ssr",
    "ties",
]
