"""A fixed set of merges still writes the same files: see :mod:`merged_files`."""

import json

import merged_files
import pytest
import torch

KEPT = json.loads(merged_files.KEPT.read_text())
FAST = (
    *("average", "ties", "regmean", "ssr", "iteris, sd1", "iteris, sd3", "iteris, jacobi"),
    *("iteris, decoder of transformers", "iteris, embeddings", "iteris, experts"),
)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_merge_is_kept():
    assert set(merged_files.merges()) == set(KEPT["merges"])


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in KEPT["merges"]]
)
def test_a_merge_writes_what_it_wrote(name):
    kept, found = KEPT["merges"][name], merged_files.written(name)
    assert found.names == kept["names"]
    for ours, theirs in zip(found.values, kept["values"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2, abs=1e-2 * found.values[0])
