"""EDM2's magnitude-preserving U-Net (arXiv:2312.02696, config G).

Every layer preserves the expected magnitude of its input: the weights of an output channel have unit length,
and sums and concatenations are scaled. There are no biases, and no norms except that of the encoder's pixels.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, PyTree

from mcm_jax.diffusion.conditions import Cond
from mcm_jax.fields import Affects, setting
from mcm_jax.models import preconditioning, unet
from mcm_jax.models.blocks import dropout
from mcm_jax.models.conditions import Classes, Condition
from mcm_jax.models.placement import Placement
from mcm_jax.models.remat import call_block, split_key
from mcm_jax.models.unet import BlockShape

_EPSILON = 1e-4
# Share of the block's own branch, and of its attention, in its output.
_BALANCE = 0.3
_CLIP = 256.0


@dataclasses.dataclass(frozen=True)
class EDM2Settings:
    """All sizes of EDM2's U-Net and how it computes. Levels are listed from the top resolution down."""

    widths: tuple[int, ...] = setting(
        (192, 384, 576, 768), "channels of each level", low=1, affects=Affects.ALL
    )
    blocks: int = setting(3, "blocks of each level in the encoder", low=1, affects=Affects.ALL)
    attention_levels: tuple[bool, ...] = setting(
        (False, False, True, True), "whether the blocks of each level have attention", affects=Affects.ALL
    )
    head_width: int = setting(64, "channels of an attention head", low=1, affects=Affects.ALL)
    dropout: float = setting(0.0, "dropout of every block, to the nearest 1/256", low=0, high=0.99)
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "dtype of the activations", affects=Affects.TRAINING | Affects.SAMPLES
    )
    remat: Literal["none", "full"] = setting(
        "none", "what the backward pass recomputes: nothing (none) or every block", affects=Affects.NOTHING
    )
    attention: Literal["fused", "einsum"] = setting(
        "fused",
        "fused: a fused kernel if the devices are TPUs and the number of positions is a multiple of 128, at "
        "most 1024, otherwise einsum; einsum: never a fused kernel",
        affects=Affects.NOTHING,
    )

    def num_heads(self, width: int) -> int:
        """Heads of attention over `width` channels."""
        return max(1, width // self.head_width)

    def build(
        self, shape: tuple[int, ...], *, condition: Condition, placement: Placement, rngs: nnx.Rngs
    ) -> "EDM2":
        """Builds the network for images of shape (resolution, resolution, channels)."""
        return EDM2(self, shape, condition=condition, placement=placement, rngs=rngs)


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
        qkv = rearrange(self.qkv(x), "b h w (n heads d) -> n b heads (h w) d", n=3, heads=self.heads)
        q, k, v = pixel_norm(qkv)
        h = self.attend(q * q.shape[-1] ** -0.5, k, v)
        return mix(x, self.proj(rearrange(h, "b heads (h w) d -> b h w (heads d)", h=x.shape[1])), _BALANCE)


class Block(nnx.Module):
    """mix(x, conv(dropout(swish(conv(swish(x)) (1 + gain W emb))))), then attention."""

    def __init__(
        self,
        shape: BlockShape,
        settings: EDM2Settings,
        *,
        is_encoder: bool,
        placement: Placement,
        rngs: nnx.Rngs,
    ):
        c_in, c_out, dtype = shape.c_in + shape.c_skip, shape.c_out, jnp.dtype(settings.dtype)
        self.resampling: unet.Resampling | None = shape.resampling
        self.rate, self.is_encoder = settings.dropout, is_encoder
        self.conv_0 = Weights(3, 3, c_out if is_encoder else c_in, c_out, dtype=dtype, rngs=rngs)
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


class EDM2(nnx.Module):
    """(z_t, log-SNR, label, dropout key) -> v_hat, in float32 whatever precision the layers compute in."""

    def __init__(
        self,
        settings: EDM2Settings,
        shape: tuple[int, ...],
        *,
        condition: Condition,
        placement: Placement,
        rngs: nnx.Rngs,
    ):
        """shape: (resolution, resolution, channels) of an image."""
        if not isinstance(condition, Classes):
            raise ValueError("EDM2's U-Net supports class labels only")
        self.settings, self.placement, self.num_classes = settings, placement, condition.num_classes
        width, dtype, float32 = settings.widths[0], jnp.dtype(settings.dtype), jnp.dtype(jnp.float32)
        sizes = settings.widths, settings.blocks, settings.attention_levels

        def make_block(shape: BlockShape, is_encoder: bool) -> Block:
            return Block(shape, settings, is_encoder=is_encoder, placement=placement, rngs=rngs)

        # Both are random but not learned.
        self.frequencies = nnx.Param(2 * jnp.pi * jax.random.normal(rngs.params(), (width,)))
        self.phases = nnx.Param(2 * jnp.pi * jax.random.uniform(rngs.params(), (width,)))
        self.noise = Weights(width, 4 * width, dtype=float32, rngs=rngs)
        self.labels = Weights(condition.num_classes, 4 * width, dtype=float32, rngs=rngs)
        self.conv_in = Weights(3, 3, shape[-1] + 1, width, dtype=dtype, rngs=rngs)
        self.encoder = nnx.List(make_block(shape, is_encoder=True) for shape in unet.encoder(*sizes))
        self.decoder = nnx.List(make_block(shape, is_encoder=False) for shape in unet.decoder(*sizes))
        self.takes_skip = tuple(shape.c_skip > 0 for shape in unet.decoder(*sizes))
        self.conv_out = Weights(3, 3, width, shape[-1], dtype=float32, rngs=rngs)
        self.out_gain = nnx.Param(jnp.zeros(()))

    def __call__(
        self,
        z_t: Float[Array, "B H W C"],
        logsnr_t: Float[Array, " B"],
        cond: Cond,
        key: jax.Array | None,
    ) -> Float[Array, "B H W C"]:
        """Predicts v.

        Args:
          cond: labels; the network was not trained for the last one, 'any class', whose embedding is zero.
          key: the randomness of dropout; None disables it.
        """
        return preconditioning.v_hat("edm", lambda x, level: self.predict(x, level, cond, key), z_t, logsnr_t)

    def predict(
        self, x: Float[Array, "B H W C"], level: Float[Array, " B"], cond: Cond, key: jax.Array | None
    ) -> Float[Array, "B H W C"]:
        """F: what the network predicts, for an input and a noise level as it was trained to see them."""
        emb = self.placement.constrain(self.embedding(level, cond).astype(self.conv_in.dtype))
        call = call_block(self.placement, self.settings.remat)
        keys = iter(split_key(key, len(self.encoder) + len(self.decoder)))
        # The channel of ones takes the place of a bias.
        h = self.placement.constrain(self.conv_in(jnp.pad(x, [(0, 0)] * 3 + [(0, 1)], constant_values=1)))
        skips = [h]
        for block in self.encoder:
            h = call(block, h, emb, next(keys))
            skips.append(h)
        for block, takes_skip in zip(self.decoder, self.takes_skip, strict=True):
            h = call(block, join(h, skips.pop()) if takes_skip else h, emb, next(keys))
        return self.conv_out(h, self.out_gain[...])

    def embedding(self, level: Float[Array, " B"], cond: Cond) -> Float[Array, "B E"]:
        """swish(mix(W_noise fourier(level), W_label label)): what every block's scale is made of."""
        frequencies, phases = jax.lax.stop_gradient((self.frequencies[...], self.phases[...]))
        fourier = math.sqrt(2) * jnp.cos(level[:, None] * frequencies + phases)
        label = jax.nn.one_hot(cond, self.num_classes) * math.sqrt(self.num_classes)
        return swish(mix(self.noise(fourier), self.labels(label), 0.5))
