"""A disk that fills up while a merge is written: with a file size limit, and on a 64 kB disk."""

import resource
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from iteris_core import IterisError, Lora, LowRank, write_lora
from iteris_core.errors import SaveError
from iteris_core.lora_files import write_loras
from iteris_core.lora_files.experts import write_or_keep
from iteris_core.lora_files.peft_folder import write_adapter


@contextmanager
def largest_file(size: int):
    """The system refuses to let a file grow beyond ``size`` bytes."""
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def lora(width: int, embedding: int = 0) -> Lora:
    generator = torch.Generator().manual_seed(width)
    ones = LowRank(torch.randn(width, 4, generator=generator), torch.ones(4, width))
    embeddings = {"sks": {"clip_l": torch.ones(embedding, 768)}} if embedding else {}
    return Lora({"unet.mid_block.attentions.0.to_q": ones}, "big", embeddings=embeddings)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_the_earlier_file_stays_and_nothing_half_is_left(tmp_path):
    path = write_lora(lora(64), tmp_path / "merged.safetensors")
    before = path.read_bytes()
    with largest_file(4096), pytest.raises(SaveError) as failed:
        write_lora(lora(4096), path, overwrite=True)
    said = str(failed.value)
    assert isinstance(failed.value, IterisError)
    assert said.startswith(f"{path} cannot be written (File too large; ")
    assert "the existing file is unchanged. Make room, or choose a folder on another" in said
    assert path.read_bytes() == before
    assert files_in(tmp_path) == [path.name]


def test_a_lora_is_not_left_without_its_embedding_nor_one_expert_without_the_other(tmp_path):
    with largest_file(16384), pytest.raises(SaveError, match=r"merged_emb\.safetensors cannot"):
        write_lora(lora(64, embedding=8), tmp_path / "merged.safetensors")
    pair = {tmp_path / "high.safetensors": lora(64), tmp_path / "low.safetensors": lora(4096)}
    with largest_file(16384), pytest.raises(SaveError, match=r"low\.safetensors cannot"):
        write_loras(pair)
    assert files_in(tmp_path) == []


def test_an_adapter_folder_is_whole_or_not_there(tmp_path):
    with largest_file(4096), pytest.raises(SaveError, match="no partial file is left"):
        write_adapter(lora(4096), tmp_path / "adapter")
    assert files_in(tmp_path) == []


def command(world, out, *extra: str) -> list[str]:
    concepts = [f"--concept={world}/lora{seed}.safetensors:s{seed}:dog" for seed in (1, 2)]
    return ["merge", world / "base", *concepts, "-o", out, "--method=sum", *extra]


def test_the_command_keeps_a_merge_that_its_disk_does_not_take(
    world, small_disk, tmp_path, iteris, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    out = small_disk / "merged.safetensors"
    said = iteris.refused(*command(world, out, "--dtype=float32"))
    assert files_in(small_disk) == []
    assert f"{out} cannot be written (No space left on device" in said
    kept = Path(said.partition("The merge is not lost: it is in ")[2].partition(". [")[0])
    assert kept.name == out.name
    assert len(load_file(kept)) > 30


@pytest.mark.parametrize("number", range(10))
def test_an_interrupt_among_renames_leaves_all_files_as_they_were(tmp_path, monkeypatch, number):
    """However far they were: each file that is there is moved aside, and then replaced."""
    paths = [tmp_path / f"{name}.safetensors" for name in ("high", "low", "new")]
    write_loras({path: lora(8, embedding=1) for path in paths[:2]})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    replace, calls = Path.replace, []

    def interrupted(path, target):
        calls.append(target)
        done = replace(path, target)
        if len(calls) == number + 1:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_loras({path: lora(16, embedding=2) for path in paths}, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_rename_that_fails_leaves_all_files_as_they_were(tmp_path, monkeypatch):
    paths = [tmp_path / f"{name}.safetensors" for name in ("high", "low", "new")]
    write_loras({path: lora(8, embedding=1) for path in paths[:2]})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    replace = Path.replace

    def refused(path, target):
        if Path(target).name == "low.safetensors" and not path.name.startswith("replaced"):
            raise PermissionError(13, "Permission denied")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(SaveError, match=r"low\.safetensors cannot be .* the existing file"):
        write_loras({path: lora(16, embedding=2) for path in paths}, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("letter", ["n", "画"])
def test_a_file_may_have_the_longest_name_that_the_system_allows(tmp_path, monkeypatch, letter):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    name = letter * (243 // len(letter.encode())) + ".safetensors"
    assert len(name.encode()) == 255
    assert load_file(write_lora(lora(8), tmp_path / name))
    with pytest.raises(IterisError, match="The merge is not lost") as failed:
        write_or_keep(lora(8), tmp_path / "none" / name)
    kept = str(failed.value).partition("not lost: it is in ")[2].removesuffix(".")
    assert load_file(kept)
    with pytest.raises(SaveError, match=r"File name too long.*Choose a shorter name"):
        write_lora(lora(8), tmp_path / f"n{name}")
