"""The layers that the text encoders share: a transformer block, its attention and MLP, masks and means.

All parameters may be stored in bfloat16 or float16; everything is computed in float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32

Activation = Callable[[Array], Array]


class _OneKey:
    """In place of nnx.Rngs, whose counters take a time that grows with the square of the number of layers."""

    def params(self) -> jax.Array:
        return jax.random.key(0)


# Weights are always loaded, so it does not matter how they would be initialised.
RNGS: Any = _OneKey()


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x Phi(x), with the normal distribution's Phi (Hendrycks & Gimpel, arXiv:1606.08415)."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), the approximation with which T5 v1.1 was trained."""
    return jax.nn.gelu(x, approximate=True)


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x sigmoid(1.702 x), with which OpenAI's CLIP was trained."""
    return x * jax.nn.sigmoid(1.702 * x)


def linear(inputs: int, outputs: int, *, use_bias: bool = True) -> nnx.Linear:
    """W x + b in float32."""
    return nnx.Linear(inputs, outputs, use_bias=use_bias, dtype=jnp.float32, rngs=RNGS)


def embedding(count: int, width: int) -> nnx.Embed:
    """A table of `count` vectors in float32."""
    return nnx.Embed(count, width, dtype=jnp.float32, rngs=RNGS)


def layer_norm(width: int, *, epsilon: float) -> nnx.LayerNorm:
    """(x - mean) / sqrt(variance + epsilon) scale + bias.

    The variance is the mean of (x - mean)^2. E[x^2] - mean^2 is faster, but less exact in float32.
    """
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, dtype=jnp.float32, rngs=RNGS)


class Attention(nnx.Module):
    """W_out softmax(scale q k^T + bias) v, in `heads` heads (Vaswani et al., arXiv:1706.03762)."""

    def __init__(self, width: int, *, heads: int, head_width: int, scale: float, use_bias: bool = True):
        """use_bias: whether the four linear layers have biases."""
        self._heads, self._scale = heads, scale
        inner = heads * head_width
        self.q = linear(width, inner, use_bias=use_bias)
        self.k = linear(width, inner, use_bias=use_bias)
        self.v = linear(width, inner, use_bias=use_bias)
        self.out = linear(inner, width, use_bias=use_bias)

    def __call__(
        self, x: Float32[Array, "B L C"], bias: Float32[Array, "#B #H #L L"]
    ) -> Float32[Array, "B L C"]:
        """bias: added to the logits; minus infinity where a position (third axis) must not see another."""
        heads = (
            rearrange(layer(x), "b l (h d) -> b h l d", h=self._heads) for layer in (self.q, self.k, self.v)
        )
        q, k, v = heads
        weights = jax.nn.softmax(self._scale * jnp.einsum("bhqd,bhkd->bhqk", q, k) + bias)
        return self.out(rearrange(jnp.einsum("bhqk,bhkd->bhqd", weights, v), "b h l d -> b l (h d)"))


class MLP(nnx.Module):
    """W_out f(W_in x)."""

    def __init__(self, width: int, hidden: int, activation: Activation):
        self._activation = activation
        self.wi = linear(width, hidden)
        self.wo = linear(hidden, width)

    def __call__(self, x: Float32[Array, "B L C"]) -> Float32[Array, "B L C"]:
        return self.wo(self._activation(self.wi(x)))


class Block(nnx.Module):
    """Attention and an MLP, each added to its input; norms come before (T5, CLIP) or after (BERT)."""

    def __init__(
        self,
        attention: nnx.Module,
        mlp: nnx.Module,
        norms: tuple[nnx.Module, nnx.Module],
        *,
        norm_first: bool,
    ):
        self._norm_first = norm_first
        self.attention, self.mlp = attention, mlp
        self.attention_norm, self.mlp_norm = norms

    def __call__(
        self, x: Float32[Array, "B L C"], bias: Float32[Array, "#B #H #L L"]
    ) -> Float32[Array, "B L C"]:
        if self._norm_first:
            x = x + self.attention(self.attention_norm(x), bias)
            return x + self.mlp(self.mlp_norm(x))
        x = self.attention_norm(x + self.attention(x, bias))
        return self.mlp_norm(x + self.mlp(x))


def biased_block(
    width: int, hidden: int, *, heads: int, activation: Activation, epsilon: float, norm_first: bool
) -> Block:
    """The block of BERT and CLIP: all layers have biases, and all heads together the width of a token."""
    head_width = width // heads
    return Block(
        Attention(width, heads=heads, head_width=head_width, scale=head_width**-0.5),
        MLP(width, hidden, activation),
        (layer_norm(width, epsilon=epsilon), layer_norm(width, epsilon=epsilon)),
        norm_first=norm_first,
    )


def bias_of(visible: Bool[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """0 where True and minus infinity where False, to be added to the logits of attention."""
    return jnp.where(visible, 0.0, -jnp.inf).astype(jnp.float32)


def masked_mean(tokens: Float32[Array, "B L D"], mask: Bool[Array, "B L"]) -> Float32[Array, "B D"]:
    """The mean over the positions at which `mask` is True; each text has one at least."""
    return jnp.sum(tokens * mask[..., None], axis=1) / jnp.sum(mask, axis=1, keepdims=True)
