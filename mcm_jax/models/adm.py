"""ADM's U-Net (arXiv:2105.05233).

EDM on ImageNet (arXiv:2206.00364) and consistency models (arXiv:2303.01469) use the same network.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from mcm_jax.diffusion.conditions import Cond
from mcm_jax.fields import Affects, setting
from mcm_jax.models import preconditioning, unet
from mcm_jax.models.blocks import GroupNorm, dropout, modulate
from mcm_jax.models.conditions import Classes, Condition
from mcm_jax.models.embeddings import sinusoidal
from mcm_jax.models.placement import Placement
from mcm_jax.models.preconditioning import Preconditioning
from mcm_jax.models.remat import call_block, split_key
from mcm_jax.models.unet import BlockShape

_zeros = nnx.initializers.zeros


@dataclasses.dataclass(frozen=True)
class ADMSettings:
    """All sizes of ADM's U-Net and how it computes. Levels are listed from the top resolution down."""

    widths: tuple[int, ...] = setting(
        (192, 384, 576, 768), "channels of each level", low=1, affects=Affects.ALL
    )
    blocks: int = setting(3, "blocks of each level in the encoder", low=1, affects=Affects.ALL)
    attention_levels: tuple[bool, ...] = setting(
        (False, True, True, True), "whether the blocks of each level have attention", affects=Affects.ALL
    )
    head_width: int = setting(64, "channels of an attention head", low=1, affects=Affects.ALL)
    heads: int = setting(
        0, "attention heads at every width; 0: one for every head_width channels", low=0, affects=Affects.ALL
    )
    groups: int = setting(32, "largest number of groups of a group norm", low=1, affects=Affects.ALL)
    group_width: int = setting(4, "fewest channels of such a group", low=1, affects=Affects.ALL)
    preconditioning: Preconditioning = setting(
        "edm",
        "what the network predicts, and its input for the noise level: edm (EDM), edm_1000 and consistency "
        "(openai/consistency_models: the teacher and its students), eps_cosine and eps_linear (ADM at 64x64 "
        "and 128x128)",
        affects=Affects.ALL,
    )
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

    @property
    def predicts_variance(self) -> bool:
        """Whether half of the output is the variance of ADM's sampler, which is ignored here."""
        return self.preconditioning == "eps_cosine" or self.preconditioning == "eps_linear"

    def num_groups(self, width: int) -> int:
        """Groups of a group norm over `width` channels."""
        return max(1, min(self.groups, width // self.group_width))

    def num_heads(self, width: int) -> int:
        """Heads of attention over `width` channels."""
        return self.heads or max(1, width // self.head_width)

    def build(
        self, shape: tuple[int, ...], *, condition: Condition, placement: Placement, rngs: nnx.Rngs
    ) -> "ADM":
        """Builds the network for images of shape (resolution, resolution, channels)."""
        return ADM(self, shape, condition=condition, placement=placement, rngs=rngs)


class Attention(nnx.Module):
    """x + proj(softmax(q k^T / sqrt(head width)) v), with q, k, v from group_norm(x)."""

    def __init__(self, width: int, settings: ADMSettings, *, placement: Placement, rngs: nnx.Rngs):
        self.heads = settings.num_heads(width)
        self.attend = placement.attend
        dtype = jnp.dtype(settings.dtype)
        self.norm = _norm(width, settings)
        self.qkv = nnx.Linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.proj = nnx.Linear(width, width, dtype=dtype, kernel_init=_zeros, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        qkv = self.qkv(self.norm(x))
        q, k, v = rearrange(qkv, "b h w (n heads d) -> n b heads (h w) d", n=3, heads=self.heads)
        h = self.attend(q * q.shape[-1] ** -0.5, k, v)
        return x + self.proj(rearrange(h, "b heads (h w) d -> b h w (heads d)", h=x.shape[1]))


class Block(nnx.Module):
    """skip(x) + conv(dropout(swish(modulate(norm(conv(resampled(swish(norm(x))))))))), then attention."""

    def __init__(self, shape: BlockShape, settings: ADMSettings, *, placement: Placement, rngs: nnx.Rngs):
        c_in, dtype = shape.c_in + shape.c_skip, jnp.dtype(settings.dtype)
        self.resampling: unet.Resampling | None = shape.resampling
        self.rate = settings.dropout
        self.norm_0 = _norm(c_in, settings)
        self.conv_0 = nnx.Conv(c_in, shape.c_out, (3, 3), dtype=dtype, rngs=rngs)
        self.affine = nnx.Linear(4 * settings.widths[0], 2 * shape.c_out, dtype=dtype, rngs=rngs)
        self.norm_1 = _norm(shape.c_out, settings)
        self.conv_1 = nnx.Conv(shape.c_out, shape.c_out, (3, 3), dtype=dtype, kernel_init=_zeros, rngs=rngs)
        self.skip = nnx.Linear(c_in, shape.c_out, dtype=dtype, rngs=rngs) if c_in != shape.c_out else None
        attention = functools.partial(Attention, shape.c_out, settings, placement=placement, rngs=rngs)
        self.attention = attention() if shape.attention else None

    def __call__(
        self, x: Float[Array, "B H W C"], emb: Float[Array, "B E"], key: jax.Array | None
    ) -> Float[Array, "B I J D"]:
        h = self.conv_0(unet.resampled(jax.nn.swish(self.norm_0(x)), self.resampling))
        h = jax.nn.swish(modulate(self.norm_1(h), self.affine(emb)))
        h = self.conv_1(dropout(h, self.rate, key))
        x = unet.resampled(x, self.resampling)
        x = h + (x if self.skip is None else self.skip(x))
        return x if self.attention is None else self.attention(x)


class ADM(nnx.Module):
    """(z_t, log-SNR, label, dropout key) -> v_hat, in float32 whatever precision the layers compute in."""

    def __init__(
        self,
        settings: ADMSettings,
        shape: tuple[int, ...],
        *,
        condition: Condition,
        placement: Placement,
        rngs: nnx.Rngs,
    ):
        """shape: (resolution, resolution, channels) of an image."""
        if not isinstance(condition, Classes):
            raise ValueError("ADM's U-Net supports class labels only")
        self.settings, self.channels, self.placement = settings, shape[-1], placement
        width, dtype = settings.widths[0], jnp.dtype(settings.dtype)
        sizes = settings.widths, settings.blocks, settings.attention_levels

        def make_block(shape: BlockShape) -> Block:
            return Block(shape, settings, placement=placement, rngs=rngs)

        self.dense_1 = nnx.Linear(width, 4 * width, rngs=rngs)
        self.dense_2 = nnx.Linear(4 * width, 4 * width, rngs=rngs)
        labels = jax.random.normal(rngs.params(), (condition.num_classes, 4 * width))
        self.labels = nnx.Param(labels)
        self.conv_in = nnx.Conv(self.channels, width, (3, 3), dtype=dtype, rngs=rngs)
        self.encoder = nnx.List(make_block(shape) for shape in unet.encoder(*sizes))
        self.decoder = nnx.List(make_block(shape) for shape in unet.decoder(*sizes))
        self.takes_skip = tuple(shape.c_skip > 0 for shape in unet.decoder(*sizes))
        self.norm_out = _norm(width, settings)
        c_out = self.channels * (2 if settings.predicts_variance else 1)
        self.conv_out = nnx.Conv(width, c_out, (3, 3), kernel_init=_zeros, rngs=rngs)

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
        return preconditioning.v_hat(
            self.settings.preconditioning,
            lambda x, level: self.predict(x, level, cond, key)[..., : self.channels],
            z_t,
            logsnr_t,
        )

    def predict(
        self, x: Float[Array, "B H W C"], level: Float[Array, " B"], cond: Cond, key: jax.Array | None
    ) -> Float[Array, "B H W D"]:
        """F: what the network predicts, for an input and a noise level as it was trained to see them."""
        emb = self.placement.constrain(self.embedding(level, cond).astype(self.conv_in.dtype))
        call = call_block(self.placement, self.settings.remat)
        keys = iter(split_key(key, len(self.encoder) + len(self.decoder)))
        h = self.placement.constrain(self.conv_in(x.astype(self.conv_in.dtype)))
        skips = [h]
        for block in self.encoder:
            h = call(block, h, emb, next(keys))
            skips.append(h)
        for block, takes_skip in zip(self.decoder, self.takes_skip, strict=True):
            if takes_skip:
                h = jnp.concatenate([h, skips.pop()], axis=-1)
            h = call(block, h, emb, next(keys))
        return self.conv_out(jax.nn.swish(self.norm_out(h.astype(jnp.float32))))

    def embedding(self, level: Float[Array, " B"], cond: Cond) -> Float[Array, "B E"]:
        """swish(W2 swish(W1 sinusoidal(level)) + label): what every block's scale and shift are made of."""
        sin, cos = jnp.split(sinusoidal(level, width=self.dense_1.in_features), 2, axis=-1)
        h = self.dense_2(jax.nn.swish(self.dense_1(jnp.concatenate([cos, sin], axis=-1))))
        label = jnp.take(self.labels[...], cond, axis=0, mode="fill", fill_value=0)
        return jax.nn.swish(h + label)


def _norm(width: int, settings: ADMSettings) -> GroupNorm:
    return GroupNorm(width, groups=settings.num_groups(width), epsilon=1e-5)
