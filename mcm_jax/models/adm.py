"""ADM's U-Net (arXiv:2105.05233).

EDM on ImageNet (arXiv:2206.00364) and consistency models (arXiv:2303.01469) use the same network.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mcm_jax.diffusion.conditions import Cond
from mcm_jax.fields import Affects, setting
from mcm_jax.models import unet
from mcm_jax.models.blocks import GroupNorm, dropout, modulate
from mcm_jax.models.conditions import Classes, Condition
from mcm_jax.models.embeddings import StepEnd, sinusoidal
from mcm_jax.models.placement import Placement
from mcm_jax.models.preconditioning import Preconditioning, predicts_eps
from mcm_jax.models.unet import BlockShape, UNet, UNetSettings

_zeros = nnx.initializers.zeros


@dataclasses.dataclass(frozen=True)
class ADMSettings(UNetSettings):
    """All sizes of ADM's U-Net and how it computes."""

    heads: int = setting(
        0, "attention heads at every width; 0: one for every head_width channels", low=0, affects=Affects.ALL
    )
    groups: int = setting(32, "maximum number of groups of a group norm", low=1, affects=Affects.ALL)
    group_width: int = setting(4, "minimum channels per group", low=1, affects=Affects.ALL)
    preconditioning: Preconditioning = setting(
        "edm",
        "what the network predicts, and its input for the noise level: edm (EDM), edm_1000 and consistency "
        "(openai/consistency_models: the teacher and its students), eps_cosine and eps_linear (ADM at 64x64 "
        "and 128x128)",
        affects=Affects.ALL,
    )

    def num_groups(self, width: int) -> int:
        """Groups of a group norm over `width` channels."""
        return max(1, min(self.groups, width // self.group_width))

    def num_heads(self, width: int) -> int:
        """Heads of attention over `width` channels."""
        return self.heads or super().num_heads(width)

    def build(
        self,
        shape: tuple[int, ...],
        *,
        condition: Condition,
        takes_end: bool,
        placement: Placement,
        rngs: nnx.Rngs,
    ) -> "ADM":
        """Builds the network for images of shape (resolution, resolution, channels)."""
        return ADM(self, shape, condition=condition, takes_end=takes_end, placement=placement, rngs=rngs)


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
        return x + self.proj(unet.attended(qkv, heads=self.heads, attend=self.attend))


class Block(nnx.Module):
    """skip(x) + conv(dropout(swish(modulate(norm(conv(resampled(swish(norm(x))))))))), then attention."""

    def __init__(self, shape: BlockShape, settings: ADMSettings, *, placement: Placement, rngs: nnx.Rngs):
        c_in, dtype = shape.c_joined, jnp.dtype(settings.dtype)
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


class ADM(UNet):
    """See `UNet`."""

    def __init__(
        self,
        settings: ADMSettings,
        shape: tuple[int, ...],
        *,
        condition: Condition,
        takes_end: bool,
        placement: Placement,
        rngs: nnx.Rngs,
    ):
        """shape: (resolution, resolution, channels) of an image."""
        if not isinstance(condition, Classes):
            raise ValueError("ADM's U-Net supports class labels only")
        width, dtype = settings.widths[0], jnp.dtype(settings.dtype)

        def make_block(shape: BlockShape) -> Block:
            return Block(shape, settings, placement=placement, rngs=rngs)

        super().__init__(
            settings,
            settings.preconditioning,
            channels=shape[-1],
            placement=placement,
            make_block=make_block,
        )
        self.dense_1 = nnx.Linear(width, 4 * width, rngs=rngs)
        self.dense_2 = nnx.Linear(4 * width, 4 * width, rngs=rngs)
        labels = jax.random.normal(rngs.params(), (condition.num_classes, 4 * width))
        self.labels = nnx.Param(labels)
        if takes_end:
            self.end = StepEnd(width=4 * width, scale="smooth", rngs=rngs)
        self.conv_in = nnx.Conv(self.channels, width, (3, 3), dtype=dtype, rngs=rngs)
        self.norm_out = _norm(width, settings)
        # ADM also predicts the variance of its sampler, which is ignored here.
        c_out = self.channels * (2 if predicts_eps(settings.preconditioning) else 1)
        self.conv_out = nnx.Conv(width, c_out, (3, 3), kernel_init=_zeros, rngs=rngs)

    def predict(
        self,
        x: Float[Array, "B H W C"],
        level: Float[Array, " B"],
        cond: Cond,
        key: jax.Array | None,
        logsnr_u: Float[Array, " B"] | None = None,
    ) -> Float[Array, "B H W D"]:
        """F: what the network predicts, for an input and a noise level as it was trained to see them."""
        emb = self.placement.constrain(self.embedding(level, cond, logsnr_u).astype(self.conv_in.dtype))
        h = self.placement.constrain(self.conv_in(x.astype(self.conv_in.dtype)))
        h = self.blocks(h, emb, key, join=lambda a, b: jnp.concatenate([a, b], axis=-1))
        return self.conv_out(jax.nn.swish(self.norm_out(h.astype(jnp.float32))))

    def embedding(
        self, level: Float[Array, " B"], cond: Cond, logsnr_u: Float[Array, " B"] | None
    ) -> Float[Array, "B E"]:
        """swish(W2 swish(W1 sinusoidal(level)) + label + end), the input of every block's scale and shift."""
        sin, cos = jnp.split(sinusoidal(level, width=self.dense_1.in_features), 2, axis=-1)
        h = self.dense_2(jax.nn.swish(self.dense_1(jnp.concatenate([cos, sin], axis=-1))))
        label = jnp.take(self.labels[...], cond, axis=0, mode="fill", fill_value=0)
        return jax.nn.swish(h + label if logsnr_u is None else h + label + self.end(logsnr_u))


def _norm(width: int, settings: ADMSettings) -> GroupNorm:
    return GroupNorm(width, groups=settings.num_groups(width), epsilon=1e-5)
