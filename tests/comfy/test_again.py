"""After a change, a new run computes only what changed."""

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from kit import SETTINGS, distance, part, write_loras


def test_another_strength_does_not_merge_again(kit, desk):
    _, _, whole, _, words, _ = desk()
    _, _, half, report, _, _ = desk(strength=0.5)
    assert words == "sks cat, zwx dog"
    assert desk.merges() == 1
    sites = {site: change.scaled(0.5) for site, change in whole.lora.sites.items()}
    assert distance(half.lora, type(whole.lora)(sites)) < 1e-6
    assert "At strength 0.5, in the file as well: each strength is a file of its own" in report
    assert json.loads(half.metadata["iteris"])["strength"] == 0.5
    assert "strength" not in json.loads(whole.metadata["iteris"])
    # Another weight merges again, on the samples that are there.
    specs = kit.concepts()
    desk((replace(specs[0], weight=3.0), specs[1]))
    desk(settings={"rank": 2})
    assert (desk.merges(), desk.latents()) == (3, 2)  # of the fit, and held out
    desk()
    assert desk.merges() == 3
    desk(on=kit.model.clone(), method="average")
    assert desk.merges() == 4


def test_a_restart_does_not_merge_again(kit, desk):
    """The files count by content: not by their time stamps, nor by what lies beside them."""

    def restarted(**values):
        _, _, lora, report, _, _ = desk(kit.concepts(), **values)
        return lora, report

    whole, report = restarted()
    assert "nothing ran" not in report
    file = kit.loras / "a.safetensors"
    file.with_name("a_v2.safetensors").write_bytes(file.read_bytes())
    file.with_suffix(".json").write_text('{"favourite": true}')
    file.touch()
    again, said = restarted(on=kit.model.clone())
    assert all(torch.equal(tensor, again[key]) for key, tensor in whole.items())
    assert again.metadata == whole.metadata
    assert said.startswith(report.rpartition("\n")[0].split("\n")[0])
    assert "nothing ran" in said
    half, _ = restarted(strength=0.5)
    assert distance(half.lora, type(whole.lora)({
        site: change.scaled(0.5) for site, change in whole.lora.sites.items()
    })) < 1e-6  # fmt: skip
    assert desk.merges() == 1
    restarted(settings={"rank": 2})
    assert desk.merges() == 2
    write_loras(kit.model, kit.clip, kit.loras, seed=5)
    restarted()
    assert desk.merges() == 3


def test_a_run_after_one_that_was_cancelled_has_the_same_rows(kit, desk, monkeypatch):
    """And the merge is the same to the bit."""
    import comfy.model_management as memory

    asked, limit, plain = [0], [0], {"settings": {"steps": 0}}

    def stop():
        asked[0] += 1
        if limit[0] and asked[0] > limit[0]:
            raise memory.InterruptProcessingException

    monkeypatch.setattr(memory, "throw_exception_if_processing_interrupted", stop)
    whole = desk(**plain)[2]
    kit.forget()
    limit[0], asked[0] = asked[0] - 5, 0
    with pytest.raises(memory.InterruptProcessingException):
        desk(**plain)
    limit[0] = 0
    found = desk(**plain)[2]
    assert all(torch.equal(tensor, found[key]) for key, tensor in whole.items())
    assert desk.latents() == 4


@contextmanager
def stopped_at(kit, monkeypatch, done):
    """A merge in here is interrupted after so many steps."""
    import comfy.model_management as memory

    runtime = part(kit.pack, "nodes.comfy_runtime")
    progress, shown = runtime.NodeProgress, []
    told = progress.__call__
    monkeypatch.setattr(runtime, "show_text", lambda text, _: shown.append(text))

    def stopping(self, now):
        if now.what == "steps through the denoiser" and now.done == done:
            memory.interrupt_current_processing()
        told(self, now)

    with monkeypatch.context() as patched:
        patched.setattr(progress, "__call__", stopping)
        with pytest.raises(memory.InterruptProcessingException):
            yield shown


RESCUED = "The merge without steps is kept: queue again to use it."


def test_a_best_that_was_cancelled_is_found_by_the_same_inputs(kit, desk, monkeypatch):
    """It says so, and when it is made again; a whole one is never replaced by it."""
    presets = part(kit.pack, "iteris_core.settings").PRESETS
    monkeypatch.setitem(presets["best"].settings, "steps", 3)
    best = {"preset": "best", "samples": 9}
    again = {"settings": {"kept": "make again"}}
    with stopped_at(kit, monkeypatch, 2) as shown:
        desk(**best)
    assert shown[-1] == f"Stopped at steps through the denoiser 2 of 3. {RESCUED}"
    merges = desk.merges()
    stopped, report = desk(**best)[2:4]
    assert "Stopped at step 2 of 3, so this is the merge without steps. It is made again" in report
    assert "when kept is set to make again" in report
    plain = desk(**best, settings={"steps": 0})[2]
    assert desk.merges() == merges
    assert all(torch.equal(tensor, plain[key]) for key, tensor in stopped.items())
    whole, report = desk(**best, **again)[2:4]
    assert "denoiser: 3 taken" in report
    assert desk.merges() == merges + 1
    desk(**best)
    with stopped_at(kit, monkeypatch, 1):
        desk(**best, **again)
    found, report = desk(**best)[2:4]
    assert desk.merges() == merges + 1
    assert "denoiser: 3 taken" in report
    assert all(torch.equal(tensor, found[key]) for key, tensor in whole.items())


def test_settings_set_0_over_a_preset(kit):
    """-1 leaves steps and rank to it, and is the default."""
    request = part(kit.pack, "nodes.merge_settings").Request

    def settings(preset, **values):
        given = {"preset": preset, "settings": values}
        return request.of(given, kit.model).config([], "iteris").settings

    assert settings("best", steps=0) == {"steps": 0}
    assert settings("tidy", steps=0, rank=0) == {"steps": 0, "rank": None}
    assert settings("tidy", steps=-1, rank=-1) == settings("tidy", steps=100, rank=32) == {}
    assert settings("default", steps=0, rank=0) == {"steps": 0}
    assert settings("default", steps=-1, rank=-1) == settings("best", steps=200) == {}
    assert settings("fast", steps=0) == {}
    assert settings("default", steps=5, rank=8) == {"steps": 5, "rank": 8}
    schema = kit.node("merge_settings", "IterisMergeSettings").define_schema()
    assert {one.id: one.default for one in schema.inputs if one.id in ("steps", "rank")} == {
        "steps": -1,
        "rank": -1,
    }


@pytest.mark.parametrize("done", [0, 2])
def test_an_interrupt_is_comfyui_s_own_and_the_merge_without_steps_is_kept(
    kit, desk, monkeypatch, done
):
    without = {"settings": {"steps": 0}}
    before, plain = kit.outputs(), desk(**without)[2]
    kit.forget()
    with stopped_at(kit, monkeypatch, done) as shown:
        desk(settings={"steps": 3})
    assert shown[-1] == f"Stopped at steps through the denoiser {done} of 3. {RESCUED}"
    assert kit.unchanged(before)
    assert not torch.is_inference_mode_enabled()
    merges = desk.merges()
    found, report = desk(**without)[2:4]
    assert desk.merges() == merges
    assert f"stopped after {done} of 3" in report
    assert all(torch.equal(tensor, found[key]) for key, tensor in plain.items())


def test_after_a_restart_only_a_new_lora_is_denoised(kit, desk, monkeypatch):
    """Samples lie in ComfyUI's user folder. A MODEL with a function on it has no hash."""
    host = part(kit.pack, "nodes.comfy_host")
    made: list[int] = []
    make = host.make_latents

    def counted(*given, **named):
        if named["texts"]:  # else it only draws noise
            made.append(named["owner"])
        return make(*given, **named)

    def restart():
        kit.merging.store("merges").clear()
        made.clear()

    monkeypatch.setattr(host, "make_latents", counted)
    specs = kit.concepts()
    restart()
    whole = desk()[2]
    assert {*made} == {0, 1}
    restart()
    found = desk()[2]
    assert not made
    assert all(torch.equal(tensor, found[key]) for key, tensor in whole.items())
    restart()
    desk((specs[0], replace(specs[1], strength=0.5)))
    assert {*made} == {1}
    restart()
    other = kit.model.clone()
    other.set_model_unet_function_wrapper(
        lambda apply, given: apply(given["input"], given["timestep"], **given["c"])
    )
    desk(on=other)
    assert {*made} == {0, 1}


def test_minutes_and_memory_make_no_other_merge(kit, desk):
    """One that left nothing out is the same with more of both, and with several methods at once."""
    desk(minutes=60.0)
    for more in ({"minutes": 90.0}, {"minutes": 5.0}, {"settings": {"memory": 64.0}}):
        assert "nothing ran" in desk(**more)[3]
    compare = kit.node("merge_nodes", "CompareMerges").execute
    given = {"row_1": "iteris", "samples": 9, "settings": SETTINGS}
    compare(kit.model, kit.concepts(), kit.clip, **given)
    assert desk.merges() == 1


def test_a_short_merge_is_made_again_when_more_is_allowed(kit, desk, monkeypatch):
    """By a limit of the user's, or because other programs left more; otherwise it is used, at any
    strength. A whole one stays whole with less."""
    import comfy.model_management as memory

    small = {"settings": {"memory": 0.0075}}
    report = desk(**small)[3]
    assert "Not enough memory" in report
    assert "nothing ran" in desk(strength=0.5, **small)[3]
    assert "nothing ran" in desk(settings={"memory": 0.006})[3]
    assert desk.merges() == 1
    free = memory.get_free_memory
    for size, merges in ((9e6, 2), (10e6, 2), (8e6, 2)):
        left = int(size), 0
        monkeypatch.setattr(
            memory,
            "get_free_memory",
            lambda _=None, both=False, left=left: left if both else left[0],
        )
        assert "Not enough memory" in desk()[3]
        assert desk.merges() == merges
    monkeypatch.setattr(memory, "get_free_memory", free)
    assert "Not enough memory" not in desk()[3]
    assert "Not enough memory" not in desk(**small)[3]
    assert desk.merges() == 3


def test_a_merge_with_prompts_left_out_is_made_again_with_more_minutes(kit, desk):
    """And with no fewer than were allowed it is used."""
    few, many = {"samples": 16, "minutes": 0.001}, {"samples": 16, "minutes": 60.0}
    assert "12 of 16 prompts" in desk(**few)[3]
    assert "nothing ran" in desk(strength=0.5, **few)[3]
    assert desk.merges() == 1
    assert "of 16 prompts" not in desk(**many)[3]
    assert "of 16 prompts" not in desk(**few)[3]
    assert desk.merges() == 2


@pytest.mark.parametrize("word", ["make again", "clear"])
def test_made_again_once(kit, desk, word):
    """This merge alone, with its samples, each time that it is chosen; older graphs say clear."""
    settings = kit.node("merge_settings", "IterisMergeSettings")
    assert settings.validate_inputs(kept=word) is True
    assert "can be use or make again" in settings.validate_inputs(kept="never")
    again = {"settings": settings.execute(kept=word).result[0]}
    other, this = kit.concepts()[:1], kit.concepts()
    desk(other)
    whole, before = desk(this)[2], desk.latents()
    for strength in (1.0, 0.5, 1.0):
        found = desk(this, strength=strength, **again)[2]
    assert all(torch.equal(tensor, found[key]) for key, tensor in whole.items())
    assert (desk.merges(), desk.latents()) == (3, before + 2)  # of the fit, and held out
    desk(other)
    desk(this)
    assert desk.merges() == 3
    desk(this, **again)
    assert desk.merges() == 4


def test_a_renamed_lora_does_not_merge_again(kit, desk):
    """The file that is saved names it as it is called now."""
    whole, last = desk()[2], kit.concepts()[1]
    (kit.loras / "a.safetensors").rename(kit.loras / "cat.safetensors")
    first = kit.specs.make_spec(kit.loras / "cat.safetensors", trigger="sks", class_word="cat")
    found = desk((first, last))[2]
    assert desk.merges() == 1
    assert all(torch.equal(tensor, found[key]) for key, tensor in whole.items())
    recipe, before = (json.loads(lora.metadata["iteris"]) for lora in (found, whole))
    assert [one["file"] for one in recipe["concepts"]] == ["cat.safetensors", "b.safetensors"]
    assert [one["lora"] for one in recipe["concepts"]] == ["cat", "b"]
    assert found.metadata["modelspec.title"] == "cat + b"
    assert found.metadata["modelspec.merged_from"] == "cat, b"
    for one in (*recipe["concepts"], *before["concepts"]):
        del one["file"], one["lora"]
    assert recipe == before


def test_a_merge_is_kept_at_half_the_size_and_loses_nothing(kit, desk):
    """What was made and what was kept give the same files, at every strength, rank and precision.
    The first is the file of the merge at full precision."""
    made = desk()[2]
    kept = desk()[2]
    assert desk.merges() == 1
    (file,) = (kit.folder_of("merges")).glob("*")
    numbers = sum(c.up.numel() + c.down.numel() for c in made.lora.sites.values())
    assert 2 * numbers < file.stat().st_size < 2.2 * numbers + 60_000
    for how in ({}, {"dtype": "float32"}, {"dtype": "bfloat16", "rank": 2}):
        for one, other in zip((made.at(**how),), (kept.at(**how),), strict=True):
            assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    half, again = (
        desk(strength=0.3)[2],
        kit.merging.LoraModel(
            part(kit.pack, "iteris_core.report.provenance").scaled_lora(made.lora, 0.3)
        ),
    )
    assert all(torch.equal(tensor, again[key]) for key, tensor in half.items())
    config = kit.request().config(kit.concepts(), "iteris")
    result = kit.merging.merge_on(kit.model, kit.clip, config)
    whole = kit.lora_model(result)
    assert all(torch.equal(tensor, made[key]) for key, tensor in whole.items())
