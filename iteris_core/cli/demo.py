"""``iteris demo``"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from ..errors import UsageError
from .common import progress_bars
from .options import option


def demo(
    output: Annotated[Path, option("Folder for images and scores", "--output", "-o")] = Path(
        "build/demo"
    ),
) -> None:
    """Merge two and four concepts of the bundled toybox, draw and score them."""
    try:
        toybox_demo: Any = importlib.import_module("toybox.demo")
    except ModuleNotFoundError as error:
        raise UsageError(
            "The toybox is not installed; run this from a checkout of the project."
        ) from error
    with progress_bars() as on_progress:
        table = toybox_demo.run(output, on_progress)
    Console().print(table)
