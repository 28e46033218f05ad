"""The page of results tells of every world whose file is there, and says first where we lose."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from statistics import stdev

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import markdown_tables
import result_plots
import result_worlds
import results_page
import tables_grid
import tables_pairs
import tables_protocol
from protocol.plan import Unit
from protocol.table import Table


def value(mean: float, se: float | None = 0.01, **more) -> dict:
    return {"mean": mean, "se": se, **more}


def row(image: float, text: float, scr: float) -> dict:
    return {"image": value(image), "text": value(text), "scr": value(scr), "seconds": 3.0}


REPORTED = {
    "default": "iteris",
    "regimes": {
        "default": {
            "3": {
                "single": row(0.9, 0.7, 0.0),
                "base": row(0.4, 0.7, 1.0),
                "iteris": row(0.8, 0.6, 0.2),
                "ssr": row(0.7, 0.65, 0.1),
            }
        },
        "few": {},
    },
    "together": {"default": {"3": {"iteris": {"success": value(0.5, None)}}}},
    "styles": {},
}


@pytest.fixture
def found(tmp_path, monkeypatch):
    (tmp_path / "reported.json").write_text(json.dumps(REPORTED))
    for module in (markdown_tables, result_worlds, results_page):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return result_worlds.worlds()


def test_a_world_is_told_of_as_soon_as_its_file_is_there(found):
    assert [world.key for world in found] == ["reported-default", "reported-default-together"]
    text = results_page.page(found)
    assert "| **iteris** | .800 ± .010 | .600 ± .010 | .200 ± .010 |" in text
    assert "| **iteris** | .500 |" in text


def test_what_is_lost_stands_before_all_else(found):
    text = results_page.page(found)
    lost = text[text.index("## Where we lose") : text.index("And those in which")]
    assert "| 3 | text alignment | ssr | .650 | .600 |" in lost
    assert "| 3 | share of concepts that collapsed (SCR) | ssr | .100 | .200 |" in lost
    assert "| 3 | image alignment |" not in lost
    assert text.index("## Where we lose") < text.index(f"## {found[0].title}\n")


def test_a_lead_within_its_error_is_said(monkeypatch, found):
    rows = found[0].groups["3"]
    monkeypatch.setitem(rows["ssr"], "image", value(0.79))
    text = results_page.page(found)
    close = text[text.index("And those in which") : text.index(f"## {found[0].title}\n")]
    assert "| 3 | image alignment | ssr | .790 | .800 |" in close


def test_a_plot_is_drawn_again_only_for_other_figures(tmp_path, found):
    [plot, *_] = results_page.plots_of(found[0])
    assert result_plots.renew([plot], tmp_path, write=True) == [plot.name]
    first = (tmp_path / plot.name).read_bytes()
    assert result_plots.renew([plot], tmp_path, write=True) == []
    plot.save(tmp_path)
    assert (tmp_path / plot.name).read_bytes() == first
    found[0].groups["3"]["iteris"]["image"]["mean"] = 0.81
    [other, *_] = results_page.plots_of(found[0])
    assert result_plots.renew([other], tmp_path, write=False) == [plot.name]


def test_an_interval_of_the_file_goes_before_one_by_its_error(found):
    found[0].groups["3"]["iteris"]["image"]["interval"] = [0.7, 0.95]
    [plot, *_] = results_page.plots_of(found[0])
    bars = plot.figures["groups"]["3"]
    assert bars["iteris"]["interval"] == [0.7, 0.95]
    assert bars["ssr"]["interval"] == pytest.approx([0.7 - 0.0196, 0.7 + 0.0196])


def test_two_sets_have_no_interval(found):
    of = found[0].groups["3"]["iteris"]["image"]
    of |= {"interval": [0.1, 1.5], "n": 2}
    [plot, *_] = results_page.plots_of(found[0])
    assert plot.figures["groups"]["3"]["iteris"]["interval"] == [of["mean"]] * 2
    of["n"] = 3
    [plot, *_] = results_page.plots_of(found[0])
    assert plot.figures["groups"]["3"]["iteris"]["interval"] == [0.1, 1.5]


def behind(ahead: float) -> dict:
    return {"image": value(ahead, 0.02, n=3), "text": value(-ahead, None, n=3)}


@pytest.fixture
def results(tmp_path, monkeypatch):
    for module in (markdown_tables, results_page):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return tmp_path


def test_the_grid_s_table_has_what_is_measured_of_it(results):
    rows = {name: row(0.8, 0.7, 0.1) for name in ("single", "base", "iteris", "ssr")}
    for some in rows.values():
        for column in ("image", "text"):
            some[column] |= {"interval": None, "n": 1}
    near = {**rows, "ssr": rows["ssr"] | {"behind": behind(-0.05)}}
    grid = {"1 x 1": {"2": near, "10": rows}, "50 x 4": {"2": {"single": rows["single"]}}}
    (results / "reported_grid.json").write_text(json.dumps({"grid": grid}))
    text = results_page.page([])
    assert "| 2 | 1 x 1 | .800 ± .010 |  | .800 ± .010 | -.050 ± .020 | .700 ± .010 |" in text
    assert "| 10 | 1 x 1 | .800 ± .010 |  | .800 ± .010 |  | .700 ± .010 |" in text
    assert "50 x 4 |" not in text
    groups = [plot.figures["groups"] for plot in tables_grid.plots()]
    assert [list(some) for some in groups] == [["1 x 1"]] * 2


def test_two_in_one_picture_is_held_against_the_better_rival(results):
    shares = {
        "iteris": [0.4, 0.5],
        "iteris, polished": [0.6, 0.7],
        "regmean++": [0.5, 0.4],
        "ssr": [0.3, 0.3],
        "composite": [0.8, 0.8],
        "base": [0.3, 0.2],
    }
    runs = {name: {"pair": values, "halves": values} for name, values in shares.items()}
    runs["ties"] = {"pair": [0.1, 0.1]}
    (results / tables_pairs.FILE).write_text(json.dumps({"2": {"runs": runs}}))
    text = results_page.page([])
    # Polished is ahead of RegMean++ by .1 and .3, and has .65 of .8.
    row = "| .250 ± .050 | +.000 ± .100 | +.200 ± .100 | .56 | .81 |"
    assert text.count(row) == 2
    plot, _ = tables_pairs.plots()
    bar = plot.figures["groups"]["2"]["iteris, polished"]
    assert bar["mean"] == pytest.approx(0.65)
    assert bar["interval"] == pytest.approx([0.65 - 1.96 * 0.05, 0.65 + 1.96 * 0.05])


def test_the_protocol_s_tables_have_what_is_measured(results):
    first, second = row(0.8, 0.6, 0.2), row(0.7, 0.65, 0.1) | {"behind": behind(0.1)}
    for some in (first, second):
        some |= {"rank": 16.0, "bytes": 2.0**20}
    rows = {
        "iteris": first,
        "iteris-polished": first | {"behind": behind(-0.1)},
        "ssr": second,
        "ties": first | {"behind": behind(0.2)},
    }
    ten = {name: rows[name] for name in ("iteris", "ssr")}
    data = {
        "regimes": {"default": {"2": {"iteris": first}, "10": ten}},
        "settings": {
            "ssr": {
                "default": {
                    "2": {"settings": {"ridge": 1e-4}, "searched": True},
                    "10": {"settings": {"ridge": 1e-2}, "searched": False},
                }
            }
        },
    }
    (results / "reported.json").write_text(json.dumps(data))
    assert tables_protocol.nearest(rows) == ("ssr", behind(0.1))
    assert tables_protocol.nearest({"iteris": first}) is None
    made = {name: make() for name, make in tables_protocol.TABLES.items()}
    assert made["reported image default"][2:] == [
        "| **iteris** | .800 ± .010 | .800 ± .010 |",
        "| ssr |  | .700 ± .010 |",
    ]
    assert made["reported leads"][2] == (
        "| 50 prompts, four timesteps | 10 | ssr | +.100 ± .020 | -.100 | 3 |"
    )
    assert made["reported cost"][2:] == [
        "| **iteris** | 3.0 | 3.0 | 16 | 1.00 |",
        "| ssr |  | 3.0 | 16 | 1.00 |",
    ]
    assert made["reported settings"][2:] == [
        "| ssr | 50 prompts, four timesteps | ridge 0.0001 |  |"
    ]


def test_methods_are_compared_on_the_sets_that_both_have():
    likeness = {"iteris": (0.9, 0.8, 0.1), "average": (0.7, 0.5), "ties": (0.6, 0.6, 0.05)}
    known, plan = {}, []
    for method, values in likeness.items():
        for replicate, value in enumerate(values):
            unit = Unit(method, ("s0", "s1"), replicate=replicate)
            known[unit.key] = {
                "alone": [["s0", {"image": value}, 0.7]],
                "together": [[["s0", "s1"], [{"image": value}, None], 0.7]],
                **{"seconds": 1.0, "rank": 8, "bytes": 1000},
            }
            plan.append(unit)
    rows = Table(plan, known, (0.5,)).figures()["regimes"]["default"]["2"]
    assert "behind" not in rows["iteris"]
    behind = rows["average"]["behind"]["image"]
    assert (behind["mean"], behind["se"], behind["n"]) == pytest.approx((0.25, 0.05, 2))
    # By means over all sets the average, of which the third is missing, would be level with ours.
    world = result_worlds.World("fake", "Fake", "", {"2": rows})
    image = next(against for against in world.compared() if against.column == "image")
    assert image.method == "ties"
    assert (image.theirs, image.ours) == pytest.approx((1.25 / 3, 0.6))
    assert (image.ahead, image.error) == pytest.approx((0.55 / 3, stdev((0.3, 0.2, 0.05)) / 3**0.5))
    plain = {name: {"image": row["image"]} for name, row in rows.items()}
    image = next(result_worlds.World("fake", "Fake", "", {"2": plain}).compared())
    assert image.method == "average"
    assert image.ahead == pytest.approx(0)
    assert image.error == pytest.approx(math.hypot(plain["iteris"]["image"]["se"], 0.1))
