"""Fixtures of a tiny pipeline and its host, in float32 and float64."""

import copy
import os
import signal

import pytest
import small_merge
import torch
from command_line import Iteris, make_world
from tiny import make_pipeline

from iteris_core.hosts.diffusers import DiffusersHost

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # for single short prompts
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(2)


@pytest.fixture(scope="session", autouse=True)
def _interrupts():
    """Ctrl-C raises, also where the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def _store(tmp_path_factory):
    """Samples are not kept in the home of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ITERIS_STORE", str(tmp_path_factory.mktemp("samples")))
        yield


@pytest.fixture(scope="session")
def _pipeline():
    return make_pipeline()


@pytest.fixture
def pipeline(_pipeline):
    return copy.deepcopy(_pipeline)


@pytest.fixture
def host(pipeline):
    return DiffusersHost(pipeline)


@pytest.fixture
def host64(_pipeline):
    pipeline = copy.deepcopy(_pipeline)
    pipeline.unet.double()
    pipeline.text_encoder.double()
    return DiffusersHost(pipeline)


@pytest.fixture
def unmeasured():
    """For a test that does not look at what merges keep on held-out rows."""
    with small_merge.unmeasured():
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """``base``, ``lora1.safetensors`` and ``lora2.safetensors``, to be read only."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def iteris(monkeypatch, capsys):
    return Iteris(monkeypatch, capsys)
