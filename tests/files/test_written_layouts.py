"""Any LoRA in every layout that we write: read back as it was, by us and by diffusers, which loads
it with peft."""

from __future__ import annotations

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import pytest
import torch
from bases import make_lora, outputs, tiny, tiny_base
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_lora_layouts import furthest, with_changes
from test_lora_writing import DTYPES

from iteris_core import Lora, LowRank, write_lora
from iteris_core.lora_files import Layout, read_lora_file

ERRORS = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-6}


@st.composite
def choices(draw, kind: str) -> dict[str, Any]:
    """What a LoRA of a few sites is made of; some of its changes may be zero."""
    known = sorted(tiny_base(kind).shapes)
    sites = draw(st.lists(st.sampled_from(known), min_size=1, max_size=12, unique=True))
    return {
        "sites": sites,
        "ranks": draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)),
        "size": draw(st.sampled_from([1e-4, 0.02, 0.5, 8.0])),
        "dtype": DTYPES[draw(st.sampled_from(sorted(DTYPES)))],
        "zero": draw(st.sets(st.sampled_from(sites), max_size=len(sites) - 1)),
    }


def lora_of(kind: str, zero: set[str], **choices: Any) -> Lora:
    lora = make_lora(kind, **choices)
    changes = {s: c.scaled(0.0 if s in zero else 1.0) for s, c in lora.sites.items()}
    return Lora(changes, base=lora.base)


def assert_close(found: LowRank, wanted: LowRank, error: float):
    gap = found.dense().double() - wanted.dense().double()
    assert float(gap.norm()) <= error * float(wanted.dense().double().norm())


def splits_at_the_real_width(kind: str, layout: Layout, site: str) -> bool:
    """diffusers cuts what FLUX fuses at the released model's width."""
    return (kind, layout) == ("flux", "kohya") and "single" in site


def check(lora: Lora, kind: str, layout: Layout, dtype: str) -> None:
    sites = {site: change for site, change in lora.sites.items() if change.squared_norm() > 0}
    with TemporaryDirectory() as folder:
        path = write_lora(lora, Path(folder, "a.safetensors"), layout=layout, dtype=dtype)
        again = read_lora_file(path, tiny_base(kind))
        assert again.sites.keys() == sites.keys()
        for site, change in sites.items():
            assert_close(again.sites[site], change, ERRORS[dtype])
        reads = tiny_base(kind).architecture.diffusers_reads
        if all(
            reads(s, layout) and not splits_at_the_real_width(kind, layout, s) for s in lora.sites
        ):
            pipeline = copy.deepcopy(tiny(kind))
            pipeline.load_lora_weights(str(path))
            truth = outputs(kind, with_changes(kind, again))
            assert furthest(outputs(kind, pipeline), truth) < 1e-4


Q = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
"""Alone at rank 1, it is written with zeros of rank 1 beside it."""
ONLY_Q = {"sites": [Q], "ranks": [1], "size": 0.5, "dtype": torch.float32, "zero": set()}


def fuzz(kind: str, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @example(ONLY_Q, "kohya", "float32")
    @given(choices(kind), st.sampled_from(get_args(Layout)), st.sampled_from(sorted(DTYPES)))
    def run(choices, layout, dtype):
        check(lora_of(kind, **choices), kind, layout, dtype)

    run()


@pytest.mark.parametrize("kind", ["sd1", "flux"])
def test_some_loras_in_every_layout(kind):
    fuzz(kind, 20)


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", ["sd1", "flux"])
def test_hundreds_of_loras_in_every_layout(kind):
    fuzz(kind, 400)
