"""What a kept merge is found by: the hashes of models, files and code."""

import importlib.util
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kit import Kit, part, write_loras


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
        specs = [replace(kit.concepts()[0], **fields)]
        return key_of([kit.model], kit.clip, request.config(specs, "iteris"), request, None)

    assert key()
    assert key(trigger="embedding:toy") is None
    assert key(prompts=("a (embedding:toy:1.2) cat",)) is None


def test_a_file_is_read_for_its_hash_once(kit, desk, monkeypatch):
    read: list[str] = []
    kept = part(kit.pack, "nodes.kept")
    digest = kept.file_digest
    monkeypatch.setattr(kept, "file_digest", lambda file: read.append(file.name) or digest(file))
    desk()
    assert sorted(read) == ["a.safetensors", "b.safetensors"]
    desk(strength=0.5)
    desk(settings={"rank": 2})
    assert len(read) == 2
    write_loras(kit.model, kit.clip, kit.loras, seed=5)
    desk()
    assert len(read) == 4
    specs = kit.concepts()
    specs[0].file.unlink()
    with pytest.raises(kit.core.IterisError, match=r"a\.safetensors is gone"):
        desk(specs)


def test_comfyui_s_own_functions_of_sampling_have_a_hash(kit, desk):
    """A merge on them survives a restart; another number is another merge."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
    from comfy_extras.nodes_model_advanced import RescaleCFG

    def compiled():
        model = kit.model.clone()
        set_torch_compile_wrapper(model=model, backend="inductor")
        return model

    nodes = {
        "rescaled": lambda: RescaleCFG().patch(kit.model, 0.7)[0],
        "rescaled more": lambda: RescaleCFG().patch(kit.model, 0.8)[0],
        "masked": lambda: DifferentialDiffusion.execute(kit.model, 0.5).result[0],
        "compiled": compiled,
    }
    of = part(kit.pack, "nodes.comfy_digest").digest_of_patcher
    hashes = {name: of(make()) for name, make in nodes.items()}
    assert hashes == {name: of(make()) for name, make in nodes.items()}
    assert hashes.pop("compiled") == of(kit.model)
    assert len({*hashes.values(), of(kit.model)}) == 4
    assert None not in hashes.values()
    desk(on=nodes["rescaled"]())
    desk(on=nodes["rescaled"]())
    assert desk.merges() == 1


def test_gguf_s_bytes_have_a_hash(kit):
    """ComfyUI-GGUF's tensors are of a class of its own, and say how they are quantised."""

    class Packed(torch.Tensor):
        tensor_type = 8

    of = part(kit.pack, "nodes.comfy_digest").digest_of_patcher
    layer = kit.model.model.diffusion_model.time_embed[0]

    def hashed(value, kind=8):
        packed = torch.full((4, 34), value, dtype=torch.uint8).as_subclass(Packed)
        packed.tensor_type = kind
        layer.weight = torch.nn.Parameter(packed, requires_grad=False)
        layer.weight.tensor_type = kind
        return of(kit.model)

    assert hashed(1) == hashed(1) is not None
    assert len({hashed(1), hashed(2), hashed(1, kind=2)}) == 3


def test_an_update_keeps_merges_until_its_format_number_rises(library, tmp_path):
    """ComfyUI's version counts too."""
    root, copy = Path(__file__).resolve().parents[2], tmp_path / "pack"
    for name in ("nodes", "iteris_core", "locales", "toybox"):
        ignored = shutil.ignore_patterns("__pycache__", "weights", "*.safetensors", "images")
        shutil.copytree(root / name, copy / name, ignore=ignored)
    shutil.copy(root / "__init__.py", copy)

    def started(name):
        spec = importlib.util.spec_from_file_location(
            name, copy / "__init__.py", submodule_search_locations=[str(copy)]
        )
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        kit = Kit(module, tmp_path / name)
        kept, request = part(module, "nodes.kept"), kit.request()
        config = request.config(kit.concepts(), "iteris")
        return lambda: kept.key_on_disk([kit.model], kit.clip, config, request, None)

    for name in ("old", "same", "new", "newer"):
        (tmp_path / name).mkdir()
    old = started("old")
    with (copy / "iteris_core" / "linalg.py").open("a") as file:
        file.write("\n_UPDATED = True\n")
    assert started("same")() == old()
    kept = copy / "nodes" / "kept.py"
    kept.write_text(kept.read_text().replace("_FORMAT = 1", "_FORMAT = 2"))
    new = started("new")
    assert old() != new()
    import comfyui_version

    before = comfyui_version.__version__
    comfyui_version.__version__ = "0.99.0"
    try:
        assert started("newer")() != new()
    finally:
        comfyui_version.__version__ = before
