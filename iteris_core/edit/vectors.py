"""A fine-tune's changes outside layer weights, and the base with these applied."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ..hosts.protocol import Host


def other_differences(base: Host, tuned: Host) -> dict[str, Tensor]:
    """Parameter → tuned − base, float32, on the CPU, for normalisations, biases and embeddings that
    both models have and that differ."""
    found: dict[str, Tensor] = {}
    own = base.parameters().keys() & tuned.parameters().keys()
    for name in sorted(own):
        one, two = base.parameter(name), tuned.parameter(name)
        if one.shape == two.shape and bool((change := two - one).any()):
            found[name] = change
    return found


@contextmanager
def with_vectors(host: Host, vectors: Mapping[str, Tensor]) -> Generator[None]:
    """Context in which ``vectors`` are added to the parameters of ``host``'s base, each while its
    module runs; no parameter is written to. Enter it before sites get hooks, which may pause a
    forward."""
    modules = host.parameters() if vectors else {}
    by_module: dict[nn.Module, dict[str, Tensor]] = {}
    for name, vector in vectors.items():
        by_module.setdefault(modules[name], {})[name.rpartition(".")[2]] = vector
    with ExitStack() as stack:
        for module, changes in by_module.items():
            swap = _Swap(module, changes)
            stack.callback(swap.back)  # hooks do not run after an interrupt
            stack.enter_context(module.register_forward_pre_hook(swap.enter))
            stack.enter_context(module.register_forward_hook(swap.leave, always_call=True))
        yield


class _Swap:
    """Gives ``module`` parameters with ``changes`` while forwards are inside it; several may be, if
    they wait for each other."""

    def __init__(self, module: nn.Module, changes: Mapping[str, Tensor]) -> None:
        self._module, self._changes = module, changes
        self._own: dict[str, nn.Parameter] = {}
        self._inside = 0

    def enter(self, *_: Any) -> None:
        self._inside += 1
        for leaf, change in self._changes.items() if self._inside == 1 else ():
            parameter: nn.Parameter = getattr(self._module, leaf)
            moved = (parameter.detach().float() + change.to(parameter.device)).to(parameter.dtype)
            self._own[leaf] = parameter
            setattr(self._module, leaf, nn.Parameter(moved, requires_grad=False))

    def leave(self, *_: Any) -> None:
        self._inside -= 1
        if not self._inside:
            self.back()

    def back(self) -> None:
        while self._own:
            setattr(self._module, *self._own.popitem())
