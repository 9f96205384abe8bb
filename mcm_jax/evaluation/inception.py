"""The Inception network of 2015-12-05, whose features define FID, sFID and Inception score (SPEC 7).

This is Inception-v3 (Szegedy et al., arXiv:1512.00567) as released with TensorFlow. It differs from later
versions of the same name: it has 1008 classes, its average pools don't count padding, and its last block has
a max pool in place of an average pool. Images are enlarged on TensorFlow 1's grid, without half-pixel
centres.

Layers are named as in the PyTorch port that most evaluators share (pt_inception-2015-12-05-6726825d.pth).
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float32, UInt8

INPUT = 299
POOL, CLASSES = 2048, 1008
# sFID (Nash et al., arXiv:2103.03841) takes the first 7 channels of mixed_6/conv in TensorFlow's graph.
SPATIAL_CHANNELS, SPATIAL = 7, 17 * 17 * 7


class Features(NamedTuple):
    """Features from which the metrics are computed, one row per image.

    Attributes:
      pool: the last block's output, averaged over positions; for FID, KID, precision and recall.
      spatial: 17 x 17 positions of 7 channels in the middle of the network; for sFID.
      logits: pool times the classifier's weights, without its bias, from which common evaluators compute
        the Inception score.
    """

    pool: Float32[Array, "B 2048"]
    spatial: Float32[Array, "B 2023"]
    logits: Float32[Array, "B 1008"]


@dataclasses.dataclass(frozen=True)
class _Conv:
    """One layer: a convolution with its batch norm folded in, and a ReLU."""

    name: str
    channels: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: Literal["SAME", "VALID"] = "SAME"


def _conv(name: str, channels: int, *kernel: int) -> _Conv:
    return _Conv(name, channels, kernel if len(kernel) == 2 else (kernel[0], kernel[0]))


def _halving(name: str, channels: int) -> _Conv:
    return _Conv(name, channels, (3, 3), stride=2, padding="VALID")


# The pool at the beginning of a branch; a branch without layers consists of this pool alone.
_Pool = Literal["none", "average", "max", "halving"]
# The branches of a block, concatenated along channels; common first layers are shared between branches.
_Branches = tuple[tuple[_Pool, tuple[_Conv, ...]], ...]


def _block_a(pool: int) -> _Branches:
    double = (
        _conv("branch3x3dbl_1", 64, 1),
        _conv("branch3x3dbl_2", 96, 3),
        _conv("branch3x3dbl_3", 96, 3),
    )
    return (
        ("none", (_conv("branch1x1", 64, 1),)),
        ("none", (_conv("branch5x5_1", 48, 1), _conv("branch5x5_2", 64, 5))),
        ("none", double),
        ("average", (_conv("branch_pool", pool, 1),)),
    )


def _block_b() -> _Branches:
    double = (
        _conv("branch3x3dbl_1", 64, 1),
        _conv("branch3x3dbl_2", 96, 3),
        _halving("branch3x3dbl_3", 96),
    )
    return ("none", (_halving("branch3x3", 384),)), ("none", double), ("halving", ())


def _block_c(width: int) -> _Branches:
    single = (
        _conv("branch7x7_1", width, 1),
        _conv("branch7x7_2", width, 1, 7),
        _conv("branch7x7_3", 192, 7, 1),
    )
    double = (
        _conv("branch7x7dbl_1", width, 1),
        _conv("branch7x7dbl_2", width, 7, 1),
        _conv("branch7x7dbl_3", width, 1, 7),
        _conv("branch7x7dbl_4", width, 7, 1),
        _conv("branch7x7dbl_5", 192, 1, 7),
    )
    return (
        ("none", (_conv("branch1x1", 192, 1),)),
        ("none", single),
        ("none", double),
        ("average", (_conv("branch_pool", 192, 1),)),
    )


def _block_d() -> _Branches:
    single = (_conv("branch3x3_1", 192, 1), _halving("branch3x3_2", 320))
    double = (
        _conv("branch7x7x3_1", 192, 1),
        _conv("branch7x7x3_2", 192, 1, 7),
        _conv("branch7x7x3_3", 192, 7, 1),
        _halving("branch7x7x3_4", 192),
    )
    return ("none", single), ("none", double), ("halving", ())


def _block_e(pool: _Pool) -> _Branches:
    single = (_conv("branch3x3_1", 384, 1),)
    double = (_conv("branch3x3dbl_1", 448, 1), _conv("branch3x3dbl_2", 384, 3))
    return (
        ("none", (_conv("branch1x1", 320, 1),)),
        ("none", (*single, _conv("branch3x3_2a", 384, 1, 3))),
        ("none", (*single, _conv("branch3x3_2b", 384, 3, 1))),
        ("none", (*double, _conv("branch3x3dbl_3a", 384, 1, 3))),
        ("none", (*double, _conv("branch3x3dbl_3b", 384, 3, 1))),
        (pool, (_conv("branch_pool", 192, 1),)),
    )


# The layers before the blocks ("pool" is a 3x3 max pool with stride 2), then the blocks.
_STEM = (
    _halving("conv2d_1a_3x3", 32),
    _Conv("conv2d_2a_3x3", 32, (3, 3), padding="VALID"),
    _conv("conv2d_2b_3x3", 64, 3),
    "pool",
    _conv("conv2d_3b_1x1", 80, 1),
    _Conv("conv2d_4a_3x3", 192, (3, 3), padding="VALID"),
    "pool",
)
_BLOCKS = {
    "mixed_5b": _block_a(32),
    "mixed_5c": _block_a(64),
    "mixed_5d": _block_a(64),
    "mixed_6a": _block_b(),
    "mixed_6b": _block_c(128),
    "mixed_6c": _block_c(160),
    "mixed_6d": _block_c(160),
    "mixed_6e": _block_c(192),
    "mixed_7a": _block_d(),
    "mixed_7b": _block_e("average"),
    "mixed_7c": _block_e("max"),
}


class Block(nnx.Module):
    """Branches of convolutions on the same feature map, concatenated along channels."""

    def __init__(self, channels: int, branches: _Branches, *, rngs: nnx.Rngs):
        """channels: number of input channels."""
        self._branches = branches
        for _, layers in branches:
            width = channels
            for layer in layers:
                if not hasattr(self, layer.name):
                    setattr(self, layer.name, _layer(width, layer, rngs))
                width = layer.channels

    def __call__(self, x: Float32[Array, "B H W C"]) -> Float32[Array, "B h w D"]:
        computed: dict[tuple[str, ...], Array] = {}

        def run(pool: _Pool, layers: tuple[_Conv, ...]) -> Array:
            if not layers:
                return _pooled(x, pool)
            names = tuple(layer.name for layer in layers)
            if names not in computed:
                convolution = getattr(self, layers[-1].name)
                if pool == "average":
                    # The 1x1 convolution commutes with the mean, which is cheaper on its fewer channels.
                    y = _pooled(convolution(x), pool)
                else:
                    y = convolution(run(pool, layers[:-1]))
                computed[names] = jax.nn.relu(y)
            return computed[names]

        return jnp.concatenate([run(pool, layers) for pool, layers in self._branches], axis=-1)


class Inception(nnx.Module):
    """Maps uint8 images of any size to Features, in float32 with full-precision matrix products."""

    def __init__(self, *, rngs: nnx.Rngs):
        width = 3
        for layer in _STEM:
            if isinstance(layer, _Conv):
                setattr(self, layer.name, _layer(width, layer, rngs))
                width = layer.channels
        for name, branches in _BLOCKS.items():
            setattr(self, name, Block(width, branches, rngs=rngs))
            width = sum(layers[-1].channels if layers else width for _, layers in branches)
        self.fc = nnx.Linear(POOL, CLASSES, rngs=rngs)

    def __call__(self, images: UInt8[Array, "B H W 3"]) -> Features:
        # By default a TPU multiplies in bfloat16 and a GPU in TF32, so distances would depend on the machine.
        with jax.default_matmul_precision("highest"):
            x = (resized(images.astype(jnp.float32)) - 128) / 128
            for layer in _STEM:
                if isinstance(layer, _Conv):
                    x = jax.nn.relu(getattr(self, layer.name)(x))
                else:
                    x = _pooled(x, "halving")
            spatial = x  # Replaced below.
            for name in _BLOCKS:
                x = getattr(self, name)(x)
                if name == "mixed_6d":  # Its first branch is TensorFlow's mixed_6/conv.
                    spatial = x[..., :SPATIAL_CHANNELS]
            pool = jnp.mean(x, axis=(1, 2))
            logits = pool @ self.fc.kernel[...]
        return Features(pool, spatial.reshape(len(images), -1), logits)

    def features(self, images: UInt8[Array, "B H W 3"]) -> Float32[Array, "B 2048"]:
        """Returns only the pool features, which define FID."""
        return self(images).pool


def resized(x: Float32[Array, "B H W C"]) -> Float32[Array, "B 299 299 C"]:
    """Resizes bilinearly on TensorFlow 1's grid (see `resize_matrix`); the value range is unchanged."""
    rows, columns = resize_matrix(x.shape[1]), resize_matrix(x.shape[2])
    return jnp.einsum("yh,xw,bhwc->byxc", rows, columns, x)


def resize_matrix(size: int) -> Float32[np.ndarray, "299 size"]:
    """Weights that map `size` pixels to 299: output j interpolates the two pixels around j size / 299.

    The grid starts at 0, without a half-pixel shift. Beyond the last pixel its value is repeated. There is no
    antialiasing.
    """
    source = np.arange(INPUT) * size / INPUT
    low = np.floor(source).astype(int)
    weights = np.zeros((INPUT, size))
    np.add.at(weights, (np.arange(INPUT), low), 1 - (source - low))
    np.add.at(weights, (np.arange(INPUT), np.minimum(low + 1, size - 1)), source - low)
    return weights.astype(np.float32)


def _layer(channels: int, layer: _Conv, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        channels,
        layer.channels,
        layer.kernel,
        strides=layer.stride,
        padding=layer.padding,
        rngs=rngs,
    )


def _pooled(x: Float32[Array, "B H W C"], pool: _Pool) -> Float32[Array, "B h w C"]:
    """Pools over 3x3 positions, one axis after the other; averages exclude padding.

    On a CPU this is 2 to 9 times faster than a single 3x3 window.
    """
    if pool == "none":
        return x
    if pool == "average":
        counts = [np.convolve(np.ones(size), np.ones(3), "same") for size in x.shape[1:3]]
        return _sliding(jnp.add, x, 0.0, stride=1) / jnp.float32(np.outer(*counts)[:, :, None])
    if pool == "max":
        return _sliding(jnp.maximum, x, -jnp.inf, stride=1)
    return _sliding(jnp.maximum, x, None, stride=2)


def _sliding(
    join: Callable[[Array, Array], Array], x: Float32[Array, "B H W C"], padding: float | None, *, stride: int
) -> Float32[Array, "B h w C"]:
    """Combines three neighbours along each spatial axis, padded at both ends unless `padding` is None."""
    if padding is not None:
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=padding)
    for axis in (1, 2):
        last = x.shape[axis] - 3
        # The barrier makes XLA store each axis's result instead of recomputing it for each neighbour.
        x = lax.optimization_barrier(x)
        first, second, third = (lax.slice_in_dim(x, at, at + last + 1, stride, axis) for at in range(3))
        x = join(join(first, second), third)
    return x
