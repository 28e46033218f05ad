"""A device that exists only in Python, to count where a merge would make a graphics card wait.

Its tensors hold their numbers on the CPU and say that they are on ``cuda:0``. Within
:func:`pretend_card`, operations on them run on the CPU, fail where a card's would (beside a tensor
on the CPU), and every wait for the card is counted: a number or a shape that the host reads, a
decomposition that checks its success, a copy in either direction that is not asynchronous.
"""

import traceback
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CARD, CPU = torch.device("cuda:0"), torch.device("cpu")
READS = (
    *("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "bincount"),
    *("_linalg_eigh", "linalg_eig", "_linalg_svd", "_linalg_solve_ex", "linalg_lstsq", "_unique2"),
)


class OnCard(Tensor):
    """A tensor on the card; ``numbers`` are its values."""

    device = property(lambda self: CARD)
    is_cuda = property(lambda self: True)

    @staticmethod
    def __new__(cls, numbers):
        made = Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
        )
        made.numbers = numbers
        return made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (Tensor.tolist, Tensor.numpy):
            _note(func.__name__)
            return func(args[0].numbers)
        if func is Tensor.cpu:
            return _to(args[0], device=CPU)
        if func is Tensor.to:
            return _to(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Card(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.waits = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


_active: list[_Card] = []


def _note(what):
    """Count a wait by its place in the core."""
    if _active:
        frames = [f for f in traceback.extract_stack() if "iteris_core" in f.filename]
        places = [f"{f.filename.rpartition('iteris_core/')[2]}:{f.lineno}" for f in frames[-3:]]
        _active[-1].waits[what, " < ".join(reversed(places))] += 1


def _to(tensor, *given, **kwargs):
    """``Tensor.to`` with the devices that tensors say they have."""
    device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
    for value in given:
        if isinstance(value, Tensor):
            device, dtype = value.device, value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, (str, torch.device)):
            device = value
    device = tensor.device if device is None else torch.device(device)
    on_card, goes_on = isinstance(tensor, OnCard), device.type == CARD.type
    dtype = dtype or tensor.dtype
    if on_card == goes_on and dtype == tensor.dtype and not kwargs.get("copy"):
        return tensor
    if on_card != goes_on and not kwargs.get("non_blocking"):
        _note("copied in" if goes_on else "copied out")
    numbers = (tensor.numbers if on_card else tensor).to(dtype, copy=True)
    return OnCard(numbers) if goes_on else numbers


def _run(func, args, kwargs):
    name, leaves = func.overloadpacket.__name__, tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    cards = [tensor for tensor in tensors if isinstance(tensor, OnCard)]
    device = kwargs.get("device")
    if device is not None:
        like_another = name.startswith("new_") or name.endswith("_like")
        on_card = torch.device(device).type == CARD.type or (like_another and bool(cards))
        if name == "_to_copy":
            kwargs = {k: v for k, v in kwargs.items() if v is not None}
            if on_card != bool(cards) and not kwargs.get("non_blocking"):
                _note("copied in" if on_card else "copied out")
        kwargs = {**kwargs, "device": CPU}
    else:
        on_card = bool(cards)
    if name == "copy_" and len(cards) == 1 and len(tensors) == 2:
        if not (kwargs.get("non_blocking") or True in args):
            _note("copied in" if isinstance(args[0], OnCard) else "copied out")
    elif (
        cards
        and name not in ("index_put_", "index", "_index_put_impl_")
        and any(tensor.ndim and not isinstance(tensor, OnCard) for tensor in tensors)
    ):
        raise RuntimeError(f"{name} of tensors on the card and on the CPU")
    masks = name.startswith("index") and any(c.dtype == torch.bool for c in cards[1:])
    if cards and (name in READS or masks):
        _note(name)
    known = {id(card.numbers): card for card in cards}
    plain = tree_map(lambda x: x.numbers if isinstance(x, OnCard) else x, (args, kwargs))
    result = func(*plain[0], **plain[1])

    def wrapped(value):
        if not on_card or not isinstance(value, Tensor) or isinstance(value, OnCard):
            return value
        return known.get(id(value)) if id(value) in known else OnCard(value)

    return tree_map(wrapped, result)


def moved(model: nn.Module) -> None:
    """Move ``model`` to the card."""
    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            for name, tensor in kept.items():
                if tensor is not None:
                    card = OnCard(tensor.detach().clone())
                    kept[name] = nn.Parameter(card, False) if kept is module._parameters else card


@contextmanager
def pretend_card():
    """Context in which tensors can be on the card; yields the waits, (what, where) → their
    number."""
    generator = torch.Generator
    with ExitStack() as stack:
        stack.enter_context(patch("torch.cuda._lazy_init", lambda: None))
        stack.enter_context(patch("torch.cuda.synchronize", lambda *_: None))
        stack.enter_context(patch("torch.Generator", lambda device=None: generator()))
        card = stack.enter_context(_Card())
        _active.append(card)
        stack.callback(_active.pop)
        yield card.waits
