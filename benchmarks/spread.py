"""How many independent tokens a row of a picture is worth, by the spread of its moments.

``python benchmarks/spread.py [toybox|sd15 …]`` writes ``benchmarks/results/spread.json``. At a
site the rows' moments X_rᵀX_r / t, of 32 of its inputs, are whitened by their mean: A_r. Of t
independent Gaussian tokens the expected ‖A_r - I‖²_F is (d² + d) / t, so that d² + d over what is
measured is how many such tokens a row is worth: its t at most, and as few as 1 where all tokens of
a row are alike. Rows are of the toybox (latents of its own denoising under a LoRA, another prompt
and step each), and of a full-size SD 1.5 with random weights, whose latents have a picture's
spectrum (1 / f) with noise of a random step, up to its second level: no trained network, so that
its figures tell of its inputs and widths alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from outputs import read, result_file, write
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent / "speed"))

FILE = result_file("spread.json")
INPUTS = 32
ENDINGS = ("attn1.to_q", "ff.net.2")
TOYBOX = {8: 64, 16: 64}
SD15 = {16: 48, 32: 48}
"""size of the latents → rows"""

LAST = "down_blocks.1.attentions.0"
"""What of SD 1.5 comes behind it is not run."""

Shape = tuple[str, int, int]
"""Kind of the site, its inputs, tokens of a row"""


@contextmanager
def kept_moments(model: nn.Module) -> Generator[dict[str, dict[Shape, list[Tensor]]]]:
    """site → the moments of every row that the model runs, (inputs, inputs) each."""
    found: dict[str, dict[Shape, list[Tensor]]] = {}

    def hook(name: str, ending: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            _, length, width = args[0].shape
            some = args[0][:, :, torch.arange(INPUTS) * width // INPUTS].double()
            rows = found.setdefault(name, {}).setdefault((ending, width, length), [])
            rows += some.mT @ some / length

        return keep

    handles = [
        module.register_forward_hook(hook(name, ending))
        for name, module in model.named_modules()
        for ending in ENDINGS
        if name.endswith(ending)
    ]
    try:
        with torch.no_grad():
            yield found
    finally:
        for handle in handles:
            handle.remove()


def worth(moments: Sequence[Tensor]) -> float:
    rows = torch.stack(list(moments))
    values, vectors = torch.linalg.eigh(rows.mean(0))
    root = vectors / values.clamp(min=values.max() * 1e-9).sqrt()
    spread = (root.mT @ rows @ root - torch.eye(INPUTS)).square().sum((1, 2)).mean()
    return float((INPUTS**2 + INPUTS) / (spread * len(rows) / (len(rows) - 1)))


def by_shape(found: Mapping[str, Mapping[Shape, Sequence[Tensor]]]) -> dict[str, float]:
    """Means over sites of one shape."""
    worths: dict[Shape, list[float]] = {}
    for shapes in found.values():
        for shape, moments in shapes.items():
            worths.setdefault(shape, []).append(worth(moments))
    return {
        f"{ending}, {width} inputs, {length} tokens": fmean(some)
        for (ending, width, length), some in sorted(worths.items())
    }


def toybox(size: int, rows: int) -> dict[str, float]:
    from toybox_world import World

    from iteris_core import Calibration
    from iteris_core.activations.lockstep import Lockstep
    from iteris_core.lora import SiteChanges
    from toybox import TEMPLATES

    world = World()
    concept = world.merged_concepts([4], None, 0.0)[0]
    lora = concept.lora
    assert lora is not None
    changes = {site: SiteChanges.of([change]) for site, change in lora.sites.items()}
    calibration = Calibration(
        samples=rows, timesteps=1, empty_share=0.0, latent_size=size, templates=TEMPLATES
    )
    generator = torch.Generator().manual_seed(0)
    with Lockstep(world.host.sites(), changes) as lockstep, torch.no_grad():
        samples = world.host.samples(
            [concept], set(changes), calibration, lockstep, generator, lambda *_: None
        )
    with world.changed(lora), kept_moments(world.pipeline.unet) as found:
        for start in range(0, rows, 16):
            world.host.forward(samples, range(start, min(start + 16, rows)))
    return by_shape(found)


def sd15(size: int, rows: int) -> dict[str, float]:
    from models import sd15_host

    pipeline = sd15_host().pipeline
    generator = torch.Generator().manual_seed(0)
    alphas = pipeline.scheduler.alphas_cumprod
    pipeline.unet.get_submodule(LAST).register_forward_hook(_stop)
    with kept_moments(pipeline.unet) as found:
        for _ in range(rows):
            step = torch.randint(0, len(alphas), (1,), generator=generator)
            picture = pink(size, generator)
            noise = torch.randn(picture.shape, generator=generator)
            latents = pipeline.scheduler.add_noise(picture, noise, step)
            # As the last LayerNorm of a text encoder gives them.
            text = torch.randn(1, 77, 768, generator=generator)
            with suppress(_Enough):
                pipeline.unet(latents, step, text)
    return by_shape(found)


class _Enough(Exception):
    pass


def _stop(*_: Any) -> None:
    raise _Enough


def pink(size: int, generator: torch.Generator) -> Tensor:
    """Latents (1, 4, size, size) of variance 1, with a picture's spectrum."""
    noise = torch.fft.fft2(torch.randn(1, 4, size, size, generator=generator))
    steps = torch.fft.fftfreq(size)
    radius = (steps[:, None] ** 2 + steps**2).sqrt().clamp(min=1 / size)
    picture = torch.fft.ifft2(noise / radius).real
    return picture / picture.std()


MODELS = {"toybox": (toybox, TOYBOX), "sd15": (sd15, SD15)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS), help=", ".join(MODELS))
    data = read(FILE)
    for name in parser.parse_args().models:
        measure, sizes = MODELS[name]
        for size, rows in sizes.items():
            found = {"rows": rows, "sites": measure(size, rows)}
            data.setdefault(name, {})[str(size)] = found
            write(FILE, data)
            print(name, size, f"{rows} rows")
            for site, value in found["sites"].items():
                print(f"  {site}: worth {value:.1f}")


if __name__ == "__main__":
    main()
