"""Shell completion, through typer's own mechanism."""

import os
import subprocess
import sys

import pytest
import typer
from typer._completion_classes import BashComplete

from iteris_core import cli


def test_bash_is_given_the_words_that_begin_so():
    environment = {
        **os.environ,
        "_ITERIS_COMPLETE": "complete_bash",
        "COMP_WORDS": "iteris me",
        "COMP_CWORD": "1",
    }
    script = "import sys; sys.argv[0] = 'iteris'; from iteris_core.cli import main; main()"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert sorted(done.stdout.split()) == ["merge", "methods"]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("merge", "--method", "tie"), ["ties"]),
        (("merge", "--set", "sampl"), ["samples="]),
        (("merge", "--offload", ""), ["model", "sequential"]),
    ],
)
def test_words_are_completed(words, wanted):
    complete = BashComplete(typer.main.get_command(cli.app), {}, "iteris", "_ITERIS_COMPLETE")
    found = complete.get_completions(list(words[:-1]), words[-1])
    assert sorted(item.value for item in found) == wanted
