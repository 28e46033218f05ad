"""After a change, a new run computes only what changed."""

import json

import pytest
import torch
from kit import SETTINGS, distance, part, write_loras


@pytest.fixture
def desk(kit, caplog):
    """Runs the merging node, and counts in its log."""
    caplog.set_level("INFO")

    def merge(concepts=None, on=None, settings=None, **values):
        given = {"clip": kit.clip, "samples": 9, "settings": {**SETTINGS, **(settings or {})}}
        specs = tuple(concepts or kit.concepts())
        run = kit.node("merge_nodes", "IterisMerge").execute
        return run(on or kit.model, specs, **given, **values).result

    merge.merges = lambda: caplog.text.count("IterIS: merged with")
    merge.latents = lambda: caplog.text.count("IterIS: making latents")
    return merge


def test_another_strength_does_not_merge_again(kit, desk):
    _, _, whole, _, words = desk()
    _, _, half, report, _ = desk(strength=0.5)
    assert words == "sks cat, zwx dog"
    assert desk.merges() == 1
    sites = {site: change.scaled(0.5) for site, change in whole.lora.sites.items()}
    assert distance(half.lora, type(whole.lora)(sites)) < 1e-6
    assert "At strength 0.5" in report
    assert json.loads(half.metadata["iteris"])["strength"] == 0.5
    assert "strength" not in json.loads(whole.metadata["iteris"])
    # Another weight merges again, on the samples that are there.
    specs = kit.concepts()
    desk((specs[0].model_copy(update={"weight": 3.0}), specs[1]))
    desk(settings={"rank": 2})
    assert (desk.merges(), desk.latents()) == (3, 2)  # of the fit, and held out
    desk()
    assert desk.merges() == 3
    desk(on=kit.model.clone(), method="average")
    assert desk.merges() == 4


def test_a_restart_does_not_merge_again(kit, desk):
    """The files count by content: not by their time stamps, nor by what lies beside them."""

    def restarted(**values):
        _, _, lora, report, _ = desk(kit.concepts(), **values)
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
    restarted(settings={"kept": "clear"})
    assert desk.merges() == 3
    write_loras(kit.model, kit.clip, kit.loras, seed=5)
    restarted()
    assert desk.merges() == 4


def test_a_run_after_one_that_was_cancelled_has_the_same_rows(kit, desk, monkeypatch):
    """And the merge is the same to the bit."""
    import comfy.model_management as memory

    asked, limit = [0], [0]

    def stop():
        asked[0] += 1
        if limit[0] and asked[0] > limit[0]:
            raise memory.InterruptProcessingException

    monkeypatch.setattr(memory, "throw_exception_if_processing_interrupted", stop)
    whole = desk()[2]
    kit.merging.clear()
    limit[0], asked[0] = asked[0] - 5, 0
    with pytest.raises(memory.InterruptProcessingException):
        desk()
    limit[0] = 0
    found = desk()[2]
    assert all(torch.equal(tensor, found[key]) for key, tensor in whole.items())
    assert desk.latents() == 4


def test_what_has_no_hash_is_not_kept(kit):
    """Functions of other nodes, and hooks; another last layer of the CLIP has another hash."""
    import comfy.patcher_extension

    of = part(kit.pack, "nodes.comfy_digest").digest_of_base
    nothing = part(kit.pack, "nodes.comfy_conds").References()

    def hashed(change=lambda model, clip: None):
        model, clip = kit.model.clone(), kit.clip.clone()
        change(model, clip)
        return of([model], clip, nothing)

    plain = hashed()
    assert plain == hashed()
    assert hashed(lambda _, clip: clip.clip_layer(-2)) not in (plain, None)
    assert hashed(lambda _, clip: clip.set_tokenizer_option("min_length", 8)) not in (plain, None)
    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    for change in (
        lambda model, _: model.add_wrapper_with_key(kind, "cache", lambda run, *a: run(*a)),
        lambda model, _: model.set_attachments("more", object()),
        lambda model, _: model.set_injections("more", [object()]),
        lambda _, clip: setattr(clip, "apply_hooks_to_conds", object()),
        lambda _, clip: setattr(clip.patcher, "forced_hooks", object()),
    ):
        assert hashed(change) is None


def test_an_embedding_by_name_is_not_kept(kit):
    """Its file may change."""
    key_of = part(kit.pack, "nodes.kept").key_on_disk
    request = part(kit.pack, "nodes.merge_settings").Request()

    def key(**fields):
        specs = [kit.concepts()[0].model_copy(update=fields)]
        return key_of([kit.model], kit.clip, request.config(specs, "iteris"), request, None)

    assert key()
    assert key(trigger="embedding:toy") is None
    assert key(prompts=("a (embedding:toy:1.2) cat",)) is None


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
    desk((specs[0], specs[1].model_copy(update={"strength": 0.5})))
    assert {*made} == {1}
    restart()
    other = kit.model.clone()
    other.set_model_unet_function_wrapper(
        lambda apply, given: apply(given["input"], given["timestep"], **given["c"])
    )
    desk(on=other)
    assert {*made} == {0, 1}


def test_compare_shows_each_lora_alone_and_all_stacked(kit):
    """A speed LoRA is on in every row but the base; minutes and the rank are those of merges."""
    speed = kit.specs.make_spec(kit.loras / "c.safetensors", kind="always on")
    node = kit.node("merge_nodes", "CompareMerges")
    rows = {"row_1": "base", "row_2": "each alone", "row_3": "stacked", "row_5": "average"}
    given = {"settings": {**SETTINGS, "rank": 2}, "minutes": 5.0, **rows}
    concepts = [kit.concepts()[0].model_copy(update={"weight": 0.5}), kit.concepts()[1]]
    models, clips, labels, report = node.execute(
        kit.model, [*concepts, speed], kit.clip, **given
    ).result
    assert labels == ["base", "a alone", "b alone", "stacked", "average"]
    assert report.startswith("a alone: ")
    assert models[0] is kit.model
    kit.model, kit.clip = kit.stock("c.safetensors")
    wanted = kit.draw(*kit.stock("a.safetensors"))
    assert float((kit.draw(models[1], clips[1]) - wanted).norm() / wanted.norm()) < 1e-2
    kit.model, kit.clip = kit.stock("a.safetensors")
    wanted = kit.draw(*kit.stock("b.safetensors", 0.7))
    assert float((kit.draw(models[3], clips[3]) - wanted).norm() / wanted.norm()) < 1e-2
    with pytest.raises(kit.core.IterisError, match="Compare Merges has no rows"):
        node.execute(kit.model, concepts, kit.clip)
