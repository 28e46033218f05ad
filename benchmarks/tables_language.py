"""Tables of language models and captions (see :mod:`tables`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from markdown_tables import cell, lines, load, short

TASKS = ("Emoint", "EC", "TEC", "ISEAR")
METHODS = {
    "alone": "each LoRA alone",
    "base": "without a LoRA",
    "praising alone": "praising LoRA alone",
    "grumbling alone": "grumbling LoRA alone",
    "linear": "linear",
    "task-arithmetic": "task arithmetic (0.4)",
    "ties": "TIES",
    "dare": "DARE (0.4)",
    "regmean": "RegMean (0.9)",
    "ssr": "SSR",
    "iteris-paper": "Algorithm 1 as in the paper",
    "iteris": "**IterIS**, defaults",
    "iteris-shrink": "IterIS, `shrink=0.5`",
}
GLUE_TASKS = ("entailment", "paraphrase", "acceptability", "topic", "sentiment")
GLUE_METHODS = {
    **METHODS,
    "alone": "each LoRA alone",
    "without": "its head, without a LoRA",
    "dare": "DARE",
    "regmean": "RegMean",
    "regmean++": "RegMean++",
}
IN_TUNING = {"average": "linear", "regmean": "RegMean", "ssr": "SSR", "iteris": "IterIS"}


def captions() -> list[str]:
    methods = load("captions.json")["methods"]
    columns = ("praising", "grumbling", "cider", "bleu-1", "bleu-4")
    rows = [
        (label, *(cell(methods[name][column]) for column in columns))
        for name, label in METHODS.items()
        if name in methods
    ]
    return lines(("method", "praising", "grumbling", "CIDEr", "BLEU-1", "BLEU-4"), rows)


def emotions() -> list[str]:
    """The best sum first."""
    data = load("language.json")
    sums, errors = data["sum"], data["standard_error"]
    rows = [
        (
            METHODS[name],
            *(short(f"{data['tasks'][name][task]:.3f}") for task in TASKS),
            cell({"mean": sums[name], "se": errors.get(name)}),
        )
        for name in sorted(sums, key=lambda name: -sums[name])
    ]
    return lines(("method", *TASKS, "sum"), rows)


def tuning() -> list[str]:
    rows: list[tuple[str, str]] = []
    for merge in load("language_tuning.json")["merges"]:
        said = "".join(f", `{name}={value}`" for name, value in merge["settings"].items())
        label = IN_TUNING[merge["method"]] + (said or (", defaults" if said == "" else ""))
        rows.append((label, cell({"mean": merge["sum"], "se": merge["standard_error"]})))
    return lines(("method", "sum of three"), rows)


def _ablation(name: str, first: str) -> list[str]:
    values = load("language_ablations.json")[name]
    return lines((first, *values), [("sum", *(f"{value:.3f}" for value in values.values()))])


def ridge() -> list[str]:
    data = load("language_ablations.json")["ridge"]
    labels = {"output": "`output`, sweep, repair", "adapter": "`adapter`, sweep"}
    rows = [(labels[kind], *(f"{v:.3f}" for v in some.values())) for kind, some in data.items()]
    return lines(("ridge", *(f"{float(value):g}" for value in data["output"])), rows)


def weighting() -> list[str]:
    data = load("language_ablations.json")
    ours, paper = data["weighting"], data["weighting of the paper's settings"]
    rows = [
        ("`output`, sweep, repair", *(f"{value:.3f}" for value in ours.values())),
        (
            "the paper's settings, 10 solves",
            *(f"{paper[n]:.3f}" if n in paper else "" for n in ours),
        ),
    ]
    return lines(("weighting", *(n.replace("adapter", "adapter (eq. 8)") for n in ours)), rows)


def glue(tasks: int, samples: int) -> list[str]:
    """The best sum first; what no merge is, before. The last column leaves out acceptability, whose
    metric alone is Matthews' correlation."""
    data = load("glue.json")
    merged = data["merged"][str(tasks)][str(samples)]
    rows = [
        (
            GLUE_METHODS[name],
            *(short(f"{data[name][task]:.3f}") for task in GLUE_TASKS),
            short(f"{sum(data[name].values()):.3f}"),
            _without_acceptability(data[name]),
        )
        for name in ("alone", "without")
    ]
    for name in sorted(merged, key=lambda name: -merged[name]["sum"]["mean"]):
        of_tasks = (short(f"{merged[name]['tasks'][task]:.3f}") for task in GLUE_TASKS)
        four = _without_acceptability(merged[name]["tasks"])
        rows.append((GLUE_METHODS[name], *of_tasks, cell(merged[name]["sum"]), four))
    return lines(("method", *GLUE_TASKS, "sum", "four others"), rows)


def _without_acceptability(tasks: Mapping[str, float]) -> str:
    return short(f"{sum(value for task, value in tasks.items() if task != 'acceptability'):.3f}")


def glue_without(what: str) -> list[str]:
    """The paper's tables 9 and 10: two figures a pair."""
    data = load("glue.json")[what]
    labels = {"paper": "Algorithm 1", "defaults": "IterIS, defaults"}
    rows = []
    for name, pairs in data.items():
        kind, _, how = name.partition(", ")
        pair = (", ".join(f"{v:.3f}" for v in found.values()) for found in pairs.values())
        rows.append((f"{labels[kind]}, {how} {what}", *map(short, pair)))
    return lines(("settings", *next(iter(data.values()))), rows)


def glue_settings() -> list[str]:
    """What the rivals were given."""
    found = load("glue_tuning.json")
    rows = [
        (
            GLUE_METHODS[name],
            *(
                ", ".join(f"`{n}={v}`" for n, v in found[k][name]["settings"].items()) or "none"
                for k in ("2", "5")
            ),
        )
        for name in found["5"]
    ]
    return lines(("method", "two tasks", "five tasks"), rows)


TABLES: dict[str, Callable[[], list[str]]] = {
    "captions": captions,
    "emotions": emotions,
    "emotions, tuning": tuning,
    "emotions, iterations": lambda: _ablation(
        "iterations", "iterations after the first solve, the paper's settings"
    ),
    "emotions, ridge": ridge,
    "emotions, samples": lambda: _ablation("samples", "samples a task, defaults"),
    "emotions, weighting": weighting,
    "glue, five": lambda: glue(5, 50),
    "glue, five from few": lambda: glue(5, 5),
    "glue, pairs": lambda: glue(2, 50),
    "glue, pairs from few": lambda: glue(2, 5),
    "glue, ridge": lambda: glue_without("ridge"),
    "glue, balance": lambda: glue_without("balance"),
    "glue, settings": glue_settings,
}
