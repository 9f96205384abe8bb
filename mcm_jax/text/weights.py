"""Reads the weights of an encoder from .safetensors files, and checks them against its network."""

import contextlib
import functools
import hashlib
import shlex
from collections.abc import Generator, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from mcm_jax.system import json_text
from mcm_jax.system.errors import InputError, reason, shortened
from mcm_jax.system.tensors import TensorFile
from mcm_jax.text.files import Files, get, read

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# A parameter of a layer here -> in the file.
_PARAMETERS = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "gain": "lambda1",  # a layer scale
}
# The axes of our kernels in the file, by their number: its linear layers are [outputs, inputs], its
# convolutions [outputs, inputs, height, width].
_KERNEL_AXES = {2: (1, 0), 4: (2, 3, 1, 0)}
_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(jnp.bfloat16))


@runtime_checkable
class Settings(Protocol):
    """All sizes of a network.

    Attributes:
      NAMES: the layers' names here -> in the files.
      CLASS: the class of `transformers` that writes the files.
      DOWNLOAD: a command that downloads such a network, without its directory.
    """

    NAMES: ClassVar[Mapping[str, str]]
    CLASS: ClassVar[str]
    DOWNLOAD: ClassVar[str]

    def build(self) -> nnx.Module:
        """Builds the network."""
        ...


class _Expected(NamedTuple):
    """A parameter of the network, and its shape in the file."""

    path: tuple[Any, ...]
    variable: nnx.Variable[Any]
    shape: tuple[int, ...]


def load(source: Files, settings: Settings) -> tuple[Any, PyTree, str]:
    """Reads only the tensors of the encoder, one after the other.

    Returns:
      The network's graph and parameters (for nnx.merge), each in its stored precision, and the sha256 of the
      parameters' values, which does not depend on the precision or on the number of files.

    Raises:
      InputError: a file or tensor is missing or damaged, or a tensor has another shape than config.json
        says.
    """
    graph, expected = _structure(settings)
    found, digests = {}, {}
    for file_name, names in _places(source, settings, list(expected)).items():
        with _tensors(source, file_name) as file:
            _check_shapes(
                f"{source.where}/{file_name}", file.shapes, {name: expected[name] for name in names}
            )
            for name in names:
                path, variable, _ = expected[name]
                values = _finite(f"{source.where}/{file_name}", name, file.read(name))
                digests[name] = hashlib.sha256(values.astype("<f4").tobytes()).digest()
                found[path] = variable.replace(jnp.asarray(_as_ours(path, values)))
    whole = b"".join(name.encode() + digests[name] for name in sorted(digests))
    return graph, nnx.from_flat_state(list(found.items())), hashlib.sha256(whole).hexdigest()


def _as_ours(path: tuple[Any, ...], values: np.ndarray) -> np.ndarray:
    return values.transpose(_KERNEL_AXES[values.ndim]) if path[-1] == "kernel" else values


@functools.lru_cache(maxsize=32)
def _structure(settings: Settings) -> tuple[Any, dict[str, _Expected]]:
    """The network's graph, and its parameters by their names in the file."""
    graph, abstract = nnx.split(nnx.eval_shape(lambda: settings.build()))
    expected = {}
    for path, variable in nnx.to_flat_state(abstract):
        shape = variable.shape
        if path[-1] == "kernel":
            shape = tuple(shape[axis] for axis in np.argsort(_KERNEL_AXES[len(shape)]))
        expected[_name(path, settings.NAMES)] = _Expected(path, variable, shape)
    return graph, expected


def _name(path: tuple[Any, ...], names: Mapping[str, str]) -> str:
    """The name in the file of the parameter at `path`, for example ("blocks", 3, "mlp", "wi", "kernel")."""
    if len(path) == 1:
        return names[path[0]]  # A parameter of the network itself.
    layer = ".".join("{}" if isinstance(part, int) else part for part in path[:-1])
    numbers = [part for part in path if isinstance(part, int)]
    return f"{names[layer].format(*numbers)}.{_PARAMETERS[path[-1]]}"


def _places(source: Files, settings: Settings, names: list[str]) -> dict[str, list[str]]:
    """File -> the tensors to be read from it."""
    files = source.names()
    if _WHOLE in files:
        return {_WHOLE: names}
    if _INDEX not in files:
        raise _without_weights(source, settings, files)
    shards = _weight_map(source)
    places: dict[str, list[str]] = {}
    for name in names:
        if name not in shards:
            raise _missing(f"{source.where}/{_INDEX}", name)
        places.setdefault(shards[name], []).append(name)
    for shard in places:
        if shard not in files:
            raise InputError(
                f"{source.where} has no {shortened(shard)}, which {_INDEX} lists; download all files again"
            )
    return places


def _weight_map(source: Files) -> dict[str, str]:
    """The file of each tensor, by name."""
    content = read(source, _INDEX)
    try:
        index = json_text.loads(content)
        shards = index.get("weight_map") if isinstance(index, dict) else None
        if not (isinstance(shards, dict) and all(isinstance(shard, str) for shard in shards.values())):
            raise ValueError("it has no weight_map with a file for each tensor")
    except ValueError as error:
        raise InputError(
            f"{source.where}/{_INDEX} is damaged ({reason(error)}); download it again"
        ) from error
    return shards


def _without_weights(source: Files, settings: Settings, files: set[str]) -> InputError:
    if files.intersection(_PICKLES):
        where, name = shlex.quote(source.where), settings.CLASS
        code = (
            f"import sys, transformers as t; d = sys.argv[1]; t.{name}.from_pretrained(d).save_pretrained(d)"
        )
        return InputError(
            f"{source.where} has weights as a pickle, but no {_WHOLE}; convert them where transformers and "
            f'torch are installed: python -c "{code}" {where}'
        )
    return InputError(f"{source.where} has no {_WHOLE}; get it: {get(source, settings.DOWNLOAD)}")


@contextlib.contextmanager
def _tensors(source: Files, file_name: str) -> Generator[TensorFile, None, None]:
    """Opens a file of tensors; any failure to read it is an InputError."""
    try:
        with source.opened(file_name) as file:
            yield TensorFile(file)
    except OSError as error:
        raise InputError(f"{source.where}/{file_name}: can't be read ({reason(error)})") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{source.where}/{file_name} is damaged ({reason(error)}); download it again"
        ) from error


def _check_shapes(
    where: str, shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, _Expected]
) -> None:
    for name, (_, _, shape) in expected.items():
        if name not in shapes:
            raise _missing(where, name)
        if shapes[name] != shape:
            raise InputError(
                f"{where}: {name} is {shortened(str(shapes[name]))} and should be {shape} by config.json; "
                "use the config.json that belongs to the weights"
            )


def _missing(where: str, name: str) -> InputError:
    return InputError(
        f"{where} has no tensor {name}, which an encoder with this config.json has; use the weights that "
        "belong to it"
    )


def _finite(where: str, name: str, values: np.ndarray) -> np.ndarray:
    if values.dtype not in _DTYPES:
        raise InputError(
            f"{where}: {name} has the dtype {values.dtype}; use weights in float32, float16 or bfloat16"
        )
    if not np.isfinite(values).all():
        raise InputError(f"{where} is damaged: {name} is not finite; download it again")
    return values
