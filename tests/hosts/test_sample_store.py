"""Samples that are kept on disk: the same merge, and fewer forwards."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import wraps
from pathlib import Path

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from command_line import same
from host_cases import CALIBRATION, make_case, two_concepts
from tiny import random_lora
from torch import nn

from iteris_core import Concept, SampleStore, merge_loras
from iteris_core.cli.options import store_of
from iteris_core.errors import OutputError, SettingsError
from iteris_core.hosts import sample_store
from iteris_core.hosts.diffusers_arguments import study
from iteris_core.hosts.protocol import DENOISING
from iteris_core.preview import preview_merge

pytestmark = pytest.mark.usefixtures("unmeasured")


class Counted:
    """Counts the forwards of the denoiser that are no sweep's: those of one copy of the rows."""

    def __init__(self, case) -> None:
        self.case, self.rows = case, 0
        kind = type(case.host.denoiser)

        @wraps(kind.forward)
        def forward(module, *args, **kwargs):
            self.rows += len(args[0] if args else kwargs["sample"])
            return kind.forward(module, *args, **kwargs)

        case.host.denoiser.__class__ = type(kind.__name__, (kind,), {"forward": forward})

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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_samples_of_another_behaviour_at_equal_weights_are_others(counted):
    """FreeU and processors are in the key; functions of others have no hash, and keep nothing."""
    case, unet = counted.case, counted.case.host.denoiser
    arguments = study(case.host._loop, CALIBRATION)

    def key() -> str | None:
        return case.host._base_digest(arguments)

    plain = key()
    unet.enable_freeu(0.9, 0.2, 1.2, 1.4)
    assert key() not in (plain, None)
    unet.disable_freeu()
    assert key() == plain
    with case.host.denoiser.conv_in.register_forward_hook(lambda *_: None):
        assert key() is None
    unet.conv_in.forward = lambda x: x
    assert key() is None
    del unet.conv_in.forward
    unet.set_attention_slice(1)
    assert key() not in (plain, None)

    class Own:
        pass

    unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor = Own()
    assert key() is None


def test_offloading_does_not_change_the_key(counted):
    arguments = study(counted.case.host._loop, CALIBRATION)
    plain = counted.case.host._base_digest(arguments)
    for module in counted.case.host.denoiser.modules():
        add_hook_to_module(module, ModelHook())
    assert counted.case.host._base_digest(arguments) == plain


@pytest.mark.slow
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


def test_every_row_of_an_embedding_is_in_the_hash(counted):
    """A textual inversion changes a token's row. Of the vocabulary of CLIP a row in twelve was
    seen."""
    table = nn.Embedding(49408, 8)
    before = set()
    for row in (None, 0, 1, 4097, 30_000, 49407):
        if row is not None:
            table.weight.data[row, 3] += 0.01
        before.add(
            sample_store.digest_of_weights([("words.weight", table.weight)], {"words": table})
        )
    assert len(before) == 6
    assert None not in before
    case, pipeline = counted.case, counted.case.host.pipeline
    arguments = study(case.host._loop, CALIBRATION)
    keys = {case.host._base_digest(arguments)}
    for row in range(0, 40, 3):
        pipeline.text_encoder.get_input_embeddings().weight.data[row] += 0.01
        keys.add(case.host._base_digest(arguments))
    assert len(keys) == 15


def test_a_class_with_another_forward_is_another_model(counted):
    case, unet = counted.case, counted.case.host.denoiser
    arguments = study(case.host._loop, CALIBRATION)
    plain = case.host._base_digest(arguments)

    class Doubled(type(unet.conv_in)):
        def forward(self, x):
            return 2 * super().forward(x)

    unet.conv_in.__class__ = Doubled
    assert case.host._base_digest(arguments) not in (plain, None)


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
        "settings={'steps': 0}, store=SampleStore(Path(sys.argv[1]))); "
        "r.save(sys.argv[2], layout='peft')"
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
        how = {"settings": {"steps": 0}, "calibration": CALIBRATION, "store": store}
        merged = merge_loras(case.host, two_concepts(case), **how)
    assert other.returncode == 0
    assert same(theirs, merged.save(ours, layout="peft"))
    assert store.size > 0


def planted(folder: Path) -> dict[Path, bytes]:
    folder.mkdir(exist_ok=True)
    for name in ("cat.safetensors", f"{'a' * 63}.safetensors", "x.iteris-store", "notes.txt"):
        (folder / name).write_text(name)
        os.utime(folder / name, (1e9, 1e9))
    return {path: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_with_other_files_is_no_store(world, tmp_path, monkeypatch, iteris):
    """It removed LoRAs that somebody else had put there."""
    models = tmp_path / "models"
    before = planted(models)
    concepts = [f"--concept={world}/lora{n}.safetensors:s{n}:dog" for n in (1, 2)]
    merge = ["merge", world / "base", "-o", tmp_path / "out.safetensors", *concepts]
    monkeypatch.setattr(sys.modules["iteris_core.cli.merge"], "load_base", pytest.fail)
    said = f"{models} is no store of samples: it contains {'a' * 63}.safetensors. Give the store"
    for command in (["store", models], ["store", models, "--clear"], [*merge, "--store", models]):
        assert said in iteris.refused(*command)
    monkeypatch.setenv("ITERIS_STORE", str(models))
    for command in (["store", "--clear"], merge):
        assert said in iteris.refused(*command)
    with pytest.raises(OutputError, match="is no store of samples"):
        SampleStore(models)
    assert {path: path.read_bytes() for path in models.iterdir()} == before


def test_a_file_that_is_called_by_a_hash_may_be_anybodys(tmp_path):
    (tmp_path / f"{'0' * 64}.safetensors").write_bytes(bytes(100))
    with pytest.raises(OutputError, match="is no store of samples"):
        SampleStore(tmp_path)


def test_none_in_place_of_a_folder(tmp_path, monkeypatch, iteris):
    """It made a folder of that name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ITERIS_STORE", "none")
    assert store_of(None) is store_of("none") is None
    assert SampleStore.default() is None
    assert "No samples are kept, because ITERIS_STORE is none" in iteris.refused("store")
    assert store_of("here") == SampleStore(Path("here"))
    assert not [*tmp_path.iterdir()]


def test_a_store_may_be_given_as_its_folder(tmp_path, host):
    store = SampleStore(f"{tmp_path / 'samples'}")
    store.put({"latents": torch.zeros(3)}, "a")
    assert store.size > 0
    assert store == SampleStore(tmp_path / "samples")
    concept = Concept(random_lora(host, 1), trigger="s1", class_word="dog")
    how = {"calibration": {"samples": 2, "timesteps": 1, "denoising_steps": 2}}
    rescued = []
    for place in (tmp_path / "path", f"{tmp_path / 'text'}"):
        preview_merge(host, [concept], store=place, rescue=rescued.append, **how)
        merge_loras(host, [concept], store=place, **how)
        assert SampleStore(place).size > 0
    assert not rescued
    with pytest.raises(SettingsError, match="store must be a folder or a SampleStore, not 3"):
        merge_loras(host, [concept], store=3)


def test_a_store_removes_files_of_its_own_names_alone(tmp_path):
    """Others may come there later."""
    store = SampleStore(tmp_path, limit=1)
    before = planted(tmp_path)
    for name in "ab":
        store.within("base").put({"latents": torch.zeros(1000)}, name)
    assert store.within("base").get("b") is not None
    assert store.clear() > 4000
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_newest_stays_in_a_store_that_is_too_small_for_it(tmp_path):
    store = SampleStore(tmp_path, limit=10)
    for name in "ab":
        store.put({"latents": torch.zeros(100)}, name)
    assert [store.get(name) is None for name in "ab"] == [True, False]


def test_what_a_killed_process_left_counts_and_goes(tmp_path):
    code = (
        "import os, sys, torch; from pathlib import Path; from iteris_core import SampleStore; "
        "Path.replace = lambda *_: os._exit(9); "
        "SampleStore(Path(sys.argv[1])).put({'latents': torch.zeros(1000)}, 'a')"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path]).returncode == 9
    store = SampleStore(tmp_path, limit=1)
    assert store.size > 4000
    store.put({"latents": torch.zeros(1)}, "b")
    (left,) = [path for path in tmp_path.iterdir() if path.stat().st_size > 4000]
    os.utime(left, (1e9, 1e9))  # by now nobody writes it
    store.put({"latents": torch.zeros(1)}, "c")
    assert not left.exists()
    left.write_bytes(bytes(5000))
    assert store.clear() > 5000


def test_a_store_that_may_only_be_read_is_read(tmp_path, monkeypatch):
    store = SampleStore(tmp_path)
    store.put({"latents": torch.ones(3)}, "a")

    def refused(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "utime", refused)
    assert torch.equal(store.get("a")["latents"], torch.ones(3))


def test_a_user_without_a_home_is_told_to_name_a_folder(world, monkeypatch, iteris):
    for name in ("ITERIS_STORE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def missing():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", missing)
    assert "Name a folder (--store, or ITERIS_STORE), or none. [IT-02]" in iteris.refused("store")
    concept = f"--concept={world}/lora1.safetensors:s1:dog"
    monkeypatch.setattr(sys.modules["iteris_core.cli.merge"], "load_base", pytest.fail)
    merge = ["merge", world / "base", "-o", world / "out.safetensors", concept]
    assert "this user has no home folder" in iteris.refused(*merge)


LOAD = """
import random, sys, torch
from pathlib import Path
from iteris_core import SampleStore
store, draw = SampleStore(Path(sys.argv[1]), limit=3_000_000), random.Random(sys.argv[2])
print(flush=True)
input()
hits = 0
for round in range(50):
    for key in draw.sample(range(8), 4):
        found = store.get(str(key))
        if found is None:
            store.put({"latents": torch.full((200_000,), float(key))}, str(key))
        else:
            hits += 1
            assert torch.equal(found["latents"], torch.full((200_000,), float(key)))
    if draw.random() < 0.1:
        store.clear()
assert hits > 10
"""


def test_two_processes_use_a_store_a_hundred_times(tmp_path):
    """What is read is whole, whoever writes or removes it meanwhile."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    both = [
        subprocess.Popen([sys.executable, "-c", LOAD, tmp_path, str(n)], text=True, **pipes)
        for n in range(2)
    ]
    for one in both:
        one.stdout.readline()
    for one in both:
        one.stdin.write("\n")
        one.stdin.flush()
    ends = [one.communicate()[1] for one in both]
    assert [one.returncode for one in both] == [0, 0], ends
    store = SampleStore(tmp_path, limit=3_000_000)
    assert all("." not in path.stem for path in tmp_path.iterdir())
    assert store.size <= 3_000_000 + 800_200
