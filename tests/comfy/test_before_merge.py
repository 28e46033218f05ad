"""What is wrong is said before a merge runs: on the node that mends it, with the row's number."""

from types import SimpleNamespace

import pytest
import torch
from kit import SETTINGS, part, use_folders
from safetensors.torch import load_file, save_file


class Desk:
    """IterIS LoRAs and IterIS Merge, and what they show."""

    def __init__(self, kit, monkeypatch):
        self.kit, self.error, self.shown = kit, kit.core.IterisError, list[str]()
        use_folders(monkeypatch, kit.folder, "loras")
        for name in ("concept_nodes", "merging", "merge_nodes", "comfy_runtime"):
            module = part(kit.pack, f"nodes.{name}")
            monkeypatch.setattr(module, "show_text", lambda text, _: self.shown.append(text))

    def loras(self, *names, prompt=None, **values):
        """The concepts, of rows with the words sks1, sks2 …"""
        node = self.kit.node("concept_nodes", "IterisLoras")
        node.hidden = SimpleNamespace(unique_id="1", prompt=prompt)
        rows = {f"lora_{row}": name for row, name in enumerate(names, 1)}
        words = {f"words_{row}": f"sks{row} cat" for row in range(1, len(names) + 1)}
        return node.execute(**{**rows, **words, **values}).result[0]

    def merge(self, concepts, **values):
        given = {"samples": 3, "settings": SETTINGS, "clip": self.kit.clip, **values}
        node = self.kit.node("merge_nodes", "IterisMerge")
        return node.execute(self.kit.model, concepts, **given).result

    @property
    def before(self):
        """What the merging node showed before anything was denoised."""
        begun = next(n for n, text in enumerate(self.shown) if "enoising steps" in text)
        return self.shown[begun]


@pytest.fixture
def desk(kit, monkeypatch):
    return Desk(kit, monkeypatch)


def test_messages_about_a_file_begin_with_its_row(kit, desk):
    tensors = load_file(kit.loras / "b.safetensors")
    save_file(
        {**tensors, "lora_unet_elsewhere.diff": torch.ones(3)}, kit.loras / "more.safetensors"
    )
    concepts = desk.loras("a.safetensors", "none", "more.safetensors")
    with pytest.raises(desk.error, match=r"^Row 3: .*more\.safetensors"):
        desk.merge(concepts)
    (kit.loras / "broken.safetensors").write_bytes(b"<html>")
    for name in ("broken.safetensors", "gone.safetensors"):
        with pytest.raises(desk.error, match=r"^Row 2: "):
            desk.loras("a.safetensors", name)
    with pytest.raises(desk.error, match=r"^Row 2: the prompts of b\.safetensors are set to lines"):
        desk.loras("a.safetensors", "b.safetensors", prompts_2="lines")
    # ComfyUI itself names no row for a file that is gone meanwhile.
    concepts = desk.loras("a.safetensors", "b.safetensors")
    (kit.loras / "b.safetensors").unlink()
    with pytest.raises(desk.error, match=r"^Row 2: .*b\.safetensors is gone"):
        desk.merge(concepts)


def test_all_rows_off_is_an_error_of_iteris_loras(pack, kit, desk):
    """Where they feed a merge: other lists may go on with none."""
    off = {"on_1": False, "on_2": False}

    def fed(kind):
        return {"2": {"class_type": kind, "inputs": {"concepts": ["1", 0]}}}

    with pytest.raises(desk.error, match=r"rows 1 to 2 are off\. Press the switch"):
        desk.loras("a.safetensors", "b.safetensors", prompt=fed("IterisMerge"), **off)
    with pytest.raises(desk.error, match=r"Press \+ LoRA"):
        desk.loras(prompt=fed("IterisInspectLoras"))
    nothing = desk.loras("a.safetensors", "b.safetensors", prompt=fed("IterisLoras"), **off)
    assert nothing == ()
    assert desk.loras(prompt=fed("IterisMerge"), concepts=kit.concepts()) == tuple(kit.concepts())
    with pytest.raises(desk.error, match=r"No LoRA is on\. On IterIS LoRAs press"):
        desk.merge(nothing)
    zero = desk.loras("a.safetensors", "b.safetensors", weight_1=0.0, weight_2=0.0)
    with pytest.raises(desk.error, match="All of rows 1 and 2 have strength or weight 0"):
        desk.merge(zero)
    needing = {
        schema.node_id
        for node in part(pack, "nodes").NODES
        for schema in [node.define_schema()]
        if any(one.id == "concepts" and not one.optional for one in schema.inputs)
    }
    assert needing == part(pack, "nodes.concept_nodes").NEED_CONCEPTS


def test_loras_without_words_are_not_saved_as_a_merge(kit, desk):
    wordless = desk.loras("b.safetensors", "c.safetensors", words_1="", words_2="")
    said = r"^Rows 1 and 2 \(b\.safetensors and c\.safetensors\) have no trigger words"
    with pytest.raises(desk.error, match=said):
        desk.merge(wordless)
    alone = desk.loras("b.safetensors", words_1="")
    with pytest.raises(desk.error, match=r"^Row 1 \(b\.safetensors\) has no trigger words"):
        desk.merge(alone)
    always = {"prompts_1": "always on", "prompts_2": "always on"}
    on = desk.loras("b.safetensors", "c.safetensors", **always)
    with pytest.raises(desk.error, match="are always on"):
        desk.merge(on)
    desk.merge(on, method="sum")
    desk.merge(wordless, method="average")
    desk.merge((*wordless, *kit.concepts()))


def test_a_file_in_two_rows_is_known_before_the_merge(kit, desk):
    """By its content: neither by its name nor by its words."""
    (kit.loras / "copy.safetensors").write_bytes((kit.loras / "a.safetensors").read_bytes())
    concepts = desk.loras("a.safetensors", "b.safetensors", "copy.safetensors")
    told = "Rows 1 and 3 (a.safetensors and copy.safetensors) are the same file"
    assert told in desk.shown[-1]
    words = {"words_1": "sks cat", "words_3": "sks cat"}
    concepts = desk.loras("a.safetensors", "b.safetensors", "copy.safetensors", **words)
    report = desk.merge(concepts)[3]
    assert told in desk.before
    assert told in report
    assert "train one of them with another trigger" not in report
    desk.loras("a.safetensors", "b.safetensors", "copy.safetensors", on_3=False)
    assert "same file" not in desk.shown[-1]


def test_many_loras_keep_little_and_that_is_said_first(kit, desk):
    names = [f"{number}.safetensors" for number in range(9)]
    tensors = load_file(kit.loras / "a.safetensors")
    for number, name in enumerate(names):
        save_file({key: t + number for key, t in tensors.items()}, kit.loras / name)
    concepts = desk.loras(*names)
    assert "9 LoRAs: expect little of each" in desk.shown[-1]
    desk.shown.clear()
    desk.merge(concepts)
    assert "9 LoRAs: expect little of each" in desk.before
    desk.loras(*names, on_9=False)
    assert "expect little" not in desk.shown[-1]


def test_a_latent_that_is_too_small_is_warned_of_before_the_merge(kit, desk):
    def report(side):
        desk.shown.clear()
        kit.forget()
        return desk.merge(kit.concepts(), latent={"samples": torch.zeros(1, 4, side, side)})[3]

    assert "Latents of 8 × 8, where a merge would choose 64 × 64" in report(8)
    assert "Latents of 8 × 8" in desk.before
    assert "Latents of" not in report(20)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((1, 16, 3, 8, 8), "is of videos, and this MODEL draws pictures"),
        ((1, 16, 8, 8), "has 16 channels, and this MODEL's have 4"),
    ],
)
def test_a_latent_of_another_model_is_refused(kit, desk, shape, said):
    before = kit.outputs()
    latent = {"samples": torch.randn(shape)}
    with pytest.raises(desk.error, match=said):
        desk.merge(kit.concepts(), latent=latent)
    assert kit.unchanged(before)


def test_the_verdict_comes_first_and_details_are_in_the_report(kit, desk):
    concepts = desk.loras("a.safetensors", "b.safetensors")
    report, words = desk.merge(concepts, strength=0.5)[3:5]
    shown = desk.shown[-1].splitlines()
    assert shown[0].partition(":")[0] in ("Strong", "Fair", "Weak")
    assert f"  Trigger words: {words}" in shown
    assert any("At strength 0.5, in the file" in line for line in shown)
    assert shown[-1] == "  Details: connect the output report to Preview as Text."
    assert report.splitlines()[0] == shown[0]
    details = ("Planned: ", "Merged 2 concepts", "Kept on held-out rows")
    assert all(text in report and text not in desk.shown[-1] for text in details)
    again = desk.merge(concepts)[3]
    assert again.splitlines()[0] == shown[0]
    assert "nothing ran" in desk.shown[-1]
