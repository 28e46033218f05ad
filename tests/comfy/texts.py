"""English texts of the nodes, as their schemas have them: ``locales/en`` and the help pages.

``COMFYUI_PATH=… pytest tests/comfy/test_texts.py`` holds the files against them; with
``WRITE_TEXTS=1`` it writes them. Other languages are translated by hand, but for lists of methods;
the tables of their help pages come from their locales.
"""

import importlib
import re

HEADINGS = {
    "en": (("inputs", "input", "what it is"), ("outputs", "output", "what it is")),
    "zh": (("inputs", "输入", "说明"), ("outputs", "输出", "说明")),
}
_LIST = re.compile(r"\([a-z][a-z+-]+(?: [\d.]+)?(?:, [a-z][a-z+-]+(?: [\d.]+)?){2,}\)")
_KEPT = re.compile(r"%\w+%|NAME(?:\.\w+)+|models/\w+|\bLORA_STACK\b|\b\d+(?:\.\d+)?(?:e-\d+)?")
"""What every language writes alike: places, files and figures."""


def schemas(pack):
    nodes = importlib.import_module(f"{pack.__name__}.nodes")
    return [node.define_schema() for node in nodes.NODES]


def english(pack):
    """``locales/en/nodeDefs.json``"""
    return {
        schema.node_id: {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {
                i.id: {"name": i.display_name or i.id, "tooltip": i.tooltip} for i in schema.inputs
            },
            "outputs": {
                str(index): {"name": output.display_name, "tooltip": output.tooltip}
                for index, output in enumerate(schema.outputs)
            },
        }
        for schema in schemas(pack)
    }


def with_tables(page, texts, language="en"):
    """A help page with the tables of inputs and outputs that ``texts`` say; of the rows of a node
    the first stands for all."""
    for part, heading, what in HEADINGS[language]:
        shown = {
            key: t for key, t in texts[part].items() if not re.fullmatch(r".*_([2-9]|\d\d)", key)
        }
        rows = [f"| `{t['name']}` | {t['tooltip']} |" for t in shown.values()]
        table = "\n".join([f"| {heading} | {what} |", "|---|---|", *rows, ""])
        page = re.sub(rf"\| {heading} \| {what} \|\n(\|.*\n)*", lambda _, t=table: t, page)
    return page


def texts_of(node):
    """Every text of a node, by where it stands."""
    found = {name: node[name] for name in ("display_name", "description")}
    for part in ("inputs", "outputs"):
        for key, texts in node[part].items():
            found |= {f"{part} {key} {field}": text for field, text in texts.items()}
    return found


def lost(original, translated):
    """What stands in a text and not in its translation, of what is not translated."""
    return [word for word in _KEPT.findall(original) if word not in translated]


def with_lists(node, original):
    """A translated node with the lists of methods that the ``original`` has."""
    made = {**node}
    for part in ("inputs", "outputs"):
        made[part] = {
            key: {**texts, "tooltip": _listed(texts["tooltip"], original[part][key]["tooltip"])}
            for key, texts in node[part].items()
        }
    return made


def _listed(text, original):
    found = _LIST.search(original)
    return _LIST.sub(lambda _: found[0], text) if found else text
