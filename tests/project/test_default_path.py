"""A merge with default settings enters few parts of the core, and never more than before.

Two LoRA files go in and one comes out, on a tiny Stable Diffusion pipeline with default settings.
Counted are our modules, functions and classes that were entered, and pairs of modules that call
each other both ways; ``PYTHONPATH=.:tests python tests/project/test_default_path.py`` prints them.
"""

import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType

import greenlet
from tiny import make_pipeline, random_lora

import iteris_core
from iteris_core import Calibration, Concept, merge_loras, write_lora
from iteris_core.hosts.diffusers import DiffusersHost

CORE = Path(iteris_core.__file__).parent


class Entered:
    """Code of ours that ran, and who called whom."""

    def __init__(self) -> None:
        self._codes: set[CodeType] = set()
        self._calls: set[tuple[str, str]] = set()

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        code, caller = frame.f_code, frame.f_back
        if event == "call" and code.co_filename.startswith(str(CORE)):
            self._codes.add(code)
            if caller is not None and caller.f_code.co_filename.startswith(str(CORE)):
                self._calls.add((caller.f_code.co_filename, code.co_filename))

    def counts(self) -> dict[str, int]:
        named = {(c.co_filename, c.co_qualname) for c in self._codes if c.co_name[0] != "<"}
        owners = {(file, name.rpartition(".")[0]) for file, name in named}
        both_ways = {(a, b) for a, b in self._calls if a < b and (b, a) in self._calls}
        return {
            "modules": len({file for file, _ in named}),
            "functions": len(named),
            "classes": len({one for one in owners if one[1] and "<locals>" not in one[1]}),
            "two-way pairs": len(both_ways),
        }


@contextmanager
def profiled(profile: Callable[[FrameType, str, object], None]) -> Generator[None]:
    """A greenlet starts without the profile of the one that switches to it."""
    former = greenlet.settrace(lambda *_: sys.setprofile(profile))
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)
        greenlet.settrace(former)


def default_merge(folder: Path) -> dict[str, int]:
    host = DiffusersHost(make_pipeline())
    files = [folder / f"{name}.safetensors" for name in ("cat", "dog")]
    for seed, file in enumerate(files, 1):
        write_lora(random_lora(host, seed), file)
    entered, calibration = Entered(), Calibration(samples=3, timesteps=2, denoising_steps=3)
    with profiled(entered):
        concepts = [
            Concept(host.read_lora(file), None, trigger, word)
            for file, trigger, word in zip(files, ("sks", "zwx"), ("cat", "dog"), strict=True)
        ]
        merge_loras(host, concepts, calibration=calibration).save(folder / "both.safetensors")
    return entered.counts()


BOUNDS = {"modules": 64, "functions": 569, "classes": 65, "two-way pairs": 9}
"""No more than these; fewer is better. Three pairs are retries with less memory, by a call back."""


def test_a_default_merge_enters_few_parts(tmp_path):
    found = default_merge(tmp_path)
    assert min(found.values()) > 0
    assert {name: count for name, count in found.items() if count > BOUNDS[name]} == {}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.write(f"{default_merge(Path(folder))}\n")
