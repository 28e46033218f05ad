"""``iteris score`` on small real models."""

import json

import pytest

import toybox

CLIP = f"--clip=local-dir:{toybox.ROOT / 'weights' / 'clip'}"


@pytest.fixture(scope="module")
def references():
    return next(iter(toybox.concepts().values())).references[0].parent


def test_score_prints_alignments(iteris, references, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red star with yellow stripes on a white background\n")
    out = iteris(
        "score", references, f"--refs={references}", f"--prompts={prompts}", CLIP, "--json",
    )  # fmt: skip
    data = json.loads(out)
    assert len(data["pictures"]) == len(list(references.iterdir()))
    assert 0.5 < data["mean"]["image"] <= 1
    assert data["mean"]["clipscore"] == pytest.approx(2.5 * data["mean"]["text"], abs=1e-4)
    assert "mean" in iteris("score", references, f"--refs={references}", CLIP)


def test_weights_of_an_architecture_from_a_file(iteris, references, tmp_path):
    err = iteris.refused(
        "score", references, f"--refs={references}", "--clip=ViT-B-32",
        f"--clip-weights={tmp_path / 'none.pt'}", "--device=cpu",
    )  # fmt: skip
    assert "open_clip cannot load 'ViT-B-32' with weights" in err
