"""Metadata of merged files: their content, and that they reproduce the same merge."""

import hashlib
import json
import shutil
from collections import Counter
from importlib.metadata import version

import pytest
import torch
from command_line import same
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_pipeline, random_lora

from iteris_core import Concept, IterisError, Lora, LowRank, merge_loras, write_lora
from iteris_core.cli.merge_file import find_file
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.lora_files import read_lora_file
from iteris_core.lora_files.metadata import merge_tag_frequency, trigger_words
from iteris_core.lora_files.peft_folder import write_adapter
from iteris_core.report.provenance import with_recipe, with_run

pytestmark = pytest.mark.usefixtures("unmeasured")


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    pipeline = make_pipeline()
    pipeline.save_pretrained(folder / "base")
    host = DiffusersHost(pipeline)
    for seed in (1, 2):
        lora = random_lora(host, seed)
        tags = json.dumps({f"10_sks{seed} dog": {f"sks{seed}": 5, "grass": seed}})
        write_lora(Lora(lora.sites, metadata={"ss_tag_frequency": tags}),
                   folder / f"lora{seed}.safetensors")  # fmt: skip
    return folder


def test_the_same_merge_again_from_the_merged_file(world, tmp_path, iteris):
    files = [world / f"lora{seed}.safetensors" for seed in (1, 2)]
    preserve = tmp_path / "preserve.txt"
    preserve.write_text("a cat\na house\n")
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    # No trigger is given: they come from the tags of the files.
    iteris(
        "merge", world / "base", "-o", first, "--samples=3", "--timesteps=1",
        "--latents=noise", "--device=cpu", "--set=rank=3", "--set=ridge=1e-4", "--seed=5",
        f"--concept={files[0]}", f"--concept={files[1]}::dog:0.5", f"--concept=prompts={preserve}",
    )  # fmt: skip
    found = metadata_of(first)
    recipe = json.loads(found["iteris"])
    assert [c["trigger"] for c in recipe["concepts"]] == ["sks1", "", "preserve"]
    assert recipe["concepts"][0]["sha256"] == hashlib.sha256(files[0].read_bytes()).hexdigest()
    assert recipe["settings"]["rank"] == 3
    assert recipe["versions"]["torch"] == version("torch")
    assert found["modelspec.merged_from"] == "lora1, lora2"
    assert found["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert found["modelspec.trigger_phrase"] == "sks1"
    assert found["ss_base_model_version"] == "sd_v1"
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("3", "3")
    tags = json.loads(found["ss_tag_frequency"])
    assert tags["10_sks1 dog"] == {"sks1": 5, "grass": 1}
    assert next(iter(tags)) == "trigger words"
    counts = sum(map(Counter, tags.values()), Counter())
    assert counts.most_common(1)[0][0] == "sks1"
    data = first.read_bytes()
    header = int.from_bytes(data[:8], "little")
    digest = hashlib.sha256(data[8 + header :]).hexdigest()
    assert found["modelspec.hash_sha256"] == f"0x{digest}"
    arguments = ["merge", world / "base", "-o", second, "--device=cpu", f"--from={first}",
                 f"--loras={world}"]  # fmt: skip
    iteris(*arguments)
    assert same(first, second)


def test_no_path_of_this_machine_is_written_and_the_loras_are_found_by_name(
    world, tmp_path, iteris
):
    files = [world / f"lora{seed}.safetensors" for seed in (1, 2)]
    out, again = tmp_path / "deep" / "out.safetensors", tmp_path / "again.safetensors"
    out.parent.mkdir()
    arguments = ["merge", world / "base", "--device=cpu", "--method=sum"]
    concepts = [f"--concept={file}:a:dog" for file in files]
    iteris(*arguments, "-o", out, *concepts)
    for path in (tmp_path, world):
        assert str(path).encode() not in out.read_bytes()
    assert [c["file"] for c in json.loads(metadata_of(out)["iteris"])["concepts"]] == [
        "lora1.safetensors", "lora2.safetensors",
    ]  # fmt: skip
    arguments = [*arguments[:3], "-o", again, f"--from={out}"]
    assert "pass its folder with --loras" in iteris.refused(*arguments)
    iteris(*arguments, f"--loras={world}")
    assert same(out, again)


def test_files_of_one_name_from_two_folders_come_again(world, tmp_path, iteris):
    places = tmp_path / "loras" / "cats", tmp_path / "loras" / "dogs"
    for number, place in enumerate(places, 1):
        place.mkdir(parents=True)
        shutil.copy(world / f"lora{number}.safetensors", place / "one.safetensors")
    out, again = tmp_path / "out.safetensors", tmp_path / "again.safetensors"
    concepts = [f"--concept={place}/one.safetensors:s{n}:dog" for n, place in enumerate(places)]
    base = ["merge", world / "base", "--device=cpu"]
    iteris(*base, "-o", out, "--method=sum", *concepts)
    found = "-o", again, f"--from={out}", f"--loras={tmp_path}/loras"
    iteris(*base, *found)
    assert same(out, again)
    shutil.rmtree(places[1])
    assert "is not the file that was merged" in iteris.refused(*base, *found, "--overwrite")


def test_files_of_older_recipes_are_found_by_their_whole_path_or_last_part(world, tmp_path):
    for folders, name in (
        ([tmp_path], str(world / "lora1.safetensors")),
        ([tmp_path, world], "C:\\Users\\somebody\\lora1.safetensors"),
        ([world.parent], f"{world.name}/lora1.safetensors"),
    ):
        found = find_file(folders, name, "")
        assert found.read_bytes() == (world / "lora1.safetensors").read_bytes()


def test_a_file_that_was_cut_after_its_merge_is_merged_again_whole(world, tmp_path, iteris):
    whole, cut, again = (tmp_path / f"{name}.safetensors" for name in ("whole", "cut", "again"))
    base = ["merge", world / "base", "--device=cpu", "--method=sum"]
    iteris(*base, "-o", whole, f"--concept={world / 'lora1.safetensors'}")
    changed = {"cut": {"rank": 2}, "partial": "3 of 12 steps"}
    metadata = with_recipe(Lora({}, metadata=metadata_of(whole)), **changed).metadata
    save_file(load_file(whole), cut, metadata)
    more = ("-o", again, f"--from={cut}", f"--loras={world}")
    iteris(*base[:-1], *more)
    assert "was changed after its merge ({'cut': {'rank': 2}}); the merge itself" in iteris.err
    assert "ended after 3 of 12 steps; the whole merge is repeated" in iteris.err
    assert same(whole, again)


def test_triggers_are_found_where_trainers_put_them():
    assert trigger_words({"modelspec.trigger_phrase": "sks, zwx"}) == ["sks", "zwx"]
    assert trigger_words({"ss_dataset_dirs": '{"10_sks dog": {"n_repeats": 10}}'}) == ["sks dog"]
    assert trigger_words({"ss_tag_frequency": '{"d": {"k": 2, "b": 9}}'}) == ["b"]
    assert trigger_words({"ss_tag_frequency": '{"d": {"k": 9, "b": 9}}'}) == []
    assert trigger_words({"ss_tag_frequency": "broken", "iteris": "[]"}) == []
    one, two = ({"ss_tag_frequency": '{"d": {"a": 2}}'}, {"ss_tag_frequency": '{"d": {"a": 1}}'})
    assert merge_tag_frequency([one, two, {}]) == {"d": {"a": 3}}


def simple(name: str, **kwargs) -> Lora:
    site = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    return Lora({site: LowRank(torch.ones(4, 1), torch.ones(1, 4))}, name, **kwargs)


def test_shared_triggers_and_embeddings_are_warned_of(tmp_path):
    vectors = [{"clip_l": torch.full((1, 4), float(i))} for i in range(2)]
    loras = [simple(f"l{i}", embeddings={"word": vectors[i]}) for i in range(2)]
    concepts = [Concept(loras[0], trigger="sks"), Concept(loras[1], trigger="SKS ")]
    result = merge_loras(None, concepts, "sum")
    text = result.report.summary()
    assert "the words 'sks' are those of sks, too. Versions of one LoRA" in text
    assert "the one from l1 is saved as 'l1-word'" in text
    assert json.loads(result.lora.metadata["iteris"])["notes"] == result.report.notes
    path = result.save(tmp_path / "merged.safetensors")
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["merged.safetensors", "merged_l1-word_emb.safetensors",
                     "merged_word_emb.safetensors"]  # fmt: skip
    found = load_file(tmp_path / "merged_l1-word_emb.safetensors")
    assert torch.equal(found["clip_l"], vectors[1]["clip_l"])
    with pytest.raises(IterisError, match="exists already"):
        result.save(path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([{"trigger": "star"}, {"trigger": " STAR"}], True),
        ([{"trigger": "sks star"}, {"trigger": "SKS star cat"}], True),
        ([{}, {}], False),
        ([{"trigger": "star"}, {"trigger": "sks1", "class_word": "Star"}], True),
        ([{"trigger": "sks1 star"}, {"trigger": "star", "class_word": "shape"}], True),
        ([{"trigger": "star"}, {"subjects": ["zwx", "a sks star"]}], True),
        ([{"trigger": "star"}, {"trigger": "sks1", "class_word": "starfish"}], False),
        ([{"trigger": "sks", "class_word": "star"}, {"trigger": "zwx", "class_word": "star"}], 0),
    ],
)
def test_a_trigger_within_another_phrase_is_warned_of(words, said):
    concepts = [Concept(simple(f"l{n}"), **one) for n, one in enumerate(words)]
    notes = merge_loras(None, concepts, "sum").report.notes
    told = [note for of_one in notes.values() for note in of_one if "star' " in note]
    assert len(told) == said
    kinds = "star' is the trigger of one concept and part of", "the words 'star' are those of"
    assert all(any(kind in note for kind in kinds) for note in told)


def test_bundled_embeddings_and_those_beside_a_file_are_kept(host, tmp_path):
    lora = random_lora(host, 1)
    path = write_lora(lora, tmp_path / "a.safetensors")
    bundled = {**load_file(path), "bundle_emb.word.string_to_param.*": torch.ones(2, 32)}
    save_file(bundled, tmp_path / "b.safetensors")
    save_file({"clip_l": torch.zeros(1, 32)}, tmp_path / "b_emb.safetensors")
    found = host.read_lora(tmp_path / "b.safetensors")
    assert set(found.sites) == set(lora.sites)
    assert {name: list(parts) for name, parts in found.embeddings.items()} == {
        "word": ["emb_params"], "b": ["clip_l"],
    }  # fmt: skip
    merged = write_lora(found, tmp_path / "c.safetensors")
    again = read_lora_file(merged, found.base)
    assert set(again.sites) == set(lora.sites)


def test_a_partial_reading_is_listed_in_report_and_file(world, tmp_path, iteris):
    tensors = load_file(world / "lora1.safetensors")
    save_file({**tensors, "lora_unet_mystery": torch.ones(2)}, tmp_path / "odd.safetensors")
    out = tmp_path / "out.safetensors"
    arguments = ["merge", world / "base", "-o", out, "--device=cpu", "--method=sum",
                 f"--concept={tmp_path / 'odd.safetensors'}:a:dog"]  # fmt: skip
    assert "lora_unet_mystery" in iteris.refused(*arguments)
    assert not out.exists()
    assert "left out: lora_unet_mystery (2,)" in iteris(*arguments, "--allow-partial")
    recipe = json.loads(metadata_of(out)["iteris"])
    assert recipe["notes"]["a"][0].startswith("left out: lora_unet_mystery")
    # The same merge again reads the file as it was read then.
    again = tmp_path / "again.safetensors"
    command = ["merge", world / "base", "-o", again, "--device=cpu", f"--from={out}"]
    iteris(*command)
    assert same(out, again)


def test_a_full_difference_and_an_embedding_come_again(world, tmp_path, iteris):
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{name}.diff": torch.randn(64, 64, generator=generator),
               "bundle_emb.word.clip_l": torch.ones(1, 32)}  # fmt: skip
    save_file(tensors, tmp_path / "full.safetensors")
    out, again = tmp_path / "out.safetensors", tmp_path / "again.safetensors"
    base = ["merge", world / "base", "--device=cpu"]
    iteris(
        *base, "-o", out, "--method=sum", "--energy=0.5",
        f"--concept={tmp_path / 'full.safetensors'}:a:dog",
    )  # fmt: skip
    entry = json.loads(metadata_of(out)["iteris"])["concepts"][0]
    assert entry["reading"] == {"allow_partial": False, "energy": 0.5}
    iteris(*base, "-o", again, f"--from={out}")
    assert torch.equal(load_file(out)[f"{name}.lora_down.weight"],
                       load_file(again)[f"{name}.lora_down.weight"])  # fmt: skip
    assert load_file(out)[f"{name}.lora_down.weight"].shape[0] < 32
    with safe_open(tmp_path / "again_emb.safetensors", "pt") as file:
        assert file.metadata()["name"] == "word"


def test_a_merged_file_is_called_for_by_all_its_phrases(world, tmp_path, iteris):
    """Merged again it is calibrated on every concept in it, and hands all phrases on."""
    quick = ["--samples=4", "--timesteps=1", "--latents=noise", "--device=cpu", "--method=sum"]
    merged, again, third = (tmp_path / f"{name}.safetensors" for name in "abc")
    one, two = world / "lora1.safetensors", world / "lora2.safetensors"
    base = ["merge", world / "base"]
    files = [f"--concept={one}:sks:cat", f"--concept={two}:zwx:dog"]
    iteris(*base, "-o", merged, *quick, *files)
    assert metadata_of(merged)["modelspec.trigger_phrase"] == "sks cat, zwx dog"
    files = [f"--concept={merged}", f"--concept={one}:abc:bird"]
    iteris(*base, "-o", again, *quick, *files)
    metadata = metadata_of(again)
    assert metadata["modelspec.trigger_phrase"] == "sks cat, zwx dog, abc bird"
    assert json.loads(metadata["iteris"])["concepts"][0]["subjects"] == ["sks cat", "zwx dog"]
    more = ("-o", third, "--device=cpu", f"--from={again}", f"--loras={world}")
    iteris(*base, *more)
    assert metadata_of(third)["modelspec.trigger_phrase"] == metadata["modelspec.trigger_phrase"]


def test_the_strength_in_the_text_encoders(world, tmp_path, iteris):
    out, again = tmp_path / "out.safetensors", tmp_path / "again.safetensors"
    one, two = world / "lora1.safetensors", world / "lora2.safetensors"
    base = ["merge", world / "base", "--device=cpu"]
    concepts = [f"--concept={one}:a:cat:0.5/0", f"--concept={two}:b:dog:1/2"]
    iteris(*base, "-o", out, "--method=sum", "--dtype=float32", *concepts)
    host = DiffusersHost(make_pipeline())
    merged = host.read_lora(out)
    inputs = [host.read_lora(file).sites for file in (one, two)]
    for site, change in merged.sites.items():
        factors = (0, 2) if site.startswith("text_encoder") else (0.5, 1)
        wanted = sum(f * sites[site].dense() for f, sites in zip(factors, inputs, strict=True))
        assert torch.allclose(change.dense(), wanted, atol=1e-5)
    strengths = [
        (c["strength"], c["text_strength"])
        for c in json.loads(metadata_of(out)["iteris"])["concepts"]
    ]
    assert strengths == [(0.5, 0.0), (1.0, 2.0)]
    command = [*base, "-o", again, "--dtype=float32", f"--from={out}", f"--loras={world}"]
    iteris(*command)
    assert same(out, again)


def test_strength_0_leaves_a_component_out(world):
    lora = random_lora(DiffusersHost(make_pipeline()), 1)
    sites = merge_loras(None, [Concept(lora, text_strength=0.0)], "sum").lora.sites
    assert {site.partition(".")[0] for site in sites} == {"unet"}
    sites = merge_loras(None, [Concept(lora, strength=0, text_strength=1.0)], "sum").lora.sites
    assert {site.partition(".")[0] for site in sites} == {"text_encoder"}
    assert not Concept(lora, strength=0.0, text_strength=0.0).is_active
    assert not Concept(lora, strength=0.0).is_active
    with pytest.raises(IterisError, match="There is no LoRA to merge"):
        merge_loras(None, [Concept(lora, strength=0.0, text_strength=0.0)], "sum")


def test_a_recipe_without_a_setting_runs_again_and_an_unknown_one_is_refused(
    world, tmp_path, iteris
):
    first, old, again = (tmp_path / f"{name}.safetensors" for name in ("first", "old", "again"))
    base = ["merge", world / "base", "--device=cpu"]
    files = [f"--concept={world / f'lora{seed}.safetensors'}:s{seed}:dog" for seed in (1, 2)]
    iteris(
        *base, "-o", first, "--samples=3", "--timesteps=1", "--latents=noise",
        "--set=objective=adapter", "--set=repair=False", *files,
    )  # fmt: skip
    recipe = json.loads(metadata_of(first)["iteris"])
    settings = recipe["settings"]
    assert settings["repair"] is False
    recipe["settings"] = {n: v for n, v in settings.items() if n != "ridge"}
    save_file(load_file(first), old, {"iteris": json.dumps(recipe)})
    more = [f"--from={old}", f"--loras={world}"]
    iteris(*base, "-o", again, "--set=rank=none", *more)
    assert json.loads(metadata_of(again)["iteris"])["settings"] == settings
    assert same(first, again)
    recipe["settings"] = {**settings, "align": "adapter"}
    save_file(load_file(first), old, {"iteris": json.dumps(recipe)})
    err = iteris.refused(*base, "-o", tmp_path / "no", *more)
    assert "old.safetensors: settings: there is no setting 'align'" in err


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("stabilityai/sdxl", "stabilityai/sdxl"),
        ("/home/me/t5", "t5"),
        ("~/models/t5", "t5"),
        ("C:\\Users\\me\\t5", "t5"),
        ("here/t5", "t5"),
    ],
)
def test_no_path_of_this_machine_goes_into_a_file(base, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "t5").mkdir(parents=True)
    lora = Lora({}, metadata={"iteris": json.dumps({"method": "sum"})})
    metadata = with_run(lora, base, "refuse").metadata
    assert json.loads(metadata["iteris"])["base"] == name
    folder = write_adapter(simple("a"), tmp_path / "adapter", base=base)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == name


def test_managers_list_the_trigger_phrases_first():
    """They show the most frequent tags of all folders; a merged source's are called by new ones."""
    tags = {"10_x": {"1girl": 90, "old": 5}, "trigger words": {"gone": 999}}
    one = simple("one", metadata={"ss_tag_frequency": json.dumps(tags)})
    concepts = [
        Concept(one, trigger="sks", class_word="cat"),
        Concept(simple("two"), trigger="zwx"),
    ]
    found = merge_loras(None, concepts, "sum").lora.metadata["ss_tag_frequency"]
    counts = sum(map(Counter, json.loads(found).values()), Counter())
    assert [tag for tag, _ in counts.most_common(3)] == ["sks cat", "zwx", "1girl"]
    assert "gone" not in counts
