"""A world of a YAML file, and a stranger's method: the toybox's files stand for somebody's model,
LoRAs and pictures."""

import sys
from pathlib import Path

import pytest
import yaml
from command_line import make_dino

import toybox

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import outputs
import unseen
from protocol.figures import results
from protocol.runs import loaded, stored
from worlds import world_of

LORAS = toybox.ROOT / "weights" / "loras"
CLIP = f"local-dir:{toybox.ROOT / 'weights' / 'clip'}"
METHOD = """
from iteris_core import merge_loras

def merge(host, concepts, calibration, method):
    return merge_loras(host, concepts, method).lora
"""


def described(**changed):
    """The content of a file, with other keys; None takes one out."""
    concepts = [
        {
            "file": [str(LORAS / f"sks{one}.safetensors") for one in (number, number + 1)],
            "trigger": f"sks{number}",
            "class": word,
            "references": str(toybox.ROOT / "references" / f"sks{number}"),
        }
        for number, word in ((1, "star"), (4, "circle"))
    ]
    data = {
        "base": str(toybox.BASE),
        "device": "cpu",
        "concepts": concepts,
        "seen": ["a {}", "a {} on a white background"],
        "new": ["a {} on a blue background"],
        "plain": ["a red square on a gray background"],
        "drawing": {"steps": 2, "guidance": 2.5, "images_per_prompt": 1, "width": 64},
        "calibration": {"samples": 2, "timesteps": 1, "denoising_steps": 2},
        "clip": CLIP,
        **changed,
    }
    return {key: value for key, value in data.items() if value is not None}


def written(folder, **changed):
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(described(**changed)))
    return file


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    script.main()


@pytest.mark.slow
def test_a_model_of_one_s_own_is_measured_as_every_world(monkeypatch, tmp_path, capsys):
    for module in (outputs, unseen):
        monkeypatch.setattr(module, "BUILD", tmp_path / "build")
    make_dino(tmp_path / "dino")
    file = written(tmp_path, dino="dino", seen=["a {}"])  # the model lies beside the file
    run(monkeypatch, unseen, "--world", file, "--methods", "iteris,average")
    table = capsys.readouterr().out
    head = "seen: likeness | new words: likeness | new words: likeness kept | new words: dino |"
    assert head in table
    assert "judge" not in table
    assert "scene" not in table
    assert "| **iteris** | 1 |" in table
    folder = tmp_path / "build" / "quick"
    alone, runs = (stored(folder / f"unseen_mine_{of}.jsonl") for of in ("alone", "runs"))
    (of_size,) = results(alone, runs)["sizes"].values()  # there are no three concepts
    rows = of_size["rows"]
    for kind in ("seen", "new words"):
        assert set(rows["base"][kind]) >= {"likeness", "dino", "text"}
        assert rows["single"][kind]["likeness"]["mean"] > rows["base"][kind]["likeness"]["mean"]
    assert rows["base"]["no trigger"]["likeness"]["mean"] == pytest.approx(1)
    assert rows["iteris"]["no trigger"]["pixels"]["mean"] > 0

    own = tmp_path / "plainly"
    own.mkdir()
    (own / "method.py").write_text(METHOD)
    (own / "settings.json").write_text('{"method": "average"}')
    run(monkeypatch, unseen, "--world", file, "--methods", "iteris,average", "--own", own)
    theirs = results(alone, stored(folder / "unseen_mine_runs.jsonl"))["sizes"]["2"]["rows"]
    assert theirs[f"{own}:method=average"]["new words"] == rows["average"]["new words"]
    page = (tmp_path / "build" / "standings_mine.html").read_text()
    assert "LoRAs of mine" in page
    assert "plainly:method=average, n = 1" in page
    assert "likeness by DINO" in page
    assert "backgrounds" not in page


def changed_concept(**keys):
    first, second = described()["concepts"]
    return [first | keys, second]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"new": None}, r"mine\.yaml: the key 'new' is missing"),
        ({"news": ["a {}"]}, r"there is no key 'news'.* 'new'"),
        ({"base": "nowhere"}, "The base 'nowhere' does not exist"),
        (
            {"concepts": changed_concept(references=None)},
            "concepts: sks1: the key 'references' is missing",
        ),
        ({"concepts": described()["concepts"][:1]}, "concepts must be two or more"),
        ({"seen": ["a star"]}, r"seen: 'a star' must hold \"\{\}\""),
        ({"new": ["a {} and a {} by night"]}, "new: 'a {} and a {} by night' must hold"),
        ({"new": ["{} on a white background"]}, "has no word that the templates of seen lack"),
        ({"plain": ["a {}"]}, r"plain: 'a \{\}' must not hold"),
        ({"plain": ["a sks4 circle"]}, "plain: 'a sks4 circle' has the trigger 'sks4'"),
        ({"drawing": {"step": 4}}, "drawing: .*'step'"),
        ({"drawing": 4}, "drawing must be a mapping, not 4"),
        ({"offload": "models"}, "offload must be model or sequential, not 'models'"),
        ({"concepts": changed_concept(kind="style")}, "sks1: only subjects are measured"),
        ({"concepts": changed_concept(references=str(LORAS))}, "nor a folder of images"),
        ({"calibration": {"samples": 0}}, "calibration: samples"),
        ({"dino": "none"}, "The DINO model 'none' cannot be loaded"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(tmp_path, changed, said):
    with pytest.raises(SystemExit, match=said) as found:
        world_of(str(written(tmp_path, **changed)))
    assert "\n" not in str(found.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"none\.yaml does not exist"):
        world_of(str(tmp_path / "none.yaml"))
    with pytest.raises(SystemExit, match=r"There is no world 'toybocks'; give toybox, .*\.yaml"):
        world_of("toybocks")
    concepts = changed_concept(file="sks1.safetensors")
    with pytest.raises(SystemExit, match=r"sks1\.safetensors"):
        world_of(str(written(tmp_path, concepts=concepts)))


def test_a_folder_without_a_method_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"method\.py is missing"):
        loaded(tmp_path)
    (tmp_path / "method.py").write_text("merged = 1")
    with pytest.raises(SystemExit, match="no function merge"):
        loaded(tmp_path)
