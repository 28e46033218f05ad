"""The README and the pages are correct: commands run, code compiles, links resolve."""

import ast
import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer
import yaml
from command_line import QUICK, make_world, recipe_of
from safetensors.torch import load_file, save_file

from iteris_core import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
USED = [p for p in PAGES if p.name not in ("decisions.md", "releasing.md", "results.md")]
RUN = ("merge", "inspect", "methods", "resize", "extract", "convert")  # bake needs a single file
COMMANDS = typer.main.get_command(cli.app).commands


def fences(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def command_lines(page: Path) -> list[list[str]]:
    """The words of every ``iteris …`` in the page's blocks of bash."""
    text = "\n".join(fences(page, "bash")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [words[1:] for words in lines if words[:1] == ["iteris"]]


def merge_file() -> str:
    return next(text for text in fences(ROOT / "docs/command-line.md", "yaml") if "base:" in text)


ALL_LINES = [(page.name, words) for page in USED for words in command_lines(page)]


@pytest.mark.parametrize(("page", "words"), ALL_LINES, ids=[" ".join(w)[:60] for _, w in ALL_LINES])
def test_every_command_line_is_one(page, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "merge.yaml").write_text(merge_file())
    name, *arguments = words
    context = COMMANDS[name].make_context(name, arguments)
    assert context.params


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder in which the examples' files are, for a small base."""
    folder = make_world(tmp_path)
    names = ("cat", "dog", "style")
    for name, source in zip(names, (1, 2, 1), strict=True):
        words = {"modelspec.trigger_phrase": f"sks{source} {name}"}
        tensors = load_file(folder / f"lora{source}.safetensors")
        save_file(tensors, folder / f"{name}.safetensors", words)
    shutil.copytree(folder / "base", folder / "tuned")
    weights = folder / "tuned/unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({key: 1.1 * tensor for key, tensor in tensors.items()}, weights)
    (folder / "toybox").symlink_to(ROOT / "toybox")
    (folder / "loras").mkdir()
    for name in names:
        shutil.copy(folder / f"{name}.safetensors", folder / "loras")
    (folder / "style-prompts.txt").write_text("a street, zwx\n")
    data = {**yaml.safe_load(merge_file()), "base": "base"}
    data.pop("offload")  # which needs a GPU
    (folder / "merge.yaml").write_text(yaml.safe_dump(data))
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("unmeasured")
def test_the_merges_of_the_pages_run(place, iteris):
    """In their order, with fewer samples, on a small base."""
    done = []
    for page in USED:
        for words in command_lines(page):
            if words[0] not in RUN:
                continue
            bases = {"BASE": "base", "TUNED": "tuned"}
            arguments = [bases.get(word, word) for word in words]
            if words[0] in ("merge", "extract") or "--base" in words:
                arguments += [*QUICK, "--overwrite", "--latent-size=4"]
            if words[0] in ("inspect", "convert"):
                arguments += ["--base", "base"]
            iteris(*arguments)
            done.append(words)
    assert len(done) > 8
    assert recipe_of(place / "smaller.safetensors")["settings"]["rank"] == 16


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_is_code_and_names_exist(page):
    for text in fences(page, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize("page", USED, ids=lambda page: page.name)
def test_every_option_that_is_named_is_one(page):
    known = {option for command in COMMANDS.values() for p in command.params for option in p.opts}
    known |= {"--help", "--install-completion", "--version"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", page.read_text()))
    assert not named - known


def test_links_of_the_site_s_pages_lead_to_others():
    """``make docs`` fails for one that leads elsewhere."""
    found = re.search(
        r"^PAGES := \$\(wildcard (.*)\)", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    pages = {path for pattern in found[1].split() for path in ROOT.glob(pattern)}
    assert len(pages) > 30
    for page in pages:
        for target in re.findall(
            r"\]\(([^)\s]+)\)", page.read_text() if page.suffix == ".md" else ""
        ):
            if not target.startswith(("http", "#")):
                assert (page.parent / target.partition("#")[0]).resolve() in pages, (page, target)


def test_every_page_is_in_the_site():
    text = (ROOT / "mkdocs.yml").read_text()
    pages = [p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md")]
    assert not [page for page in pages if page not in text]
