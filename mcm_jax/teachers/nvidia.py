"""Reads the networks in the pickles of EDM and EDM2 without torch and without running any code from them.

Such a pickle contains Python objects with their source text, which the authors' loader executes. This reader
ignores the text: each object becomes a `_Module`, which stores its attributes.
"""

import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from mcm_jax.system import pickles, pth
from mcm_jax.system.errors import InputError, reason

_PROTOCOL_4 = b"\x80\x04"
# Modules may be parts of several others. The real networks have a few hundred, in six levels.
_MAX_MODULES = 10_000
_MAX_DEPTH = 20
_MAX_PATH = 500
# The narrow network of EDM in the tests takes 32,000; the published one has twice as many tensors.
_MAX_INSTRUCTIONS = 300_000
# The tensors together may take this many times the bytes of the file: they may share storages.
_MAX_COPIES = 10


def recognises(content: bytes) -> bool:
    """Whether `content` begins like such a pickle."""
    return content.startswith(_PROTOCOL_4)


def read(content: bytes, *, name: str) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Reads the network with averaged weights.

    Args:
      name: the file's name, for the error message.

    Returns:
      (tensors, numbers): parameters and buffers by name, such as "unet.enc.64x64_conv.weight"; and the
      modules' numbers of heads, such as "unet.enc.16x16_block0.num_heads".

    Raises:
      InputError: the pickle holds no such network, exceeds a limit, or is damaged.
    """
    try:
        network = pickles.run(io.BytesIO(content), _KNOWN, max_instructions=_MAX_INSTRUCTIONS)["ema"]
        tensors, numbers, bytes_left = {}, {}, _MAX_COPIES * len(content)
        for path, attributes in _modules(network):
            for key in ("_parameters", "_buffers"):
                for leaf, tensor in attributes.get(key, {}).items():
                    if tensor is None:
                        continue
                    if not isinstance(tensor, np.ndarray):
                        raise ValueError(f"{path}{leaf} is not a tensor")
                    bytes_left -= tensor.nbytes + len(path)
                    if bytes_left < 0:
                        raise ValueError(
                            f"its tensors take more than {_MAX_COPIES} times the memory of the file"
                        )
                    tensors[path + leaf] = tensor
            if isinstance(heads := attributes.get("num_heads"), int):
                numbers[f"{path}num_heads"] = heads
        return {path: tensor.copy() for path, tensor in tensors.items()}, numbers
    # A malicious or truncated file can raise any exception; in every case it is unusable.
    except Exception as error:
        raise InputError(
            f"{name}: not a network of EDM or EDM2 ({reason(error)}); get the file from its source again"
        ) from error


class _Module:
    """Replaces the object of any class: stores its attributes."""

    def __init__(self, *_: object) -> None:
        self.attributes: dict[str, Any] = {}

    def set_attributes(self, attributes: dict[str, Any]) -> None:
        self.attributes = attributes


def _modules(network: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (path with a dot at the end, attributes) of the network and all modules in it."""
    left, waiting = _MAX_MODULES, [("", network, 0)]
    while waiting:
        path, module, depth = waiting.pop()
        left -= 1
        if left < 0 or depth > _MAX_DEPTH:
            raise ValueError(f"more than {_MAX_MODULES:,} modules or {_MAX_DEPTH} levels of them")
        if not isinstance(module, _Module):
            raise ValueError(f"{path or 'ema'} is not a module")
        yield path, module.attributes
        parts = module.attributes.get("_modules", {})
        if len(parts) > left or len(path) > _MAX_PATH:
            raise ValueError(f"more than {_MAX_MODULES:,} modules, or a path of over {_MAX_PATH} characters")
        waiting.extend((f"{path}{name}.", part, depth + 1) for name, part in reversed(parts.items()))


def _reconstruct(meta: Any, *_: object) -> _Module:
    """Replaces torch_utils.persistence._reconstruct_persistent_obj."""
    module = _Module()
    module.set_attributes(meta["state"])
    return module


def _rebuild_parameter(tensor: Any, *_: object) -> Any:
    """Replaces torch._utils._rebuild_parameter."""
    return tensor


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: object) -> np.ndarray:
    """Replaces torch._utils._rebuild_tensor_v2; returns a view of the storage."""
    if not (isinstance(storage, np.ndarray) and storage.ndim == 1):
        raise ValueError("a tensor without a storage")
    if not (isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) <= 8):
        raise ValueError("the description of a tensor is damaged")
    if not all(isinstance(one, int) for one in (offset, *shape, *strides)):
        raise ValueError("the description of a tensor is damaged")
    return pth.strided(storage, offset, shape, strides)


def _load_from_bytes(content: Any) -> np.ndarray:
    """Replaces torch.storage._load_from_bytes."""
    if not isinstance(content, bytes):
        raise ValueError("a storage that is not bytes")
    return pth.read_storage(content)


def _number(dtype: Any, *_: object) -> float:
    """Replaces numpy.core.multiarray.scalar, for arguments of constructors, which are not read."""
    del dtype
    return math.nan


class _Dtype:
    """Replaces numpy.dtype."""

    def __init__(self, *_: object) -> None:
        pass

    def set_state(self, state: tuple[Any, ...]) -> None:
        """Ignores the state."""


_KNOWN = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _reconstruct,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch.storage", "_load_from_bytes"): _load_from_bytes,
    ("collections", "OrderedDict"): pickles.dictionary_of_pairs,
    ("torch.nn.modules.container", "ModuleDict"): _Module,
    ("dnnlib.util", "EasyDict"): pickles.dictionary_of_pairs,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "scalar"): _number,
    ("numpy._core.multiarray", "scalar"): _number,
}
