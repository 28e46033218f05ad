"""Products in full precision regardless of PyTorch's settings, which are restored."""

import threading
from contextlib import suppress

import pytest
import torch

from iteris_core.linalg import full_precision

CPU = torch.device("cpu")
MATMUL = torch.backends.cuda.matmul
pytestmark = pytest.mark.skipif(
    not hasattr(MATMUL, "fp32_precision"), reason="PyTorch before 2.9 has one setting"
)


def settings() -> list[str]:
    found = [
        torch.backends.fp32_precision,
        MATMUL.fp32_precision,
        torch.backends.mkldnn.matmul.fp32_precision,
    ]
    with suppress(RuntimeError):  # the one value, while it and those of the backends agree
        found.append(torch.get_float32_matmul_precision())
    return found


@pytest.fixture(autouse=True)
def clean():
    yield
    torch.set_float32_matmul_precision("highest")
    for owner in (torch.backends, MATMUL, torch.backends.mkldnn.matmul):
        owner.fp32_precision = "none"


def by_backend(precision: str) -> None:
    MATMUL.fp32_precision = precision


def of_all(precision: str) -> None:
    torch.backends.fp32_precision = precision


@pytest.mark.parametrize(
    ("put", "value"),
    [
        (by_backend, "tf32"),
        (by_backend, "ieee"),
        (of_all, "tf32"),
        (torch.set_float32_matmul_precision, "high"),
        (torch.set_float32_matmul_precision, "medium"),
        (torch.set_float32_matmul_precision, "highest"),
    ],
)
def test_settings_are_full_within_and_as_they_were_behind(put, value):
    put(value)
    before = settings()
    with full_precision(CPU), full_precision(CPU):
        assert {MATMUL.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision} <= {
            *("none", "ieee")
        }
        assert torch.get_float32_matmul_precision() == "highest"
    assert settings() == before


def test_of_two_threads_the_last_one_puts_the_setting_back():
    torch.set_float32_matmul_precision("high")
    inside, go_on = threading.Event(), threading.Event()

    def other() -> None:
        with full_precision(CPU):
            inside.set()
            go_on.wait(5)

    thread = threading.Thread(target=other)
    with full_precision(CPU):
        thread.start()
        assert inside.wait(5)
    assert torch.get_float32_matmul_precision() == "highest"
    go_on.set()
    thread.join()
    assert torch.get_float32_matmul_precision() == "high"
