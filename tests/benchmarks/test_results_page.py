"""The results page: its verdicts, and the list of where IterIS is behind."""

from __future__ import annotations

import json

import markdown_tables
import pytest
import results_page
from result_plot import Plot


def figure(mean: float, wide: float | None = 0.02, n: int = 3) -> dict:
    interval = None if wide is None else [mean - wide, mean + wide]
    return {"mean": mean, "interval": interval, "n": n}


def lead(mean: float, wide: float | None = 0.02) -> dict:
    verdict = "unknown" if wide is None else "level"
    if wide is not None and abs(mean) > wide:
        verdict = "first" if mean > 0 else "behind"
    return {**figure(mean, wide), "verdict": verdict}


def of_size(wide: float | None = 0.02) -> dict:
    """IterIS .7 in likeness; Chain of Merges .6, and behind it in attributes; the average .4."""
    names = {"iteris": 0.7, "chain-of-merges": 0.6, "average": 0.4, "sum": 0.1, "base": 0.5}
    names["regmean++:contexts=0:generic=0"] = 0.5
    rows = {
        name: {
            "new words": {"likeness": figure(of), "judge": figure(of), "likeness kept": figure(of)}
        }
        for name, of in names.items()
    }
    against = {
        name: {"new words": {"likeness": lead(0.7 - of, wide), "judge": lead(-0.05, wide)}}
        for name, of in names.items()
        if name != "iteris"
    }
    return {"rows": rows, "against": against}


def styled() -> dict:
    names = {"iteris": 0.5, "sum": 0.6, "iteris:composites=0": 0.9, "base": 0.95}
    return by_kind(names, {"styled": ("judge", "style"), "subject": ("judge",)})


def in_one_picture() -> dict:
    names = {"iteris": 0.5, "regmean++": 0.6, "iteris:block_steps=120": 0.7, "composite": 0.9}
    return by_kind(names, {"pair": ("right",), "halves": ("right",)})


def at_strengths() -> dict:
    kept = {"iteris": (0.5, -0.2), "single": (0.9, 0.7)}
    return {
        f"{name}:strength={strength}": {"new words": {"likeness kept": figure(mean)}}
        for name, means in kept.items()
        for strength, mean in zip(("1.25", "1.5"), means, strict=True)
    }


def by_kind(names: dict, kinds: dict) -> dict:
    return {
        "rows": {
            name: {
                kind: {column: figure(of) for column in columns} for kind, columns in kinds.items()
            }
            for name, of in names.items()
        },
        "against": {
            name: {
                kind: {column: lead(-0.1) for column in columns} for kind, columns in kinds.items()
            }
            for name in names
            if name != "iteris"
        },
    }


@pytest.fixture
def results(tmp_path, monkeypatch):
    files = {
        "unseen_reported.json": {"default": "iteris", "sizes": {"3": of_size(), "10": of_size()}},
        **{
            f"unseen_{kind}.json": {"default": "iteris", "sizes": {"3": of_size()}}
            for kind in ("rank_2", "rank_64", "kohya")
        },
        "two_in_one.json": {"default": "iteris", "sizes": {"2": in_one_picture()}},
        "unseen_emoji.json": {"default": "iteris", "sizes": {"2": of_size()}},
        "unseen_twenty.json": {"default": "iteris", "sizes": {"20": of_size(None)}},
        "unseen_reported_few.json": {"default": "iteris", "sizes": {"3": of_size()}},
        "unseen_styles.json": {"default": "iteris", "sizes": {"2": styled()}},
        "strengths.json": {"sizes": {"3": {"rows": at_strengths()}}},
        "language.json": {
            "sum": {
                "iteris": 2.7,
                "iteris-shrink": 2.8,
                "regmean": 2.79,
                "ssr": 2.6,
                "linear": 2.75,
            }
        },
    }
    for name, data in files.items():
        (tmp_path / name).write_text(json.dumps(data))
    monkeypatch.setattr(markdown_tables, "RESULTS", tmp_path)
    return tmp_path


def test_a_verdict_is_against_the_likest_rival_and_has_its_interval_and_n(results):
    rows = results_page.verdicts()
    first = "| 3 LoRAs | Chain of Merges | first (+.100 ± .020) | behind (-.050 ± .020) | 3 |"
    assert rows[2] == first
    assert first.replace("3 LoRAs", "3 LoRAs of rank 64") in rows
    assert "| 20 LoRAs | Chain of Merges | +.100 | -.050 | 3 |" in rows
    assert first.replace("3 LoRAs", "2 LoRAs of emoji") in rows


def test_neither_the_base_nor_a_variant_of_ours_is_a_rival(results):
    rows = [row for row in results_page.verdicts() if row.startswith("| subject")]
    assert len(rows) == 3
    assert all("| all loaded at once |" in row for row in rows)
    assert "level" not in "".join(rows)
    (halves,) = (row for row in results_page.verdicts() if "a prompt for each" in row)
    assert halves.startswith("| two in one picture, a prompt for each | RegMean++ |")


def test_what_is_behind_is_named_with_the_rival_and_the_number(results):
    lines = list(results_page.behind())
    attributes = next(line for line in lines if line.startswith("**Attributes**"))
    assert "Chain of Merges by .050 at 3, .050 at 10" in attributes
    assert "base" not in attributes
    assert not any(line.startswith("**Likeness**") for line in lines)
    assert lines[-2].endswith("keeps 90% at 1.25 and 70% at 1.5, IterIS 50% and -20%.")
    assert lines[-1].endswith("RegMean 2.790, the average 2.750.")


def test_a_plot_is_drawn_again_only_for_other_figures(tmp_path):
    points = [(2, 0.9, 0.8, 1.0), (10, 0.7, 0.6, 0.8)]
    plot = Plot([("ours", points)], [(2, "2"), (10, "10")], ("x", "y"), 0.0)
    path = tmp_path / "plot.svg"
    assert not plot.is_at(path)
    plot.save(path)
    first = path.read_bytes()
    assert plot.is_at(path)
    plot.save(path)
    assert path.read_bytes() == first
    other = Plot([("ours", points[:1])], plot.ticks, plot.labels, 0.0)
    assert not other.is_at(path)
