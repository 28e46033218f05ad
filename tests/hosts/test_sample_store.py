"""Samples that are kept on disk: the same merge, and fewer forwards."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import same
from host_cases import CALIBRATION, make_case, two_concepts

from iteris_core import Concept, SampleStore, merge_loras
from iteris_core.hosts import sample_store
from iteris_core.hosts.protocol import DENOISING

pytestmark = pytest.mark.usefixtures("unmeasured")


class Counted:
    """Counts the forwards of the denoiser that are no sweep's: those of one copy of the rows."""

    def __init__(self, case) -> None:
        self.case, self.rows = case, 0
        case.host.denoiser.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs) -> None:
        self.rows += len(args[0] if args else kwargs["sample"])

    def merge(self, concepts, store=None, **calibration):
        self.rows, done = 0, {}
        result = merge_loras(
            self.case.host,
            concepts,
            calibration={**CALIBRATION.__dict__, **calibration},
            settings={"rank": 2},
            store=store,
            on_progress=lambda p: done.__setitem__(p.what, (p.done, p.total)),
        )
        assert done[DENOISING][0] == done[DENOISING][1] > 0
        return result.lora


def same_merges(one, two) -> bool:
    return one.sites.keys() == two.sites.keys() and all(
        torch.equal(a.up, two.sites[site].up) and torch.equal(a.down, two.sites[site].down)
        for site, a in one.sites.items()
    )


@pytest.fixture
def counted():
    return Counted(make_case("sd1"))


def test_a_kept_sample_gives_the_same_merge_and_is_not_denoised_again(counted, tmp_path):
    concepts, store = two_concepts(counted.case), SampleStore(tmp_path / "new" / "samples")
    plain = counted.merge(concepts)
    assert same_merges(plain, counted.merge(concepts, store))
    first = counted.rows
    assert same_merges(plain, counted.merge(concepts, store))
    assert counted.rows < first
    saved, third = first - counted.rows, Concept(counted.case.lora(7), trigger="s7", class_word="x")
    without = counted.merge([concepts[0], third])
    assert same_merges(without, counted.merge([concepts[0], third], store))
    exchanged = counted.rows
    assert not same_merges(without, counted.merge([third, concepts[0]]))  # other phantoms
    counted.merge([concepts[0], third], store)
    assert exchanged - counted.rows == pytest.approx(saved / 2, rel=0.35)  # one of two, denoised


def test_what_samples_depend_on_is_in_their_key(counted, tmp_path):
    concepts, always = (
        two_concepts(counted.case),
        Concept(counted.case.lora(5), always_on="outside"),
    )
    word = {"word": {"clip_l": torch.ones(1, 32)}}
    changes = {
        "nothing": (concepts, {}),
        "strength": ([replace(concept, strength=0.9) for concept in concepts], {}),
        "prompts": ([replace(concept, prompts=["a cat"]) for concept in concepts], {}),
        "always on": ([*concepts, always], {}),
        "embedding": ([replace(c, lora=replace(c.lora, embeddings=word)) for c in concepts], {}),
        "seed": (concepts, {"seed": 9}),
        "steps": (concepts, {"denoising_steps": 4}),
        "base": (concepts, {}),
    }
    new, before = {}, set()
    for change, (some, how) in changes.items():
        if change == "base":
            counted.case.host.denoiser.conv_in.weight.data += 0.1
        counted.merge(some, SampleStore(tmp_path), **how)
        found = {path.name for path in tmp_path.iterdir()}
        new[change], before = len(found - before), found
    assert set(new.values()) == {new["nothing"]} != {0}, new


def test_trouble_with_the_disk_costs_no_merge(counted, tmp_path, monkeypatch, caplog):
    concepts, store = two_concepts(counted.case), SampleStore(tmp_path / "samples")
    plain = counted.merge(concepts, store)
    for path in store.folder.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert same_merges(plain, counted.merge(concepts, store))  # cut short: made again
    (tmp_path / "file").touch()
    assert same_merges(plain, counted.merge(concepts, SampleStore(tmp_path / "file")))
    assert "Nothing is kept" in caplog.text
    monkeypatch.setattr(sample_store, "save_file", _no_space)
    assert same_merges(plain, counted.merge(concepts, SampleStore(tmp_path / "full")))
    assert not any((tmp_path / "full").iterdir())


def _no_space(*_):
    raise OSError(28, "No space left on device")


def test_a_store_stays_within_its_limit_and_lets_the_oldest_go(tmp_path):
    entry = {"latents": torch.zeros(1000)}
    store = SampleStore(tmp_path, limit=9000)
    for age, name in ((3, "a"), (2, "b")):
        store.put(entry, name)
        for path in tmp_path.iterdir():
            os.utime(path, (1e9 - age, 1e9 - age)) if path.stat().st_mtime > 1e9 else None
    assert store.get("a") is not None  # used: b is the oldest now
    store.put(entry, "c")
    assert [store.get(name) is None for name in "abc"] == [False, True, False]
    assert store.within("other base").get("a") is None
    assert store.clear() > 8000
    assert store.size == 0
    shared = torch.arange(8.0)  # as the sigmas of two experts are
    store.put({"high": shared, "low": shared, "half": shared[:4]}, "d")
    assert torch.equal(store.get("d")["half"], shared[:4])


def test_weights_that_have_no_hash_keep_nothing():
    """Those that are not there, and those of a tensor's subclass, unless that is made of others."""

    class Packed(torch.Tensor):
        pass

    class Quantised(torch.Tensor):
        @staticmethod
        def __new__(cls, codes):
            return torch.Tensor._make_wrapper_subclass(cls, codes.shape)

        def __init__(self, codes):
            self.codes = codes

        def __tensor_flatten__(self):
            return ["codes"], None

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return cls(args[0].codes)  # of detach

    codes = torch.arange(3, dtype=torch.uint8)
    hashes = [sample_store.digest_of_weights([("a", Quantised(codes + n))]) for n in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert None not in hashes
    plain = torch.ones(3)
    assert sample_store.digest_of_weights([("a", torch.nn.Parameter(plain))]) is not None
    for other in (plain.to("meta"), plain.as_subclass(Packed)):
        assert sample_store.digest_of_weights([("a", plain), ("b", other)]) is None


def test_another_version_of_the_store_is_not_read(tmp_path, monkeypatch):
    store = SampleStore(tmp_path)
    store.put({"latents": torch.zeros(3)}, "a")
    monkeypatch.setattr(sample_store, "VERSION", "0")
    assert store.get("a") is None


@pytest.mark.slow
def test_two_processes_share_a_store(tmp_path):
    code = (
        "import sys; from pathlib import Path; from host_cases import *; "
        "from iteris_core import *; case = make_case('sd1'); print(flush=True); input(); "
        "r = merge_loras(case.host, two_concepts(case), calibration=CALIBRATION, "
        "store=SampleStore(Path(sys.argv[1]))); r.save(sys.argv[2], layout='peft')"
    )
    here = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    theirs, ours = (tmp_path / f"{name}.safetensors" for name in ("theirs", "ours"))
    command = [sys.executable, "-c", code, tmp_path / "samples", theirs]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=env, text=True, **pipes) as other:
        case, store = make_case("sd1"), SampleStore(tmp_path / "samples")
        other.stdout.readline()
        other.stdin.write("\n")
        other.stdin.flush()  # now both begin
        merged = merge_loras(case.host, two_concepts(case), calibration=CALIBRATION, store=store)
    assert other.returncode == 0
    assert same(theirs, merged.save(ours, layout="peft"))
    assert len(list((tmp_path / "samples").glob("*.safetensors"))) > 0
