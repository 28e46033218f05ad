"""Safetensors files, checked on reading, and the keys of LoRA files: which part of a change a
tensor is, and readable names of parametrisations.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Container, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from ..errors import LoraFileError, OutOfMemory
from ..saving import atomically

_FLOATS = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes by key, and metadata; raises :class:`LoraFileError` for an incomplete file."""
    with _opened(path) as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        return shapes, dict(file.metadata() or {})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors, in their own dtypes, and the metadata of a safetensors file.

    Raises :class:`LoraFileError` for anything but a complete safetensors file, for NaN or Inf, and
    for dtypes that are not plain real numbers (packed 4-bit, complex, …).
    """
    with _opened(path) as file:
        metadata = dict(file.metadata() or {})
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if not tensors:
        raise LoraFileError(f"{path} contains no tensors; it is not a LoRA file.")
    for key, tensor in tensors.items():
        _check_numbers(path, key, tensor)
    return tensors, metadata


@contextmanager
def _opened(path: Path) -> Generator[Any]:
    """The file, opened by safetensors; a pickled file is refused unopened."""
    if not path.is_file():
        raise LoraFileError(f"{path} does not exist or is not a file; check the path.")
    with path.open("rb") as file:
        head = file.read(9)
    # A safetensors file starts with a length, whose first bytes may match too, and then JSON.
    if head[8:] != b"{" and head.startswith((b"PK\x03\x04", b"\x80")):
        raise LoraFileError(
            f"{path} is a pickled PyTorch file, which could run code when opened; convert it to "
            "safetensors if you trust its source."
        )
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        if "allocate memory" in str(error):
            raise OutOfMemory(
                f"Host memory ran out while reading {path}; free memory elsewhere."
            ) from error
        raise LoraFileError(
            f"{path} is not a complete safetensors file ({error}), but cut off, a web page or a "
            "Git LFS pointer. Download or save it again."
        ) from error


def _check_numbers(path: Path, key: str, tensor: Tensor) -> None:
    if tensor.dtype in _INTEGERS:
        return
    if tensor.dtype not in _FLOATS:
        raise LoraFileError(
            f"{path}: tensor {key} is {tensor.dtype}, which is not supported; save the file as "
            "float16, bfloat16, float32 or float8."
        )
    tensor = tensor.float() if tensor.element_size() == 1 else tensor
    # The sum takes a twentieth of the time.
    if not math.isfinite(float(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
        raise LoraFileError(
            f"{path}: tensor {key} contains NaN or infinite values; the file is broken or its "
            "training diverged."
        )


def file_digest(path: Path) -> str:
    """SHA-256 of the whole file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def dtypes_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of tensors of each dtype, without alphas."""
    names = (str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.numel() > 1)
    return dict(Counter(names).most_common())


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors without the metadata (modelspec: of everything after the header)."""
    empty = save({name: tensor.new_empty(0) for name, tensor in tensors.items()})
    in_order = json.loads(empty[8:])  # as safetensors writes them, which is by dtype first
    digest = hashlib.sha256()
    for name in in_order:
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_atomically(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file. Raises :class:`SaveError` like :func:`..saving.atomically`."""
    with atomically(path) as unfinished:
        save_tensors(tensors, unfinished, metadata)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    path.touch()
    mode = path.stat().st_mode  # safetensors creates files readable by the owner only
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


_LEAVES = {
    "down": (
        ".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", ".lora_A",
        "_lora.down.weight", ".lora.down.weight", ".lora_linear_layer.down.weight", ".down.weight",
    ),
    "up": (
        ".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight", ".lora_B",
        "_lora.up.weight", ".lora.up.weight", ".lora_linear_layer.up.weight", ".up.weight",
    ),
    "mid": (".lora_mid.weight",),
    "magnitude": (".dora_scale",),
    "output_magnitude": (
        ".lora_magnitude_vector", ".lora_magnitude_vector.weight",
        ".lora_magnitude_vector.default", ".lora_magnitude_vector.default.weight",
    ),
}  # fmt: skip
_CALLED_SO = (
    "alpha", "diff", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b",
)  # fmt: skip
LEAVES = {
    **{leaf: part for part, leaves in _LEAVES.items() for leaf in leaves},
    **{f".{part}": part for part in _CALLED_SO},
}
"""End of a key → its part."""

REFUSED = {
    (".diff_b", ".lora_B.bias", ".lora_up.bias"): "a change of a bias",
    (".w_norm", ".b_norm", "_norm.scale"): "a change of a normalisation",
    (".set_weight",): "a replaced weight",
    (".reshape_weight",): "a change of a weight's shape",
    (".oft_blocks", ".oft_diag", ".oft_R.weight", ".boft_R", ".rescale"): "OFT or BOFT",
    (".hada_t1", ".hada_t2", ".lokr_t2"): "a LoHa or LoKr in Tucker's form",
    (".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"): "GLoRA",
    (".on_input", ".ia3_l"): "IA3, which multiplies the weight",
}
"""Ends of a key → their meaning, for keys that are not read as a weight's change."""

_KINDS = {
    "magnitude": "DoRA", "output_magnitude": "DoRA", "hada_w1_a": "LoHa", "lokr_w1": "LoKr",
    "lokr_w1_a": "LoKr", "mid": "LoCon with mid", "diff": "full difference", "up": "LoRA",
}  # fmt: skip
_LONGEST_FIRST = sorted(LEAVES, key=len, reverse=True)


def split_key(key: str, modules: Container[str]) -> tuple[str, str] | None:
    """(module name, part) of ``key``, rather with a name in ``modules``; None without a leaf."""
    leaves = [leaf for leaf in _LONGEST_FIRST if key.endswith(leaf)]
    splits = [(key.removesuffix(leaf), LEAVES[leaf]) for leaf in leaves]
    return next((split for split in splits if split[0] in modules), splits[0] if splits else None)


def modules_of(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Module name → part → its key, for ``keys`` with a leaf."""
    modules: dict[str, dict[str, str]] = {}
    for key in keys:
        if split := split_key(key, ()):
            modules.setdefault(split[0], {})[split[1]] = key
    return modules


def is_lora(keys: Iterable[str]) -> bool:
    """True if a key ends like a part of a module's change; no model has such keys."""
    return any(split_key(key, ()) is not None or refusal(key) is not None for key in keys)


def refusal(key: str) -> str | None:
    """The parametrisation of ``key`` if no low-rank change can express it."""
    return next((what for leaves, what in REFUSED.items() if key.endswith(leaves)), None)


def kinds_of(keys: Iterable[str]) -> dict[str, int]:
    """The number of modules per parametrisation; a DoRA also counts as its underlying kind."""
    parts = [part for parts in modules_of(keys).values() for part in parts]
    return dict(Counter(_KINDS[part] for part in parts if part in _KINDS))
