"""Writer × layout × reader: any LoRA, from memory or from a trainer's file, in every layout that we
write: read back as it was, by us and by diffusers, which loads it with peft."""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import layouts
import pytest
import torch
from bases import KINDS, make_lora, outputs, tiny, tiny_base
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_lora_layouts import MATRIX, chosen, furthest, with_changes

from iteris_core import Lora, LowRank, write_lora
from iteris_core.lora_files import DTYPES, Layout, read_lora_file

ERRORS, EXACT = {"float16": 2e-3, "bfloat16": 2e-2}, 1e-12
FP8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
SELECTIONS = {
    "everything": lambda s: True,
    "q and v of the text encoder": lambda s: s.startswith("text_encoder.") and "q_proj" in s,
    "the MLP of the text encoders": lambda s: s.startswith("text") and ".fc1" in s,
    "the denoiser": lambda s: not s.startswith("text"),
    "both text encoders, q": lambda s: s.startswith("text") and "q_proj" in s,
    "v and fc2 of the text encoders": lambda s: s.endswith(("v_proj", "fc2")),
}


@st.composite
def in_memory(draw, kind: str) -> tuple[Lora, str]:
    """A LoRA and the dtype in which its values are exact; some of its changes may be zero."""
    known = sorted(tiny_base(kind).shapes)
    selected = [[s for s in known if kept(s)] for kept in SELECTIONS.values()]
    few = st.lists(st.sampled_from(known), min_size=1, max_size=12, unique=True)
    sites = draw(st.one_of(few, st.sampled_from(selected)))
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    ranks = draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
    size = draw(st.sampled_from([1e-4, 0.02, 0.5]))
    zero = draw(st.sets(st.sampled_from(sites), max_size=len(sites) - 1))
    return lora_of(kind, zero, sites=sites, ranks=ranks, size=size, dtype=DTYPES[dtype]), dtype


def lora_of(kind: str, zero: set[str], **choices: Any) -> Lora:
    lora = make_lora(kind, **choices)
    changes = {s: c.scaled(0.0 if s in zero else 1.0) for s, c in lora.sites.items()}
    return Lora(changes, base=lora.base)


@st.composite
def of_trainers(draw, kind: str) -> tuple[Lora, str]:
    """A LoRA read from a file as a trainer writes it, in any layout; fp8 counts as float16."""
    layout, alpha = draw(st.sampled_from([case[1:] for case in MATRIX if case[0] == kind]))
    dtype = draw(st.sampled_from([*DTYPES, *FP8]))
    # Fused modules are made of sites of one rank.
    ranks = (4,) if kind in ("sd3", "flux") or alpha is not None else (4, 1, 7)
    own = {**DTYPES, **FP8}[dtype]
    lora = make_lora(kind, chosen(kind, layout), ranks=ranks, dtype=own)
    tensors, metadata = getattr(layouts, layout)(lora, kind, alpha, dtype=own)
    with TemporaryDirectory() as folder:
        save_file(tensors, Path(folder, "in.safetensors"), metadata=metadata)
        read = read_lora_file(Path(folder, "in.safetensors"), tiny_base(kind))
    return read, "float16" if dtype in FP8 else dtype


def assert_close(found: LowRank, wanted: LowRank, error: float):
    truth = wanted.to(torch.float64).dense()
    gap = found.to(torch.float64).dense() - truth
    assert float(gap.norm()) <= error * float(truth.norm())


def splits_at_the_real_width(kind: str, layout: Layout, site: str) -> bool:
    """diffusers cuts what FLUX fuses at the released model's width."""
    return (kind, layout) == ("flux", "kohya") and "single" in site


def check(lora: Lora, own: str, kind: str, layout: Layout, dtype: str) -> None:
    sites = {site: change for site, change in lora.sites.items() if change.squared_norm() > 0}
    error = EXACT if dtype in (own, "float32") else ERRORS[dtype]
    with TemporaryDirectory() as folder:
        path = write_lora(lora, Path(folder, "a.safetensors"), layout=layout, dtype=dtype)
        again = read_lora_file(path, tiny_base(kind))
        assert again.sites.keys() == sites.keys()
        for site, change in sites.items():
            assert_close(again.sites[site], change, error)
        reads = tiny_base(kind).architecture.diffusers_reads
        if all(
            reads(s, layout) and not splits_at_the_real_width(kind, layout, s) for s in lora.sites
        ):
            pipeline = copy.deepcopy(tiny(kind))
            pipeline.load_lora_weights(str(path))
            truth = outputs(kind, with_changes(kind, again))
            assert furthest(outputs(kind, pipeline), truth) < 1e-3


def law(kind: str, loras: st.SearchStrategy, examples: int, *more: tuple[Lora, str]) -> None:
    def run(lora, layout, dtype):
        check(*lora, kind, layout, dtype)

    run = given(loras, st.sampled_from(get_args(Layout)), st.sampled_from(sorted(DTYPES)))(run)
    for lora in more:
        run = example(lora, "kohya", "float32")(run)
    settings(max_examples=examples, deadline=None, database=None, derandomize=True,
             suppress_health_check=list(HealthCheck))(run)()  # fmt: skip


Q = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
"""Alone at rank 1, it is written with zeros of rank 1 beside it."""


@pytest.mark.parametrize("kind", KINDS)
def test_loras_in_every_layout(kind):
    only_q = lora_of(kind, set(), sites=[Q], ranks=[1]), "float32"
    projection = [s for s in tiny_base(kind).shapes if s.endswith("text_projection")][:1]
    with_q = [projection[0].replace("text_projection", Q.partition(".")[2])] if projection else []
    both = [(lora_of(kind, set(), sites=s, ranks=[2, 1]), "float32")
            for s in (projection, [*with_q, *projection]) if s]  # fmt: skip
    law(kind, st.one_of(in_memory(kind), of_trainers(kind)), 8, only_q, *both)


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", KINDS)
def test_hundreds_of_loras_in_every_layout(kind):
    law(kind, st.one_of(in_memory(kind), of_trainers(kind)), 50)
