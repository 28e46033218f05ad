"""The program ``iteris``: runs :mod:`.cli`, and prints one line if an import fails."""

from __future__ import annotations

import sys

_EXTRAS = {"open_clip": "score", "matplotlib": ""}
"""Module → the extra of this package that installs it; ``cli`` installs the others."""
_OWN = ("iteris_core", "toybox")


def main() -> None:
    try:
        from .cli import main as run  # takes seconds: imports torch

        run()
    except KeyboardInterrupt:
        _stop("cancelled; nothing was written.", 130)
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if not name or name in _OWN:
            raise
        extra = _EXTRAS.get(name, "cli")
        package = f"'iteris-lora[{extra}]'" if extra else name
        _stop(f"{name} is not installed; install it with: pip install {package}", 2)


def _stop(what: str, status: int) -> None:
    sys.stderr.write(f"iteris: {what}\n")
    sys.exit(status)


if __name__ == "__main__":
    main()
