"""Shell completion, through typer's own mechanism."""

import os
import subprocess
import sys

import pytest


def complete(*words: str) -> list[str]:
    """What bash is given for the last of ``words``."""
    environment = {
        **os.environ,
        "_ITERIS_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(["iteris", *words]),
        "COMP_CWORD": str(len(words)),
    }
    script = "import sys; sys.argv[0] = 'iteris'; from iteris_core.cli import main; main()"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("me",), ["merge", "methods"]),
        (("merge", "--method", "ite"), ["iteris"]),
        (("merge", "--set", "sampl"), ["samples="]),
        (("merge", "--offload", ""), ["model", "sequential"]),
        (("compare", "--sched"), ["--scheduler"]),
    ],
)
def test_words_are_completed(words, wanted):
    assert sorted(complete(*words)) == wanted
