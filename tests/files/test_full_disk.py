"""A disk that fills up while a merge is written: with a file size limit, and on a 64 kB disk."""

import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from iteris_core import IterisError, Lora, LowRank, write_lora
from iteris_core.errors import SaveError
from iteris_core.lora_files import write, write_loras
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


@pytest.mark.parametrize("name", ["merged.safetensors", "merged_emb.safetensors"])
@pytest.mark.parametrize("comes", ["before", "while it is written"])
def test_a_folder_is_never_moved_or_removed(tmp_path, monkeypatch, name, comes):
    """Among files that belong together it was moved aside, and removed with its contents."""
    users = tmp_path / name / "users.txt"

    def make_folder():
        users.parent.mkdir()
        users.write_text("mine")

    if comes == "before":
        make_folder()
    else:
        save = write.save_tensors

        def saved(tensors, path, metadata):
            save(tensors, path, metadata)
            if "name" in metadata:
                make_folder()

        monkeypatch.setattr(write, "save_tensors", saved)
    with pytest.raises(IterisError, match=f"{name} is a folder"):
        write_lora(lora(64, embedding=8), tmp_path / "merged.safetensors", overwrite=True)
    assert files_in(tmp_path) == [name, "users.txt"]
    assert users.read_text() == "mine"


def failing_at(monkeypatch, place: Path, error: Callable[[], object]) -> None:
    """Call ``error`` whenever a file is written below ``place``."""
    save = write.save_tensors

    def saved(tensors, path, metadata):
        if path.is_relative_to(place):
            error()
        save(tensors, path, metadata)

    monkeypatch.setattr(write, "save_tensors", saved)


def raising(error: BaseException) -> Callable[[], object]:
    def fail():
        raise error

    return fail


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A folder to write to, and that for temporary files."""
    for name in ("out", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "out", tmp_path / "temporary"


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), KeyboardInterrupt(),
    SystemExit(3),
])  # fmt: skip
def test_a_merge_survives_whatever_is_raised_while_it_is_written(
    places, monkeypatch, caplog, error
):
    out, temporary = places
    failing_at(monkeypatch, out, raising(error))
    known = isinstance(error, Exception)
    with pytest.raises(SaveError if known else type(error)) as failed:
        write_or_keep(lora(64, embedding=8), out / "merged.safetensors")
    told = str(failed.value) if known else caplog.text
    rescued = Path(told.partition("The merge is not lost: it is in ")[2].strip().removesuffix("."))
    assert rescued.parent.parent == temporary
    assert len(load_file(rescued)) == 3
    assert files_in(out) == []


def test_ctrl_c_waits_until_the_files_are_complete(places, monkeypatch):
    """As often as it is pressed."""
    out, temporary = places
    pressed = []

    def press():
        pressed.append(out)
        signal.raise_signal(signal.SIGINT)

    failing_at(monkeypatch, out, press)
    with pytest.raises(KeyboardInterrupt):
        write_or_keep(lora(64, embedding=8), out / "merged.safetensors")
    assert len(pressed) == 2
    assert files_in(out) == ["merged.safetensors", "merged_emb.safetensors"]
    assert files_in(temporary) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_file_takes_three_times_its_size_of_memory():
    """It was six times: its hash made two copies of it."""
    code = """
import resource, sys, torch
from pathlib import Path
from iteris_core import Lora, LowRank, write_lora

sites = [f"unet.mid_block.attentions.{n}.to_q" for n in range(12)]
changes = {site: LowRank(torch.randn(8192, 256), torch.randn(256, 8192)) for site in sites}
lora = Lora(changes, "big", {"modelspec.sai_model_spec": "1.0.0"})
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
size = write_lora(lora, Path(sys.argv[1], "big.safetensors")).stat().st_size
print((peak() - before) / size)
"""
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert float(run.stdout) < 4, run.stderr


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
