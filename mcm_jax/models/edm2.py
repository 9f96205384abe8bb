"""EDM2's magnitude-preserving U-Net (arXiv:2312.02696, config G).

Every layer preserves the expected magnitude of its input: the weights of an output channel have unit length,
and sums and concatenations are scaled. There are no biases, and no norms except that of the encoder's pixels.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from mcm_jax.diffusion.conditions import Cond
from mcm_jax.fields import Affects, setting
from mcm_jax.models import unet
from mcm_jax.models.blocks import dropout
from mcm_jax.models.conditions import Classes, Condition
from mcm_jax.models.placement import Placement
from mcm_jax.models.preconditioning import Preconditioning
from mcm_jax.models.unet import BlockShape, UNet, UNetSettings

_EPSILON = 1e-4
# Share of the block's own branch, and of its attention, in its output.
_BALANCE = 0.3
_CLIP = 256.0


@dataclasses.dataclass(frozen=True)
class EDM2Settings(UNetSettings):
    """All sizes of EDM2's U-Net and how it computes."""

    attention_levels: tuple[bool, ...] = setting(
        (False, False, True, True), "whether the blocks of each level have attention", affects=Affects.ALL
    )

    @property
    def preconditioning(self) -> Preconditioning:
        """EDM's."""
        return "edm"

    def build(
        self,
        shape: tuple[int, ...],
        *,
        condition: Condition,
        takes_end: bool,
        placement: Placement,
        rngs: nnx.Rngs,
    ) -> "EDM2":
        """Builds the network for images of shape (resolution, resolution, channels)."""
        return EDM2(self, shape, condition=condition, takes_end=takes_end, placement=placement, rngs=rngs)


def unit(kernel: Float[Array, "*rows C"]) -> Float[Array, "*rows C"]:
    """Scales the weights of each output channel to an rms of 1, up to 1e-4 (equation 47)."""
    axes = tuple(range(kernel.ndim - 1))
    return kernel / (_EPSILON + jnp.sqrt(jnp.mean(jnp.square(kernel), axes, keepdims=True)))


def mix(a: Float[Array, "..."], b: Float[Array, "..."], t: float) -> Float[Array, "..."]:
    """((1 - t) a + t b) / sqrt((1 - t)^2 + t^2): preserves the magnitude of a and b (equation 88)."""
    return ((1 - t) * a + t * b) / math.hypot(1 - t, t)


def join(a: Float[Array, "*B N"], b: Float[Array, "*B M"]) -> Float[Array, "*B N+M"]:
    """Concatenates channels; both parts contribute equally to the output's magnitude (equation 103)."""
    n, m = a.shape[-1], b.shape[-1]
    return jnp.concatenate([a * math.sqrt((n + m) / (2 * n)), b * math.sqrt((n + m) / (2 * m))], axis=-1)


def swish(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x sigmoid(x) / 0.596, which preserves the magnitude of standard normal values (equation 81)."""
    return jax.nn.swish(x) / 0.596


def pixel_norm(x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
    """Scales each vector along the last axis to an rms of 1, up to 1e-4."""
    wide = x.astype(jnp.float32)
    rms = jnp.sqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True))
    return (wide / (_EPSILON + rms)).astype(x.dtype)


def normalised(params: PyTree) -> PyTree:
    """Scales all weights as `unit` does: the forced normalisation after each update (equation 66).

    It leaves the network's function as it is, up to 1e-4. Without it, weights grow in training, and the
    effective learning rate falls.
    """

    def scaled(path: tuple[object, ...], leaf: jax.Array) -> jax.Array:
        is_kernel = jax.tree_util.keystr(path[-1:], simple=True) == "kernel"
        return unit(leaf) if is_kernel else leaf

    return jax.tree.map_with_path(scaled, params)


class Weights(nnx.Module):
    """A linear layer or a convolution whose output channels have weights of length `gain`."""

    def __init__(self, *shape: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        """shape: of the kernel, with the output channels last."""
        self.kernel, self.dtype = nnx.Param(jax.random.normal(rngs.params(), shape)), dtype

    def __call__(
        self, x: Float[Array, "B *space C"], gain: Float[Array, ""] | float = 1.0
    ) -> Float[Array, "B *space D"]:
        kernel = self.kernel[...]
        kernel = unit(kernel) * (gain / math.sqrt(math.prod(kernel.shape[:-1])))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if kernel.ndim == 2:
            return x @ kernel
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )


class Attention(nnx.Module):
    """mix(x, proj(softmax(q k^T / sqrt(head width)) v)), with q, k and v normalised in each head."""

    def __init__(self, width: int, settings: EDM2Settings, *, placement: Placement, rngs: nnx.Rngs):
        self.heads, self.attend = settings.num_heads(width), placement.attend
        dtype = jnp.dtype(settings.dtype)
        self.qkv = Weights(width, 3 * width, dtype=dtype, rngs=rngs)
        self.proj = Weights(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        h = unet.attended(self.qkv(x), heads=self.heads, attend=self.attend, normalise=pixel_norm)
        return mix(x, self.proj(h), _BALANCE)


class Block(nnx.Module):
    """mix(x, conv(dropout(swish(conv(swish(x)) (1 + gain W emb))))), then attention."""

    def __init__(
        self,
        shape: BlockShape,
        settings: EDM2Settings,
        *,
        placement: Placement,
        rngs: nnx.Rngs,
    ):
        c_in, c_out, dtype = shape.c_joined, shape.c_out, jnp.dtype(settings.dtype)
        self.resampling: unet.Resampling | None = shape.resampling
        self.rate, self.is_encoder = settings.dropout, shape.part == "enc"
        self.conv_0 = Weights(3, 3, c_out if self.is_encoder else c_in, c_out, dtype=dtype, rngs=rngs)
        self.emb_gain = nnx.Param(jnp.zeros(()))
        self.emb = Weights(4 * settings.widths[0], c_out, dtype=dtype, rngs=rngs)
        self.conv_1 = Weights(3, 3, c_out, c_out, dtype=dtype, rngs=rngs)
        self.skip = Weights(c_in, c_out, dtype=dtype, rngs=rngs) if c_in != c_out else None
        attention = functools.partial(Attention, c_out, settings, placement=placement, rngs=rngs)
        self.attention = attention() if shape.attention else None

    def __call__(
        self, x: Float[Array, "B H W C"], emb: Float[Array, "B E"], key: jax.Array | None
    ) -> Float[Array, "B I J D"]:
        x = unet.resampled(x, self.resampling)
        if self.is_encoder:
            x = pixel_norm(self._project(x))
        scale = 1 + self.emb(emb, self.emb_gain[...])
        h = swish(self.conv_0(swish(x)) * scale[:, None, None, :])
        h = self.conv_1(dropout(h, self.rate, key))
        x = mix(x if self.is_encoder else self._project(x), h, _BALANCE)
        x = x if self.attention is None else self.attention(x)
        return jnp.clip(x, -_CLIP, _CLIP)

    def _project(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        """x with the output's number of channels."""
        return x if self.skip is None else self.skip(x)


class EDM2(UNet):
    """See `UNet`."""

    def __init__(
        self,
        settings: EDM2Settings,
        shape: tuple[int, ...],
        *,
        condition: Condition,
        takes_end: bool,
        placement: Placement,
        rngs: nnx.Rngs,
    ):
        """shape: (resolution, resolution, channels) of an image."""
        if not isinstance(condition, Classes):
            raise ValueError("EDM2's U-Net supports class labels only")
        self.num_classes = condition.num_classes
        width, dtype, float32 = settings.widths[0], jnp.dtype(settings.dtype), jnp.dtype(jnp.float32)

        def make_block(shape: BlockShape) -> Block:
            return Block(shape, settings, placement=placement, rngs=rngs)

        super().__init__(
            settings, settings.preconditioning, channels=shape[-1], placement=placement, make_block=make_block
        )
        # Both are random but not learned.
        self.frequencies = nnx.Param(2 * jnp.pi * jax.random.normal(rngs.params(), (width,)))
        self.phases = nnx.Param(2 * jnp.pi * jax.random.uniform(rngs.params(), (width,)))
        self.noise = Weights(width, 4 * width, dtype=float32, rngs=rngs)
        self.labels = Weights(condition.num_classes, 4 * width, dtype=float32, rngs=rngs)
        if takes_end:
            self.end = Weights(width, 4 * width, dtype=float32, rngs=rngs)
            self.end_gain = nnx.Param(jnp.zeros(()))
        self.conv_in = Weights(3, 3, shape[-1] + 1, width, dtype=dtype, rngs=rngs)
        self.conv_out = Weights(3, 3, width, shape[-1], dtype=float32, rngs=rngs)
        self.out_gain = nnx.Param(jnp.zeros(()))

    def predict(
        self,
        x: Float[Array, "B H W C"],
        level: Float[Array, " B"],
        cond: Cond,
        key: jax.Array | None,
        logsnr_u: Float[Array, " B"] | None = None,
    ) -> Float[Array, "B H W C"]:
        """F: what the network predicts, for an input and a noise level as it was trained to see them."""
        emb = self.placement.constrain(self.embedding(level, cond, logsnr_u).astype(self.conv_in.dtype))
        # The channel of ones takes the place of a bias.
        h = self.placement.constrain(self.conv_in(jnp.pad(x, [(0, 0)] * 3 + [(0, 1)], constant_values=1)))
        h = self.blocks(h, emb, key, join=join)
        return self.conv_out(h, self.out_gain[...])

    def embedding(
        self, level: Float[Array, " B"], cond: Cond, logsnr_u: Float[Array, " B"] | None
    ) -> Float[Array, "B E"]:
        """swish(mix(W_noise fourier(level), W_label label) + end): what every block's scale is made of.

        The end of a step adds gain W_end fourier(level_u), where the gain is zero at first.
        """
        label = jax.nn.one_hot(cond, self.num_classes) * math.sqrt(self.num_classes)
        emb = mix(self.noise(self._fourier(level)), self.labels(label), 0.5)
        if logsnr_u is not None:
            emb += self.end(self._fourier(-logsnr_u / 8), self.end_gain[...])
        return swish(emb)

    def _fourier(self, level: Float[Array, " B"]) -> Float[Array, "B F"]:
        frequencies, phases = jax.lax.stop_gradient((self.frequencies[...], self.phases[...]))
        return math.sqrt(2) * jnp.cos(level[:, None] * frequencies + phases)
