"""What a fine-tune changes of its base beside the weights of layers, and the base with that on."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ..hosts.protocol import Host


def other_differences(base: Host, tuned: Host) -> dict[str, Tensor]:
    """Parameter → tuned − base, float32, on the CPU, of normalisations, biases and embeddings that
    both have and that differ."""
    found: dict[str, Tensor] = {}
    own = base.parameters().keys() & tuned.parameters().keys()
    for name in sorted(own):
        one, two = base.parameter(name), tuned.parameter(name)
        if one.shape == two.shape and bool((change := two - one).any()):
            found[name] = change
    return found


@contextmanager
def with_vectors(host: Host, vectors: Mapping[str, Tensor]) -> Generator[None]:
    """The base of ``host`` with ``vectors`` added to its parameters; none is written to. To be
    entered before sites have hooks, since a module's output is made anew."""
    modules = host.parameters() if vectors else {}
    by_module: dict[nn.Module, dict[str, Tensor]] = {}
    for name, vector in vectors.items():
        by_module.setdefault(modules[name], {})[name.rpartition(".")[2]] = vector
    with ExitStack() as stack:
        for module, changes in by_module.items():
            hook = module.register_forward_hook(_again(changes), with_kwargs=True)
            stack.callback(hook.remove)
        yield


def _again(changes: Mapping[str, Tensor]) -> Callable[..., Any]:
    """A hook that runs the module's forward again on parameters with ``changes``."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        own: dict[str, nn.Parameter] = {leaf: getattr(module, leaf) for leaf in changes}
        try:
            for leaf, parameter in own.items():
                change = changes[leaf].to(parameter.device)
                moved = (parameter.detach().float() + change).to(parameter.dtype)
                setattr(module, leaf, nn.Parameter(moved, requires_grad=False))
            return module.forward(*args, **kwargs)
        finally:
            for leaf, parameter in own.items():
                setattr(module, leaf, parameter)

    return hook
