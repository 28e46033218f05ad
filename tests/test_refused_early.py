"""What a merge could not be written as is refused before it runs, not after."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
import yaml
from tiny import make_pipeline, random_lora

from iteris_core import IterisError, cli, write_lora
from iteris_core.cli.saving import check_merge
from iteris_core.concepts import Concept
from iteris_core.hosts.diffusers import DiffusersHost


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    pipeline = make_pipeline()
    pipeline.save_pretrained(folder / "base")
    host = DiffusersHost(pipeline)
    write_lora(random_lora(host, 1), folder / "plain.safetensors")
    word = {"<toy>": {"clip_l": torch.ones(1, 32)}}
    write_lora(replace(random_lora(host, 2), embeddings=word), folder / "word.safetensors")
    return folder


@pytest.fixture
def merge(world, monkeypatch, capsys):
    """The command's complaint, of a merge that was never run."""

    def no_merge(*_, **__):
        raise AssertionError("the merge ran")

    monkeypatch.setattr("iteris_core.cli.common.merge_loras", no_merge)

    def run(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["iteris", "merge", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    return run


def test_an_embedding_whose_file_exists(world, merge, tmp_path):
    (tmp_path / "out_emb.safetensors").write_bytes(b"mine")
    concepts = [f"--concept={world}/{name}.safetensors:s:dog" for name in ("plain", "word")]
    arguments = [world / "base", *concepts, "-o", tmp_path / "out.safetensors", "--device=cpu"]
    assert "out_emb.safetensors exists already" in merge(*arguments)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ({"rank": "four", "ordered": True}, "broken cut"),
        ({"rank": 4}, "broken cut"),
        ({"rank": True, "ordered": True}, "broken cut"),
        ({"rnak": 4}, "broken cut"),
        ({"strength": "much"}, "broken strength"),
        ({"strength": float("nan")}, "broken strength"),
    ],
)
def test_a_cut_that_cannot_be_followed(world, merge, tmp_path, cut, message):
    path = tmp_path / "merge.yaml"
    concepts = [f"{world}/plain.safetensors:sks:cat"]
    data = {"base": str(world / "base"), "output": "out.safetensors", "concepts": concepts}
    path.write_text(yaml.safe_dump({**data, "cut": cut}))
    assert message in merge(path, "--device=cpu")


def test_a_layout_in_which_the_base_has_no_names(tmp_path):
    host = DiffusersHost(make_pipeline())
    path = write_lora(random_lora(host, 1), tmp_path / "lora.safetensors")
    lora = host.read_lora(path)
    nameless = replace(lora, base=replace(lora.base, written={}))
    concepts = [Concept(nameless, trigger="sks")]
    with pytest.raises(IterisError, match="has no name in kohya layout"):
        check_merge(concepts, tmp_path / "out.safetensors", "kohya", overwrite=False)
    check_merge(concepts, tmp_path / "out.safetensors", None, overwrite=False)
