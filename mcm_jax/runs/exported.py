"""The folder of an exported model, in the layout of the Hugging Face hub; it loads like a run's directory.

model.safetensors  one set of parameters of one checkpoint, by dotted names: blocks.0.attention.qkv.kernel
config.json        the content of run.json, and which parameters these are (`Exported`)
README.md          the model card, for people
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
import safetensors.numpy

from mcm_jax.records import EXPORTED_FILE, Record
from mcm_jax.system import distributed, files, json_text
from mcm_jax.system.errors import InputError, reason, shortened
from mcm_jax.system.paths import Path
from mcm_jax.system.tensors import TensorFile
from mcm_jax.training.checkpoints import Parameters
from mcm_jax.training.checksums import checksums
from mcm_jax.training.state import Params

MODEL_FILE = "model.safetensors"
_LIBRARY = "mcm_jax"
_NAMES = {"ema": "averaged", "raw": "raw"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported(Record):
    """What config.json states besides the run.

    Attributes:
      library_name: this package; tells its folders from those of other libraries.
      version: that of this package when it wrote the folder.
      checkpoint_step: number of updates that produced the parameters.
      parameters: whether they are the averaged or the raw ones.
      checkpoint: the identity of their checkpoint (`workdirs.checkpoint_identity`); None: unknown.
      checksum: that of all parameters (`training.checksums`).
    """

    library_name: str
    version: str
    checkpoint_step: int
    parameters: Parameters
    checkpoint: str | None = None
    checksum: int


def by_name(params: Params) -> dict[str, Any]:
    """The leaves of a tree by their dotted names.

    Examples:
      >>> by_name({"blocks": {0: {"kernel": 1.0}}, "bias": 2.0})
      {'bias': 2.0, 'blocks.0.kernel': 1.0}
    """
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}


def as_tree(tensors: Mapping[str, Any], like: Params) -> Params:
    """The inverse of `by_name`: the tensors in a tree of the structure of `like`."""
    return jax.tree.map_with_path(lambda path, _: tensors[_name(path)], like)


def find(folder: Path) -> Exported | None:
    """What `folder` contains; None if it is no exported model of this package.

    Raises:
      InputError: its config.json is damaged, or can't be read.
    """
    path = folder / EXPORTED_FILE
    try:
        content = json_text.loads(files.read_bytes(path))
        if not isinstance(content, dict) or content.get("library_name") != _LIBRARY:
            return None
        return Exported.from_json(content)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{path} can't be read ({reason(error)})") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged ({reason(error)}); restore it") from error


def write(
    folder: Path,
    params: Params,
    run: Mapping[str, Any],
    *,
    version: str,
    checkpoint_step: int,
    parameters: Parameters,
    checkpoint: str | None,
) -> None:
    """Writes model.safetensors, then config.json, which makes the folder a complete model.

    Args:
      run: the content of run.json.

    Raises:
      InputError: `folder` is not writable.
    """
    described = Exported(
        library_name=_LIBRARY,
        version=version,
        checkpoint_step=checkpoint_step,
        parameters=parameters,
        checkpoint=checkpoint,
        checksum=_checksum(params),
    )
    tensors = by_name(jax.device_get(params))
    files.write_output(folder / MODEL_FILE, safetensors.numpy.save(tensors))
    content = json.dumps({**described.to_json(), **run}, indent=2)
    files.write_output(folder / EXPORTED_FILE, content + "\n")


def restore_params(
    folder: Path,
    exported: Exported,
    abstract: Params,
    shardings: Params,
    *,
    parameters: Parameters,
    step: int | None = None,
) -> Params:
    """Reads the parameters, one tensor after the other, and verifies them.

    Args:
      exported: the result of `find`.
      step: the number of updates that the caller wants; None: those that are there.

    Raises:
      InputError: the folder has other parameters than these, or they are damaged.
    """
    if parameters != exported.parameters:
        raise InputError(
            f"{folder} has only the {_NAMES[exported.parameters]} parameters, not the {_NAMES[parameters]} "
            f"ones; load it with parameters={exported.parameters}, or export the others too"
        )
    if step not in (None, exported.checkpoint_step):
        raise InputError(
            f"{folder} has only the parameters after {exported.checkpoint_step} updates, not after {step}"
        )
    with distributed.fail_together():
        params = _read(folder / MODEL_FILE, abstract, shardings)
    if _checksum(params) != exported.checksum:
        raise InputError(
            f"{folder / MODEL_FILE} has other parameters than {EXPORTED_FILE} states; restore both"
        )
    return params


def _read(path: Path, abstract: Params, shardings: Params) -> Params:
    try:
        with files.reading(path) as file:
            tensors = TensorFile(file)
            wanted = {name: leaf.shape for name, leaf in by_name(abstract).items()}
            # Pairs of a name and a shape that only the file or only the network has.
            differing = wanted.items() ^ tensors.shapes.items()
            if differing:
                name, _ = min(differing)
                raise ValueError(f"its tensor {shortened(name)} differs from the network of {EXPORTED_FILE}")
            read = functools.partial(_tensor, tensors)
            return jax.tree.map_with_path(read, abstract, shardings)
    except OSError as error:
        raise InputError(f"{path} can't be read ({reason(error)}); restore it") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged ({reason(error)}); restore it") from error


def _tensor(
    tensors: TensorFile, path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding
) -> jax.Array:
    array = tensors.read(_name(path))
    if array.dtype != leaf.dtype:
        raise ValueError(f"its tensor {_name(path)} is {array.dtype}, not {leaf.dtype}")
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _checksum(params: Params) -> int:
    return checksums({"params": params})["params"]
