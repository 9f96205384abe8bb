"""The two residual blocks of UViT (SPEC 6; simple diffusion, arXiv:2301.11093, appendix B)."""

from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

Norm = Literal["layer", "group"]
_zeros = nnx.initializers.zeros


def _modulate(
    h: Float[Array, "B *space C"], scale_shift: Float[Array, "B 2*C"]
) -> Float[Array, "B *space C"]:
    """h (1 + scale) + shift, the same for all positions of an example."""
    shape = (h.shape[0],) + (1,) * (h.ndim - 2) + (-1,)
    scale, shift = (part.reshape(shape) for part in jnp.split(scale_shift, 2, axis=-1))
    return h * (1 + scale) + shift


class ResNetBlock(nnx.Module):
    """x + conv(dropout(swish(modulate(norm(conv(swish(norm(x)))))))), 3x3, the last zero at first."""

    def __init__(
        self,
        width: int,
        *,
        embedding_width: int,
        dropout: float,
        norm: Norm,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        """`norm` is not in the paper: layer norm over channels (ours), or group norm of at most 32 groups."""

        def make_norm() -> nnx.Module:
            if norm == "layer":
                return nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
            return nnx.GroupNorm(width, num_groups=min(32, width // 4), dtype=dtype, rngs=rngs)

        self.norm_1 = make_norm()
        self.conv_1 = nnx.Conv(width, width, (3, 3), dtype=dtype, rngs=rngs)
        self.modulation = nnx.Linear(embedding_width, 2 * width, dtype=dtype, rngs=rngs)
        self.norm_2 = make_norm()
        self.dropout = nnx.Dropout(dropout)
        self.conv_2 = nnx.Conv(width, width, (3, 3), dtype=dtype, kernel_init=_zeros, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B H W C"], emb: Float[Array, "B E"], key: jax.Array | None
    ) -> Float[Array, "B H W C"]:
        h = self.conv_1(jax.nn.swish(self.norm_1(x)))
        h = _modulate(self.norm_2(h), self.modulation(emb))
        h = self.dropout(jax.nn.swish(h), deterministic=key is None, rngs=key)
        return x + self.conv_2(h)


class SelfAttention(nnx.Module):
    """softmax(n(q) n(k)^T / sqrt(head width)) v with layer-normalised q and k, output zero at first."""

    def __init__(self, width: int, *, head_width: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.head_width = head_width
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm_q = nnx.LayerNorm(head_width, dtype=dtype, rngs=rngs)
        self.norm_k = nnx.LayerNorm(head_width, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(width, width, dtype=dtype, kernel_init=_zeros, rngs=rngs)

    def __call__(self, x: Float[Array, "B L C"]) -> Float[Array, "B L C"]:
        q, k, v = rearrange(self.qkv(x), "b l (n h d) -> n b h l d", n=3, d=self.head_width)
        scale = self.head_width**-0.5
        logits = jnp.einsum("bhqd,bhkd->bhqk", self.norm_q(q) * scale, self.norm_k(k))
        weights = jax.nn.softmax(logits.astype(jnp.float32)).astype(v.dtype)
        h = jnp.einsum("bhqk,bhkd->bhqd", weights, v)
        return self.out(rearrange(h, "b h l d -> b l (h d)"))


class TransformerBlock(nnx.Module):
    """x + mlp(norm(x)), then x + attention(norm(x)); scale and shift at the MLP's hidden width."""

    def __init__(
        self,
        width: int,
        *,
        embedding_width: int,
        head_width: int,
        mlp_factor: int,
        dropout: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        hidden = mlp_factor * width
        self.norm_mlp = nnx.LayerNorm(width, use_bias=False, dtype=dtype, rngs=rngs)
        self.mlp_in = nnx.Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.modulation = nnx.Linear(embedding_width, 2 * hidden, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)
        self.mlp_out = nnx.Linear(hidden, width, dtype=dtype, kernel_init=_zeros, rngs=rngs)
        self.norm_attention = nnx.LayerNorm(width, use_bias=False, dtype=dtype, rngs=rngs)
        self.attention = SelfAttention(width, head_width=head_width, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B L C"], emb: Float[Array, "B E"], key: jax.Array | None
    ) -> Float[Array, "B L C"]:
        h = jax.nn.swish(self.mlp_in(self.norm_mlp(x)))
        h = _modulate(h, self.modulation(emb))
        h = self.dropout(h, deterministic=key is None, rngs=key)
        x = x + self.mlp_out(h)
        return x + self.attention(self.norm_attention(x))
