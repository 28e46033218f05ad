"""A model's forward as a function of merged factors, differentiated block by block.

A block runs without gradients and keeps its arguments. For the backward pass it runs again, on
copies of those that it changes in place, so a step holds the arguments of all blocks and the
activations of one. torch's own checkpoints would do the same, but do not notice when a block
changes a tensor that its gradient needs (``x += attention(norm(x))``), and give a wrong one.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors, saved_tensors_hooks
from torch.utils import _pytree

from ..lora import LowRank
from .barriers import ExecutionTrace, unwritten

Context = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Network:
    """A ``module`` on a ``device`` with its ``blocks``: each with the arguments that it changes in
    place, as paths in (args, kwargs), and its sites."""

    module: nn.Module
    blocks: Mapping[nn.Module, tuple[Set[str], Sequence[str]]]
    device: torch.device

    @classmethod
    def of(cls, trace: ExecutionTrace, written: Mapping[nn.Module, Set[str]]) -> Network:
        """From a forward, and the arguments that its blocks have ``written`` to."""
        blocks = {
            block: (paths, [site for site in trace.sites if block in trace.inside[site]])
            for block, paths in written.items()
        }
        return cls(trace.inside[trace.sites[0]][0], blocks, trace.device)

    @contextmanager
    def differentiable(self, factors: Mapping[str, LowRank], gradients: Context) -> Generator[None]:
        """Context in which forwards, within ``gradients()``, can be differentiated with respect to
        ``factors``, merged changes by site."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(gradients())
            stack.enter_context(constant_weights(self.module))
            for block, (written, sites) in self.blocks.items():
                leaves = [leaf for s in sites for leaf in (factors[s].up, factors[s].down)]
                again = _Block(block.forward, written, leaves, gradients)
                stack.enter_context(patch.object(block, "forward", again))
            yield


@contextmanager
def saved_tensors(*, mutable: bool) -> Generator[None]:
    """Context for a forward and its backward pass, in which weights may leave the device between
    the two. Tensors that the backward pass needs must not change, unless ``mutable``; then they
    are copied as they do."""
    if mutable:
        with allow_mutation_on_saved_tensors():
            yield
        return

    def keep(tensor: Tensor) -> tuple[Tensor, int]:
        return tensor.detach(), tensor._version  # which has the storage that a weight has now

    def kept(saved: tuple[Tensor, int]) -> Tensor:
        tensor, version = saved
        if tensor._version != version:
            raise RuntimeError("a tensor needed for gradients was modified by an inplace operation")
        return tensor

    with saved_tensors_hooks(keep, kept):
        yield


class _Block:
    """A block's ``forward``, which runs again for the gradients of its arguments and of the
    ``leaves``, its factors."""

    def __init__(
        self,
        forward: Callable[..., Any],
        written: Set[str],
        leaves: Sequence[Tensor],
        gradients: Context,
    ) -> None:
        self._forward, self._written, self._gradients = forward, written, gradients
        self._leaves = leaves

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        given, spec = _pytree.tree_flatten((args, kwargs))
        places = [at for at, leaf in enumerate(given) if isinstance(leaf, Tensor)]
        tensors = [given[at] for at in places]
        for at in places:
            given[at] = None

        def run(some: Sequence[Tensor]) -> tuple[list[Any], Any]:
            leaves = list(given)
            for at, tensor in zip(places, some, strict=True):
                leaves[at] = tensor
            args, kwargs = unwritten(self._written, *_pytree.tree_unflatten(leaves, spec))
            return _pytree.tree_flatten(self._forward(*args, **kwargs))

        made: list[Any] = []
        given_too = run, made, self._gradients, len(tensors)
        outputs: Any = iter(_Rerun.apply(*given_too, *tensors, *self._leaves))
        leaves, shape = made
        leaves = [next(outputs) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return _pytree.tree_unflatten(leaves, shape)


class _Rerun(torch.autograd.Function):
    """The tensors that ``run`` makes of others, without gradients; then once more for them. All
    that it makes goes into ``made``."""

    @staticmethod
    def forward(
        ctx: Any, run: Any, made: list[Any], gradients: Context, count: int, *given: Tensor
    ) -> Any:
        ctx.run, ctx.gradients, ctx.leaves = run, gradients, given[count:]
        ctx.save_for_backward(*given[:count])
        ctx.set_materialize_grads(False)
        made += run(given[:count])
        return tuple(leaf for leaf in made[0] if isinstance(leaf, Tensor))

    @staticmethod
    def backward(ctx: Any, *wanted: Tensor | None) -> Any:
        needed = ctx.needs_input_grad[4:]
        with torch.enable_grad(), ctx.gradients():
            tensors = [
                tensor.detach().requires_grad_(needs)
                for tensor, needs in zip(ctx.saved_tensors, needed, strict=False)
            ]
            made = [leaf for leaf in ctx.run(tensors)[0] if isinstance(leaf, Tensor)]
            pairs = [
                (output, grad)
                for output, grad in zip(made, wanted, strict=True)
                if output.requires_grad and grad is not None
            ]
            every = [*tensors, *ctx.leaves]
            sources = [one for one, needs in zip(every, needed, strict=True) if needs]
            outputs, grads = [output for output, _ in pairs], [grad for _, grad in pairs]
            found = iter(torch.autograd.grad(outputs, sources, grads, allow_unused=True))
        return None, None, None, None, *(next(found) if needs else None for needs in needed)


@contextmanager
def constant_weights(root: nn.Module) -> Generator[None]:
    """Context in which the weights of ``root`` want no gradients. Those that were loaded in
    inference mode, through which none pass, are replaced by others of the same storage."""
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    wanting: list[tuple[dict[str, Any], str]] = []
    try:
        for module in root.modules():
            stores: list[dict[str, Any]] = [module._parameters, module._buffers]
            for named in stores:
                for name, value in named.items():
                    if value is None:
                        continue
                    if value.is_inference():
                        replaced.append((named, name, value))
                        named[name] = _same_storage(value)
                    elif value.requires_grad and value.is_leaf:
                        wanting.append((named, name))
                        value.requires_grad_(False)
        yield
    finally:
        for named, name, value in replaced:
            named[name] = value
        for named, name in wanting:
            named[name].requires_grad_(True)


def _same_storage(value: Tensor) -> Tensor:
    """An inference-mode tensor as one of ordinary mode, of the same kind."""
    if hasattr(value, "__tensor_flatten__"):  # a quantised weight, made of others
        kind: Any = type(value)
        parts, about = value.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
        inner = {part: getattr(value, part) for part in parts}
        same = kind.__tensor_unflatten__(inner, about, value.size(), value.stride())
        return nn.Parameter(same, requires_grad=False) if isinstance(value, nn.Parameter) else same
    same = torch.empty(0, dtype=value.dtype, device=value.device)
    with torch.no_grad():
        same.set_(value.untyped_storage(), value.storage_offset(), value.size(), value.stride())
    if type(value) is nn.Parameter:
        return nn.Parameter(same, requires_grad=False)
    if type(value) is not Tensor:
        same = same.as_subclass(type(value))
        for name, one in vars(value).items():
            setattr(same, name, one)
    return same
