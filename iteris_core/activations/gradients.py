"""A model's forward as a function of merged factors, differentiated block by block.

A block runs without gradients and keeps its arguments. For the backward pass it runs again, on
copies of those that it changes in place, so a step holds the arguments of all blocks and the
activations of one. torch's own checkpoints would do the same, but do not notice when a block
changes a tensor that its gradient needs (``x += attention(norm(x))``), and give a wrong one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors, saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from ..lora import LowRank
from .barriers import ExecutionTrace, unwritten
from .memory import tensors_in

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
    def differentiable(
        self,
        factors: Mapping[str, LowRank],
        gradients: Context,
        losing: set[nn.Module] | None = None,
    ) -> Generator[None]:
        """Context in which forwards, within ``gradients()``, can be differentiated with respect to
        ``factors``, merged changes by site. The blocks that lose a gradient, because they read a
        tensor that is none of their arguments, are added to ``losing``."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(gradients())
            stack.enter_context(constant_weights(self.module))
            entering = self.module.register_forward_pre_hook(_ordinary, with_kwargs=True)
            stack.enter_context(entering)
            for block, (written, sites) in self.blocks.items():
                own = [factors[site] for site in sites if site in factors]
                leaves = [leaf for change in own for leaf in (change.up, change.down)]
                loses = None if losing is None else partial(losing.add, block)
                again = _Block(block.forward, written, leaves, gradients, loses)
                stack.enter_context(patch.object(block, "forward", again))
            yield

    def without(self, blocks: Set[nn.Module]) -> Network:
        """With these blocks as they are."""
        left = {block: of for block, of in self.blocks.items() if block not in blocks}
        return replace(self, blocks=left)


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
    ``leaves``, its factors. It calls ``loses`` if it loses others."""

    def __init__(
        self,
        forward: Callable[..., Any],
        written: Set[str],
        leaves: Sequence[Tensor],
        gradients: Context,
        loses: Callable[[], None] | None,
    ) -> None:
        self._forward, self._written, self._leaves = forward, written, leaves
        self._how = gradients, loses

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        given = _Tree((args, kwargs))
        tensors = given.taken()

        def run(some: Sequence[Tensor]) -> _Tree:
            args, kwargs = unwritten(self._written, *given.filled(iter(some)))
            return _Tree(self._forward(*args, **kwargs))

        made: list[_Tree] = []
        apply: Any = _Rerun.apply
        outputs = apply(run, made, self._how, len(tensors), *tensors, *self._leaves)
        return made[0].filled(iter(outputs))


class _Tree:
    """Containers of tensors and other things, also within dataclasses; :meth:`taken` takes the
    tensors out, and :meth:`filled` puts others in."""

    def __init__(self, tree: Any) -> None:
        self._leaves, self._spec = _pytree.tree_flatten(tree)
        self._inner = {
            at: {field.name: _Tree(getattr(leaf, field.name)) for field in fields(leaf)}
            for at, leaf in enumerate(self._leaves)
            if is_dataclass(leaf) and not isinstance(leaf, type)
        }

    def taken(self) -> list[Tensor]:
        found: list[Tensor] = []
        for at, leaf in enumerate(self._leaves):
            if isinstance(leaf, Tensor):
                found.append(leaf)
                self._leaves[at] = _TENSOR
            for inner in self._inner.get(at, {}).values():
                found += inner.taken()
        return found

    def filled(self, tensors: Iterator[Tensor]) -> Any:
        leaves = list(self._leaves)
        for at, leaf in enumerate(leaves):
            if leaf is _TENSOR:
                leaves[at] = next(tensors)
            elif at in self._inner:
                leaves[at] = copy.copy(leaf)
                for name, inner in self._inner[at].items():
                    object.__setattr__(leaves[at], name, inner.filled(tensors))
        return _pytree.tree_unflatten(leaves, self._spec)


_TENSOR = object()


class _Rerun(torch.autograd.Function):
    """The tensors of the tree that ``run`` makes of others, without gradients; then once more for
    them. The tree without them goes into ``made``."""

    @staticmethod
    def forward(
        ctx: Any, run: Any, made: list[_Tree], how: Any, count: int, *given: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.run, ctx.how, ctx.leaves = run, how, given[count:]
        ctx.save_for_backward(*given[:count])
        ctx.set_materialize_grads(False)
        made.append(run(given[:count]))
        return tuple(made[0].taken())

    @staticmethod
    def backward(ctx: Any, *wanted: Tensor | None) -> Any:
        needed, (gradients, loses) = ctx.needs_input_grad[4:], ctx.how
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(gradients())
            tensors = [
                tensor.detach().requires_grad_(needs)
                for tensor, needs in zip(ctx.saved_tensors, needed, strict=False)
            ]
            every = [*tensors, *ctx.leaves]
            if loses is not None:
                stack.enter_context(_Captured(every, loses))
            pairs = [
                (output, grad)
                for output, grad in zip(ctx.run(tensors).taken(), wanted, strict=True)
                if output.requires_grad and grad is not None
            ]
            sources = [one for one, needs in zip(every, needed, strict=True) if needs]
            outputs, grads = [output for output, _ in pairs], [grad for _, grad in pairs]
            found = iter(torch.autograd.grad(outputs, sources, grads, allow_unused=True))
        return None, None, None, None, *(next(found) if needs else None for needs in needed)


class _Captured(TorchFunctionMode):
    """Calls ``found()`` for a tensor with gradients that is neither ``given`` nor made here."""

    def __init__(self, given: Sequence[Tensor], found: Callable[[], None]) -> None:
        super().__init__()
        self._known, self._found = {id(tensor): tensor for tensor in given}, found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tensors_in((args, kwargs)):
            if tensor.requires_grad and id(tensor) not in self._known:
                self._found()
        made = func(*args, **kwargs)
        self._known |= {id(tensor): tensor for tensor in tensors_in(made)}
        return made


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


def _ordinary(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """A pre-hook: arguments that were made in inference mode, as others of the same storage."""
    tree = _Tree((args, kwargs))
    tensors = tree.taken()
    if not any(tensor.is_inference() for tensor in tensors):
        return None
    return tree.filled(_same_storage(of) if of.is_inference() else of for of in tensors)


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
