"""Reads the Inception network's weights from any common file format, and writes them in one of them.

The format is detected from a file's content, not from its name:

- a PyTorch .pth, the port that pytorch-fid and torch-fidelity share;
- TensorFlow's frozen graph, classify_image_graph_def.pb;
- the pickle of jax-fid, read without running any of its code;
- a .safetensors written by `write`.

In the first three, each convolution has a batch norm, which is folded into the convolution in float64. All
formats of the same weights give the same numbers and the same hash.
"""

import dataclasses
import functools
import hashlib
import io
import re
import shlex
from collections.abc import Callable, Mapping

import numpy as np
import safetensors.numpy
from flax import nnx

from mcm_jax import records
from mcm_jax.data import layout
from mcm_jax.evaluation import frozen_graph, inception
from mcm_jax.evaluation.features import FeatureNetwork
from mcm_jax.evaluation.inception import Inception
from mcm_jax.system import files, pickles, pth
from mcm_jax.system.errors import InputError, reason, shortened
from mcm_jax.system.paths import Path, as_path
from mcm_jax.system.tensors import TensorFile

SOURCE = (
    "get pt_inception-2015-12-05-6726825d.pth from the release fid_weights of "
    "github.com/mseitzer/pytorch-fid, or classify_image_graph_def.pb from "
    "download.tensorflow.org/models/image/imagenet/inception-2015-12-05.tgz, and convert it with "
    "python -m mcm_jax.prepare --inception=FILE"
)
FILE = "inception-2015-12-05.safetensors"
DEFAULT_PATH = as_path(layout.DEFAULT_DATA_DIR) / FILE
_EPSILON = 1e-3  # of the batch norms
_FORMAT = "inception-2015-12-05, batch norms folded in"
# Arrays of a convolution and its batch norm, or of the classifier, under our names; kernels [h, w, in, out].
_Layer = Mapping[str, np.ndarray]
# Of all parameters, by name.
_Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Weights:
    """`params`: "layer.kernel" and "layer.bias" -> array; `sha256`: hash of all arrays in any format."""

    params: dict[str, np.ndarray]
    sha256: str

    def network(self) -> FeatureNetwork:
        """Returns `inception.Inception` with these weights as a feature network for evaluation."""
        abstract = abstract_network()
        state = nnx.to_flat_state(abstract.params)
        found = [(path, variable.replace(self.params[_name(path)])) for path, variable in state]
        description = {**abstract.description, "sha256": self.sha256}
        return dataclasses.replace(abstract, params=nnx.from_flat_state(found), description=description)


@functools.cache
def abstract_network() -> FeatureNetwork:
    """The network with abstract parameters (shapes only), enough to compile it."""
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Inception(rngs=nnx.Rngs(0))))
    return FeatureNetwork(
        params=abstract,
        apply=lambda params, images: nnx.merge(graph, params)(images)._asdict(),
        dimensions={"pool": inception.POOL, "spatial": inception.SPATIAL, "logits": inception.CLASSES},
        distance=records.DISTANCES[records.INCEPTION],
        description={"network": records.INCEPTION},
    )


def load(path: Path) -> Weights:
    """Loads the weights from a file in any supported format.

    Raises:
      InputError: the file does not exist, has none of the formats, is damaged, or holds another network.
    """
    try:
        content = files.read_bytes(path)
    except FileNotFoundError:
        raise InputError(f"{path}: there are no Inception weights; {SOURCE}") from None
    except OSError as error:
        raise InputError(f"{path}: can't be read ({reason(error)})") from error
    _check_name(path, content)
    if pth.recognises(content):
        return _folded(path, _of_pth(pth.read(content, name=str(path))))
    if content[8:9] == b"{":
        return _of_safetensors(path, content)
    if content.startswith(b"\x80"):
        return _folded(path, _of_pickle(pickles.read(content, name=str(path))))
    return _folded(path, _of_graph(_constants(path, content)))


def write(weights: Weights, path: Path) -> None:
    """Writes the weights as .safetensors, atomically."""
    metadata = {"format": _FORMAT, "sha256": weights.sha256}
    files.write_whole(path, safetensors.numpy.save(weights.params, metadata))


def _name(path: tuple[object, ...]) -> str:
    return ".".join(str(part) for part in path)


def _check_name(path: Path, content: bytes) -> None:
    """Compares the file's sha256 with the first digits of it that PyTorch puts into the file name."""
    named = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    digest = hashlib.sha256(content).hexdigest()
    if named is not None and not digest.startswith(named.group(1)):
        raise InputError(
            f"{path} is damaged: its sha256 begins with {digest[:8]}, not with {named.group(1)} as in its "
            "name; download it again"
        )


# Each function takes the content of one file format and returns a function: layer name -> the layer's arrays.


def _of_pth(tensors: dict[str, np.ndarray]) -> Callable[[str], _Layer]:
    def layer(name: str) -> _Layer:
        if name == "fc":
            return {"kernel": tensors["fc.weight"].T, "bias": tensors["fc.bias"]}
        names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}
        port = _capitalised(name)
        return {
            "kernel": tensors[f"{port}.conv.weight"].transpose(2, 3, 1, 0),
            **{ours: tensors[f"{port}.bn.{theirs}"] for ours, theirs in names.items()},
        }

    return layer


def _of_pickle(tree: pickles.Plain) -> Callable[[str], _Layer]:
    def layer(name: str) -> _Layer:
        part = tree
        for word in _capitalised(name).split("."):
            part = part[word]
        if name == "fc":
            return part
        names = {"scale": "scale", "bias": "bias", "mean": "mean", "variance": "var"}
        return {
            "kernel": part["conv"]["kernel"],
            **{ours: part["bn"][theirs] for ours, theirs in names.items()},
        }

    return layer


def _capitalised(name: str) -> str:
    """A layer's name in the PyTorch port; jax-fid uses the same names."""
    return name.replace("conv2d", "Conv2d").replace("mixed", "Mixed")


def _of_graph(constants: Mapping[str, frozen_graph.Constant]) -> Callable[[str], _Layer]:
    def layer(name: str) -> _Layer:
        if name == "fc":
            theirs = {"kernel": "softmax/weights", "bias": "softmax/biases"}
        else:
            scope = _scope(name)
            norm = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "variance": "moving_variance"}
            theirs = {ours: f"{scope}/batchnorm/{their}" for ours, their in norm.items()}
            theirs["kernel"] = f"{scope}/conv2d_params"
        return {ours: constants[their].array() for ours, their in theirs.items()}

    return layer


_STEM = ("conv2d_1a_3x3", "conv2d_2a_3x3", "conv2d_2b_3x3", "conv2d_3b_1x1", "conv2d_4a_3x3")
_BLOCKS = (
    *("mixed_5b", "mixed_5c", "mixed_5d", "mixed_6a", "mixed_6b", "mixed_6c", "mixed_6d", "mixed_6e"),
    *("mixed_7a", "mixed_7b", "mixed_7c"),
)


def _scope(name: str) -> str:
    """A layer's scope in TensorFlow's graph, which numbers equal names: conv, conv_1, ...; tower, tower_1.

    A block's first branch is not in a tower if it is a single convolution.
    """
    if name in _STEM:
        return _numbered("conv", _STEM.index(name))
    block, layer = name.split(".")
    branch, _, place = layer.rpartition("_") if re.search(r"_\d[ab]?$", layer) else (layer, "", "1")
    towers = {
        "mixed_5": ("branch5x5", "branch3x3dbl", "branch_pool"),
        "mixed_6": ("branch7x7", "branch7x7dbl", "branch_pool"),
        "mixed_7": ("branch3x3", "branch3x3dbl", "branch_pool"),
        "mixed_6a": ("branch3x3dbl",),
        "mixed_7a": ("branch3x3", "branch7x7x3"),
    }
    names = towers.get(block, towers[block[:7]])
    scope = _numbered("mixed", _BLOCKS.index(block))
    if branch in names:
        scope += "/" + _numbered("tower", names.index(branch))
    if place[-1] in "ab":
        return f"{scope}/mixed/" + _numbered("conv", "ab".index(place[-1]))
    return f"{scope}/" + _numbered("conv", int(place) - 1)


def _numbered(name: str, number: int) -> str:
    return f"{name}_{number}" if number else name


def _constants(path: Path, content: bytes) -> dict[str, frozen_graph.Constant]:
    """The constants of a frozen graph by name."""
    try:
        return frozen_graph.constants(content)
    except ValueError as error:
        raise InputError(
            f"{path} holds no Inception weights: no .pth, frozen graph ({reason(error)}), pickle or "
            f".safetensors; {SOURCE}"
        ) from error


def _of_safetensors(path: Path, content: bytes) -> Weights:
    """Reads weights written by `write`; other .safetensors files are rejected."""
    try:
        file = TensorFile(io.BytesIO(content))
        params = {name: file.read(name) for name in file.shapes}
        given_format, sha256 = file.metadata["format"], file.metadata["sha256"]
    except (ValueError, KeyError) as error:
        raise InputError(
            f"{path}: not Inception weights in .safetensors, or damaged ({reason(error)}); {SOURCE}"
        ) from error
    weights = _checked(path, params)
    if (given_format, sha256) != (_FORMAT, weights.sha256):
        raise InputError(
            f"{path} is damaged: its weights have changed since it was written; convert them again"
        )
    return weights


def _folded(path: Path, layer: Callable[[str], _Layer]) -> Weights:
    """Folds batch norms: norm(W * x) = (g W) * x + (b - g m), g = scale / sqrt(variance + eps).

    Computed in float64 and rounded once.
    """
    params: dict[str, np.ndarray] = {}
    shapes = _shapes()
    for name in {full.rpartition(".")[0]: None for full in shapes}:
        try:
            given = layer(name)
            # Before any arithmetic: arrays of other shapes can have a product of any size.
            for key in sorted(given):
                _check_shape(path, f"{name}.{key}", given[key], shapes)
            found = {key: np.asarray(value, np.float64) for key, value in given.items()}
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            why = f"{type(error).__name__}: {reason(error)}"
            raise InputError(
                f"{path} is not the Inception network of 2015-12-05: no {name} ({why}); {SOURCE}"
            ) from error
        kernel, bias = found["kernel"], found["bias"]
        if name != "fc":
            gain = found["scale"] / np.sqrt(found["variance"] + _EPSILON)
            kernel, bias = kernel * gain, bias - gain * found["mean"]
        params[f"{name}.kernel"] = np.ascontiguousarray(kernel, np.float32)
        params[f"{name}.bias"] = np.ascontiguousarray(bias, np.float32)
    return _checked(path, params)


def _check_shape(path: Path, name: str, value: np.ndarray, shapes: _Shapes) -> None:
    """Raises InputError unless `value` has the shape of the array of that name before folding."""
    layer, _, key = name.rpartition(".")
    expected, shape = shapes[f"{layer}.{'kernel' if key == 'kernel' else 'bias'}"], value.shape
    if shape != expected:
        raise _of_another_shape(path, name, shape, expected)


def _of_another_shape(path: Path, name: str, found: object, expected: object) -> InputError:
    return InputError(
        f"{path} is not the Inception network of 2015-12-05: {shortened(name)} is {found} and should be "
        f"{expected}; {SOURCE}"
    )


def _checked(path: Path, params: dict[str, np.ndarray]) -> Weights:
    """Checks names, shapes and finiteness, and returns the weights with their hash."""
    shapes = _shapes()
    found = {name: value.shape for name, value in params.items()}
    if found != shapes:
        wrong = sorted(name for name in shapes.keys() | found if shapes.get(name) != found.get(name))
        name = wrong[0]
        raise _of_another_shape(path, name, found.get(name, "missing"), shapes.get(name, "absent"))
    digest = hashlib.sha256()
    for name in sorted(params):
        if not np.isfinite(params[name]).all():
            raise InputError(f"{path} is damaged: {name} is not finite; download it again")
        digest.update(name.encode() + params[name].astype("<f4").tobytes())
    return Weights(params, digest.hexdigest())


def _shapes() -> _Shapes:
    """The shapes of all parameters by name."""
    return {_name(path): variable.shape for path, variable in nnx.to_flat_state(abstract_network().params)}


def convert(source: Path, target: Path) -> str:
    """Converts the weights in `source` to the file that `evaluate` reads; returns a summary.

    Raises:
      InputError: the source cannot be used, or the target cannot be written.
    """
    weights = load(source)
    with files.writing_to(target.parent, "--data_dir"):
        write(weights, target)
    size = sum(value.size for value in weights.params.values())
    elsewhere = "" if target == DEFAULT_PATH else f" --inception={shlex.quote(str(target))}"
    return (
        f"Inception of 2015-12-05: {size:,} weights, batch norms folded in\n"
        f"  sha256 of the weights {weights.sha256}\n  {target}\n"
        f"next: python -m mcm_jax.evaluate --workdir=runs/... --features=inception{elsewhere} --num=50000"
    )
