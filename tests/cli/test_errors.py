"""The index of errors: every kind that is raised has an entry, and every entry is raised."""

import ast
from pathlib import Path

from reference_pages import errors_page

from iteris_core import errors
from iteris_core.errors import KINDS, IterisError, LoraFileError, remedy_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "errors" / "index.md"
DECLARED = {
    name: one
    for name, one in vars(errors).items()
    if isinstance(one, type) and issubclass(one, IterisError)
}


def made(folder: str) -> set[str]:
    """The errors that the code in ``folder`` makes, to raise them."""
    nodes = [
        node
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
    ]
    calls = [node.func for node in nodes if isinstance(node, ast.Call)]
    return {func.id for func in calls if isinstance(func, ast.Name)} & DECLARED.keys()


def test_every_kind_that_is_raised_has_an_entry_and_every_entry_is_raised():
    assert {one.__name__ for one in KINDS} == DECLARED.keys()
    assert made("iteris_core") | made("nodes") == DECLARED.keys()
    # In the core each says more than that something is wrong.
    assert "IterisError" not in made("iteris_core")


def test_codes_are_unique_and_every_entry_says_what_to_do():
    codes = [kind.code for kind in KINDS]
    assert codes == [f"IT-{number:02d}" for number in range(1, len(codes) + 1)]
    for kind in KINDS:
        assert kind.__doc__
        assert remedy_of(kind).endswith((".", "…"))


def test_the_page_is_what_the_index_makes():
    assert PAGE.read_text() == errors_page()
    assert errors_page().count("\n## IT-") == len(KINDS)


def test_a_message_ends_with_its_code_and_the_code_is_explained(iteris):
    assert iteris.refused("inspect", "none.safetensors").endswith(" [IT-08]")
    for text in ("IT-08", "[it-08]", "8"):
        out = iteris("explain", text)
        assert out.startswith("IT-08  A LoRA file cannot be read")
        assert "--allow-partial leaves out" in out
    assert len(iteris("explain").splitlines()) == len(KINDS)
    assert "no error 'IT-99'" in iteris.refused("explain", "IT-99")


def test_a_kind_of_another_package_has_the_entry_of_its_nearest():
    class Mine(LoraFileError):
        pass

    assert Mine("wrong").code == LoraFileError.code


def test_a_librarys_long_message_ends_with_a_whole_word():
    sentence = "There was an error in the connection."
    text = errors.brief(OSError(" ".join([sentence] * 20)))
    assert len(text) <= 300
    assert text.split()[-2] in sentence.split()
    assert text.endswith(" …")
    assert errors.brief(OSError()) == "OSError"
