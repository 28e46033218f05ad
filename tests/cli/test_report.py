import json
from dataclasses import replace

from oracle import ModuleHost, Net, make_data, make_lora

from iteris_core import Concept, Lora, merge_loras
from iteris_core.passes.report import MergeReport, SiteReport


def report():
    concepts = [Concept(make_lora(i), prompts=["unused"], trigger=f"s{i}") for i in (1, 2)]
    settings = {"schedule": "jacobi", "iterations": 4}
    return merge_loras(ModuleHost(Net(), make_data(2)), concepts, settings=settings).report


def test_a_report_says_what_happened_in_words_and_as_data():
    found = report()
    assert len(found.convergence) == 3
    data = json.loads(json.dumps(found.to_dict()))
    assert set(data["residuals"]) == {"s1", "s2"}
    for before, after in found.residuals():
        assert 0 < after < before
    assert "Merged 2 concepts with iteris: 7 sites" in found.summary()
    assert found.verdict() in found.summary()
    assert data["verdict"] == found.verdict()
    assert "%" not in found.summary()


def test_the_verdict_names_the_lora_that_is_kept_least():
    sites = {
        "unet.down_blocks.0.a": SiteReport(1, (0.5, 0.5), (1.0, 1.0), (0.1, 0.2)),
        "unet.up_blocks.1.a": SiteReport(1, (0.5, 0.5), (1.0, 1.0), (0.5, 0.9)),
    }
    found = MergeReport("iteris", ["cat", "dog"], sites, 1.0)
    good = "Closer to what every LoRA does than the mean of the LoRAs is; least so for dog."
    assert found.verdict() == good
    assert replace(found, calibration={"samples": 12}, convergence=(1e-4,)).verdict() == good
    assert MergeReport("average", ["cat"], {}, 1.0).verdict().startswith("Not measured by average")


def test_the_verdict_says_what_is_wrong_and_what_to_do():
    site = SiteReport(1, (0.5, 0.5), (1.0, 0.5), (0.1, 0.48))
    found = MergeReport("iteris", ["cat", "dog"], {"unet.a": site}, 1.0)
    assert found.verdict().startswith("Closer")
    far = replace(site, after=(0.1, 0.6))
    for of, advice in (
        (replace(found, sites={"unet.a": far}), "Use more samples, fewer LoRAs"),
        (replace(found, sites={"unet.a": far}, settings={"ridge": 0.01}), "Lower ridge"),
        (replace(found, sites={"unet.a": replace(far, truncated=0.3)}), "Raise rank"),
    ):
        assert of.verdict().startswith(f"No closer to dog than the mean of the LoRAs. {advice}")
    few = replace(found, calibration={"samples": 3})
    assert few.verdict().startswith("Too few prompts: 3 per LoRA")
    both = replace(few, convergence=(0.5,), lacks=["2 tensors of cat"]).verdict()
    assert both.startswith("Incomplete: the merge lacks 2 tensors of cat. Not converged")
    assert both.endswith(few.verdict())


def test_the_verdict_is_what_held_out_rows_keep():
    site = SiteReport(1, (0.5, 0.5), (1.0, 0.5), (0.1, 0.2))
    found = MergeReport("iteris", ["cat", "dog"], {"unet.a": site}, 1.0)
    beside = "beside another LoRA"
    good = replace(found, kept={"0.75": (0.7, 0.5), "1": (0.8, 0.6), beside: (0.6, 0.5)})
    assert good.verdict() == (
        "Kept on held-out rows (1: each LoRA alone, 0: the base): 0.70 at strength 1, 0.60 at "
        f"strength 0.75, 0.55 {beside}, least of dog."
    )
    assert good.strengths == (0.75, 1.0)
    brittle = replace(good, kept={**good.kept, "1.25": (0.9, -0.4), beside: (0.1, -0.3)})
    assert brittle.verdict().startswith(f"Brittle {beside} and at strength 1.25. The method")
    assert brittle.strengths == (0.75, 1.0)
    little = replace(good, kept={"1": (0.5, 0.1), beside: (0.0, 0.0)})
    assert little.verdict() == (
        "Weak: on new prompts little is left of the LoRAs, least of dog. Use more samples, fewer "
        "LoRAs or more weight."
    )
    for found in (little, brittle, good):  # the figures once, below what they mean
        lines = found.summary().splitlines()
        assert [line.startswith("  Kept on held-out rows") for line in lines].count(True) == 1
        assert lines[1] == f"  {found.verdict()}"
    assert little.strengths is None


def test_outputs_that_are_not_numbers(tmp_path):
    """The merge was lost, because there is no lowest strength."""
    found = MergeReport("iteris", ["cat", "dog"], {"unet.a": SiteReport(1)}, 1.0)
    nan = float("nan")
    for kept, where in (
        ({"1": (nan, 0.5), "1.25": (nan, nan)}, "at strength 1 and at strength 1.25"),
        ({"1": (0.5, 0.9), "1.25": (nan, nan)}, "at strength 1.25"),
    ):
        broken = replace(found, kept=kept)
        told = f"Broken {where}: the model's outputs are not numbers."
        assert broken.verdict().startswith(told)
        assert told in broken.summary()
        assert broken.strengths == ((1.0, 1.0) if kept["1"] == (0.5, 0.9) else None)
        json.dumps(broken.to_dict(), allow_nan=False)


def test_the_verdict_in_a_word_comes_first():
    """As good as the LoRA that is kept least, and as the use in which least is kept."""
    site, beside = SiteReport(1, (0.5, 0.5), (1.0, 0.5), (0.1, 0.2)), "beside another LoRA"
    found = MergeReport("iteris", ["cat", "dog"], {"unet.a": site}, 1.0)
    for kept, word in (
        ({"1": (0.8, 0.6)}, "Strong: 0.70 of what each LoRA does is kept on new prompts, least of"),
        ({"1": (0.9, 0.5), beside: (0.1, 0.2)}, "Fair: 0.70 of what each LoRA does is kept"),
        ({"1": (1.0, 0.3)}, "Fair: 0.65 of"),
        ({"1": (0.6, 0.5)}, "Fair: 0.55 of"),
        ({"1": (0.5, 0.1)}, "Weak: 0.30 of"),
    ):
        line = replace(found, kept=kept).headline()
        assert line.startswith(word)
        assert "\n" not in line
    weak = replace(found, kept={"1": (0.5, 0.1)}).headline()
    assert weak.count("Weak") == 1
    assert "Use more samples" in weak
    lacking = replace(found, kept={"1": (0.8, 0.8)}, lacks=["2 tensors of cat"]).headline()
    assert lacking.startswith("Fair: 0.80")
    assert "Incomplete: the merge lacks 2 tensors of cat." in lacking
    assert replace(found, method="average", sites={}).headline().startswith("Not measured")
    broken = replace(found, kept={"1": (float("nan"), 0.9)}).headline()
    assert broken.startswith("Weak")
    assert "not numbers" in broken


def test_one_lora_is_not_compared_with_its_own_mean():
    """Beside one that is always on, at weight 0 or without a LoRA."""
    own = Concept(make_lora(1), prompts=["unused"], trigger="cat")
    base = Concept.preserve(["unused"])
    on = Concept(make_lora(2), trigger="fast", always_on="include")
    for others, data in (
        ([on], [0]),
        ([replace(on, always_on="no", weight=0)], [0]),
        ([base], [0, 1]),
    ):
        inputs = make_data(2)
        host = ModuleHost(Net(), [inputs[i] for i in data])
        found = merge_loras(host, [own, *others]).report
        assert found.verdict() == "cat is the only LoRA that is merged."
        assert found.summary().startswith("Merged 1 concept with iteris")


def test_a_lora_that_changes_nothing_or_was_read_in_part_is_named():
    none = Lora({site: change.scaled(0.0) for site, change in make_lora(2).sites.items()})
    part = replace(make_lora(1), left_out=2)
    concepts = [Concept(part, trigger="cat"), Concept(none, trigger="dog")]
    assert merge_loras(None, concepts, "average").report.verdict() == (
        "Incomplete: the merge lacks 2 tensors of cat and all of dog, whose LoRA changes nothing."
    )


def test_what_was_not_measured_is_null_in_json():
    """Of a method that only looks at weights there is no error."""
    report = merge_loras(None, [Concept(make_lora(seed)) for seed in (1, 2)], "sum").report
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["residuals"]["lora-1"] == {"before": None, "after": None}
