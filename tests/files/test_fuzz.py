"""Many broken and hostile files: each is read correctly or refused with an IterisError."""

import json
import math
import resource
import struct
import tempfile
import time
from pathlib import Path

import pytest
import torch
from bases import tiny_base
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from iteris_core import Concept, IterisError, merge_loras
from iteris_core.lora_files import ReadOptions, base_model, read_lora_file
from iteris_core.lora_files.metadata import trigger_words

STEM = "unet.mid_block.attentions.0.transformer_blocks.0"
SITES = (
    *(f"{STEM}.attn1.to_q", f"{STEM}.attn1.to_out.0", "unet.mid_block.resnets.0.conv1"),
    *(f"text_encoder.text_model.encoder.layers.0.self_attn.{n}_proj" for n in ("q", "out")),
)
SHAPES = {site: tiny_base("sd1").shapes[site] for site in SITES}
BASE = base_model(tiny_base("sd1").architecture, SHAPES)


def kohya_name(site: str) -> str:
    prefix = "lora_unet_" if site.startswith("unet.") else "lora_te_"
    return prefix + site.partition(".")[2].replace(".", "_")


def whole_file() -> bytes:
    """A good file with a LoRA, a LoCon and metadata."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for site in SITES:
        shape, name = BASE.shapes[site], kohya_name(site)
        tail = (1, 1) if len(shape) == 4 else ()
        tensors[f"{name}.lora_up.weight"] = torch.randn(shape[0], 2, *tail, generator=generator)
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, *shape[1:], generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    tensors["bundle_emb.word.clip_l"] = torch.randn(2, 32, generator=generator)
    return save(tensors, {"ss_tag_frequency": '{"1_a": {"b": 2}}', "format": "pt"})


def other_file() -> bytes:
    """A good file with every other parametrisation, peft's names and a LoraConfig."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    loha, lokr, conv, text, last = SITES
    out, width = BASE.shapes[loha]
    halves = {f"hada_w{n}_{end}": (out, 2) if end == "a" else (2, width)
              for n in (1, 2) for end in "ab"}  # fmt: skip
    tensors = {f"{kohya_name(loha)}.{part}": draw(*shape) for part, shape in halves.items()}
    tensors[f"{kohya_name(loha)}.alpha"] = torch.tensor(1.0)
    out, width = BASE.shapes[lokr]
    tensors[f"{kohya_name(lokr)}.lokr_w1"] = draw(4, 4)
    tensors[f"{kohya_name(lokr)}.lokr_w2_a"] = draw(out // 4, 2)
    tensors[f"{kohya_name(lokr)}.lokr_w2_b"] = draw(2, width // 4)
    out, width, *window = BASE.shapes[conv]
    tensors[f"{kohya_name(conv)}.lora_up.weight"] = draw(out, 2, 1, 1)
    tensors[f"{kohya_name(conv)}.lora_mid.weight"] = draw(2, 3, *window)
    tensors[f"{kohya_name(conv)}.lora_down.weight"] = draw(3, width, 1, 1)
    out, width = BASE.shapes[text]
    tensors[f"{text}.lora_A.weight"] = draw(2, width)
    tensors[f"{text}.lora_B.weight"] = draw(out, 2)
    tensors[f"{text}.lora_magnitude_vector"] = draw(out)
    tensors[f"{kohya_name(last)}.diff"] = draw(*BASE.shapes[last])
    config = {"text_encoder.r": 2, "text_encoder.lora_alpha": 4, "text_encoder.use_rslora": True}
    return save(tensors, {"lora_adapter_metadata": json.dumps(config)})


class Good:
    """A file in its parts."""

    def __init__(self, file: bytes) -> None:
        length = struct.unpack("<Q", file[:8])[0]
        self.file, self.data = file, file[8 + length :]
        self.header = json.loads(file[8 : 8 + length])
        self.names = [name for name in self.header if name != "__metadata__"]


GOOD = [Good(whole_file()), Good(other_file())]
DTYPES = ["F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I8", "I64", "BOOL",
          "C64", "U16", "nonsense"]  # fmt: skip
LEAVES = ["lora_mid.weight", "hada_w1_a", "hada_t1", "lokr_w1", "lokr_t2", "diff", "dora_scale",
          "diff_b", "oft_blocks", "alpha", "lora_A.weight", "hada_w2_b", "lokr_w2", "lokr_w1_a",
          "lora_magnitude_vector", "reshape_weight", "rescale", "a1.weight", "b2.weight",
          ""]  # fmt: skip
WORDS = ["../../../tmp/evil", "/etc/passwd", "a" * 5000, "\x00", "unet..weight", "__metadata__x",
         "bundle_emb.../../x.clip_l", "bundle_emb.", "lora_unet_", ".", ""]  # fmt: skip
TEXTS = [
    "[" * 20000, '{"a":' * 20000, "9" * 6000, "null", "[1]", '{"unet": 1}', "\ud7ff",
'{"unet.lora_alpha": 1e999}', '{"unet.lora_alpha": [1]}',
    '{"unet.lora_alpha": %s}' % ("9" * 400),
    '{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(a+)+$": 2}}',
    '{"unet.lora_alpha": 1, "unet.alpha_pattern": {"' + ".*" * 30 + '!": 2}}',
    '{"unet.lora_alpha": 1, "unet.alpha_pattern": [1]}',
    '{"unet.lora_alpha": 1, "unet.alpha_pattern": {"[": 1}}',
    '{"1_a": {"b": "c"}, "2_b": 3}', '{"concepts": [{"trigger": {"x": 1}}, 4]}',
]  # fmt: skip
KEYS = ["lora_adapter_metadata", "ss_tag_frequency", "iteris", "ss_dataset_dirs", "../../x",
        "modelspec.trigger_phrase"]  # fmt: skip
numbers = st.one_of(
    st.integers(-3, 9), st.sampled_from([32, 64, 2**31, 2**40, 2**62, 2**63 - 1, 2**64])
)


@st.composite
def mutated(draw):
    """A good file with one to three things wrong."""
    good = draw(st.sampled_from(GOOD))
    header = json.loads(json.dumps(good.header))
    length, cut, flips = None, None, []
    for _ in range(draw(st.integers(1, 3))):
        what = draw(st.sampled_from(
            ["dtype", "shape", "offsets", "name", "leaf", "drop", "metadata", "length", "cut",
             "flip", "copy", "extra"]))  # fmt: skip
        names = [n for n in header if n != "__metadata__"] or ["x"]
        name = draw(st.sampled_from(names))
        entry = header.get(name, {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
        if not isinstance(entry, dict):
            entry = good.header[good.names[0]]
        if what == "dtype":
            header[name] = {**entry, "dtype": draw(st.sampled_from(DTYPES))}
        elif what == "shape":
            header[name] = {**entry, "shape": draw(st.lists(numbers, max_size=5))}
        elif what == "offsets":
            header[name] = {**entry, "data_offsets": draw(st.lists(numbers, max_size=3))}
        elif what == "name":
            header.pop(name, None)
            header[draw(st.sampled_from(WORDS + good.names))] = entry
        elif what == "leaf":
            header.pop(name, None)
            header[f"{name.split('.')[0]}.{draw(st.sampled_from(LEAVES))}"] = entry
        elif what == "drop":
            header.pop(name, None)
        elif what == "copy":
            other = name.replace("lora_unet_", "lycoris_").replace("lora_te_", "lora_te1_")
            header[other] = entry
        elif what == "extra":
            header[draw(st.text(max_size=20))] = draw(
                st.one_of(st.none(), numbers, st.just(entry), st.text(max_size=5))
            )
        elif what == "metadata":
            key, text = draw(st.sampled_from(KEYS)), draw(st.sampled_from(TEXTS))
            table = header.get("__metadata__")
            header["__metadata__"] = {**(table if isinstance(table, dict) else {}), key: text}
        elif what == "length":
            length = draw(numbers.filter(lambda n: 0 <= n < 2**64))
        elif what == "cut":
            cut = draw(st.integers(0, len(good.file)))
        else:
            flips.append((draw(st.integers(0, len(good.file) - 1)), draw(st.integers(0, 255))))
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    data = bytearray(struct.pack("<Q", len(text) if length is None else length) + text + good.data)
    for place, value in flips:
        data[place % len(data)] = value
    return bytes(data if cut is None else data[:cut])


def expected(tensors, site):
    """ΔW by the plain formula, where the file still has a plain LoRA of the site."""
    name = kohya_name(site)
    up, down = (tensors.get(f"{name}.lora_{part}.weight") for part in ("up", "down"))
    others = ("lora_mid.weight", "dora_scale", "lora_magnitude_vector")
    if up is None or down is None or any(f"{name}.{leaf}" in tensors for leaf in others):
        return None
    alpha = tensors.get(f"{name}.alpha")
    scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
    return scale * (up.float().flatten(1) @ down.float().flatten(1))


def check(data: bytes, folder: Path, partial: bool) -> bool:
    """Whether the file was taken; raises where anything is not as it has to be."""
    path = folder / "in.safetensors"
    path.write_bytes(data)
    started = time.process_time()
    try:
        lora = read_lora_file(
            path, BASE, lambda site: torch.ones(BASE.shapes[site]),
            ReadOptions(allow_partial=partial),
        )  # fmt: skip
        result = merge_loras(None, [Concept(lora, trigger="x"), Concept(lora, trigger="y")], "sum")
        out = result.save(folder / "out.safetensors", overwrite=True, dtype="float32")
        again = read_lora_file(out, BASE)
    except IterisError:
        return False
    finally:
        allowed = {"in.safetensors", "out.safetensors"}
        found = {p.name for p in folder.iterdir()}
        assert all(n in allowed or n.endswith("_emb.safetensors") for n in found), found
        for name in found - {"in.safetensors"}:
            (folder / name).unlink()
        assert time.process_time() - started < 5
    tensors = load(data)
    for site, change in again.sites.items():
        dense = change.dense()
        assert tuple(dense.shape) == (BASE.shapes[site][0], math.prod(BASE.shapes[site][1:]))
        assert bool(torch.isfinite(dense).all())
        wanted = expected(tensors, site)
        if wanted is not None:
            scale = max(float(wanted.abs().max()), 1e-30)
            assert float((dense - 2 * wanted).abs().max()) <= 1e-5 * scale
    trigger_words(lora.metadata)
    return True


def fuzz(examples: int) -> list[bool]:
    """Of every file that was tried, whether it was taken."""
    taken: list[bool] = []
    with tempfile.TemporaryDirectory() as name:
        outer = Path(name)
        folder = outer / "a" / "b"
        folder.mkdir(parents=True)

        @settings(max_examples=examples, deadline=None, database=None, derandomize=True,
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(mutated(), st.booleans())
        def run(data, partial):
            taken.append(check(data, folder, partial))
            assert [p.name for p in outer.iterdir()] == ["a"]
            assert [p.name for p in (outer / "a").iterdir()] == ["b"]

        run()
    return taken


@pytest.mark.parametrize("good", GOOD)
def test_the_good_files_are_taken(good, tmp_path):
    assert check(good.file, tmp_path, False)


def test_some_hostile_files():
    fuzz(60)


@pytest.mark.fuzz
def test_many_hostile_files():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    taken = fuzz(1500)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert len(taken) >= 1250
    assert sum(taken) > 25  # some of what is changed does no harm
    assert grown < 300, f"{grown} MB more for files of less than 100 kB"


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("key", KEYS)
def test_hostile_metadata_one_by_one(key, text, tmp_path):
    header = {**GOOD[0].header, "__metadata__": {key: text}}
    blob = json.dumps(header).encode("utf-8", "surrogatepass")
    blob += b" " * (-len(blob) % 8)
    check(struct.pack("<Q", len(blob)) + blob + GOOD[0].data, tmp_path, False)
