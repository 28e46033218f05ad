"""Locales and help pages match the nodes; see texts.py."""

import json
import os
import re
from pathlib import Path

import pytest
from texts import english, lost, schemas, texts_of, with_lists, with_tables

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("zh", "ja", "ko", "fr", "de", "es", "ru")


def expect(path, text):
    if os.environ.get("WRITE_TEXTS"):
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text, "run this again with WRITE_TEXTS=1"


def test_english_comes_from_the_nodes(pack):
    texts = english(pack)
    expect(
        ROOT / "locales" / "en" / "nodeDefs.json",
        json.dumps(texts, indent=1, ensure_ascii=False) + "\n",
    )
    for name, node in texts.items():
        page = ROOT / "web" / "docs" / f"{name}.md"
        expect(page, with_tables(page.read_text(encoding="utf-8"), node))


@pytest.mark.parametrize("language", ["en", *LANGUAGES])
def test_no_text_is_read_as_a_placeholder(language):
    """Texts are messages of vue-i18n: for one that it cannot read no node is drawn (Nodes 2.0)."""
    for name in ("nodeDefs", "main"):
        file = ROOT / "locales" / language / f"{name}.json"
        assert not re.findall(r'": "[^"]*[{}|@][^"]*"', file.read_text(encoding="utf-8"))


def test_defaults_are_within_their_limits(pack):
    for schema in schemas(pack):
        for shown in schema.inputs:
            if getattr(shown, "max", None) is not None:
                assert shown.min <= shown.default <= shown.max, (schema.node_id, shown.id)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_language_has_every_text(pack, language):
    """With the same keys, names of files and inputs, and figures."""
    texts, folder = english(pack), ROOT / "locales" / language
    found = json.loads((folder / "nodeDefs.json").read_text(encoding="utf-8"))
    assert list(found) == list(texts)
    for name, node in texts.items():
        for part in ("inputs", "outputs"):
            assert list(found[name][part]) == list(node[part]), name
        found[name] = with_lists(found[name], node)
        translated = texts_of(found[name])
        for where, text in texts_of(node).items():
            assert translated[where].strip(), (name, where)
            assert lost(text, translated[where]) == [], (name, where)
    expect(folder / "nodeDefs.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    categories = json.loads((folder / "main.json").read_text(encoding="utf-8"))
    assert set(categories["nodeCategories"]) == {
        part for schema in schemas(pack) for part in schema.category.split("/")
    }


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_language_is_not_left_in_english(pack, language):
    texts = english(pack)
    found = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    for name, node in texts.items():
        translated = texts_of(found[name])
        sentences = {where: text for where, text in texts_of(node).items() if len(text) > 25}
        assert all(translated[where] != text for where, text in sentences.items()), name


def test_help_in_chinese_has_the_locale_s_tables(pack):
    texts = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    for name in english(pack):
        page = ROOT / "web" / "docs" / name / "zh.md"
        expect(page, with_tables(page.read_text(encoding="utf-8"), texts[name], "zh"))


@pytest.mark.parametrize("file", sorted(p.name for p in (ROOT / "workflows").glob("*.json")))
def test_graphs_have_a_value_for_every_widget(pack, file):
    """By position, as the front end reads them: required ones first."""
    known = {schema.node_id: schema for schema in schemas(pack)}
    graph = json.loads((ROOT / "workflows" / file).read_text(encoding="utf-8"))
    for node in graph["nodes"]:
        if node["type"] not in known:
            continue
        inputs = sorted(known[node["type"]].inputs, key=lambda i: bool(i.optional))
        widgets = [
            i for i in inputs if hasattr(i, "default") and not getattr(i, "force_input", None)
        ]
        values = node.get("widgets_values", [])
        assert len(values) == len(widgets), node["type"]
        for widget, value in zip(widgets, values, strict=True):
            options = getattr(widget, "options", None)
            if re.fullmatch(r"lora_(name|low|\d+)|embedding|weights", widget.id):
                assert isinstance(value, str)
            elif options:
                assert value in options, (node["type"], widget.id)
            else:
                assert isinstance(value, (int, float)) == isinstance(widget.default, (int, float))
