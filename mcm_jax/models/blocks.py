"""The two residual blocks of UViT (SPEC 6; simple diffusion, arXiv:2301.11093, appendix B)."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from mcm_jax.models.attention import AttentionFn

# Names of a block's values that can be saved for the gradient while all others are recomputed.
Saved = Literal["conv_1", "mlp_in", "qkv", "attention"]
Norm = Literal["layer", "group"]
_zeros = nnx.initializers.zeros


class Text(NamedTuple):
    """Embedded tokens that feature maps attend to, and which of them exist."""

    tokens: Float[Array, "B T D"]
    mask: Bool[Array, "B T"]


def modulate(h: Float[Array, "B *space C"], scale_shift: Float[Array, "B 2*C"]) -> Float[Array, "B *space C"]:
    """h (1 + scale) + shift, with the same scale and shift at all positions of an example."""
    shape = (h.shape[0],) + (1,) * (h.ndim - 2) + (-1,)
    scale, shift = (part.reshape(shape) for part in jnp.split(scale_shift, 2, axis=-1))
    return h * (1 + scale) + shift


def dropout(h: Float[Array, "B L *rest"], rate: float, key: jax.Array | None) -> Float[Array, "B L *rest"]:
    """Zeroes each value with probability `rate`, rounded to the nearest 1/256, and scales up the others.

    Returns h if `key` is None. One random word serves four values, because on a TPU generating random words
    costs more than the layer that uses them.

    Args:
      rate: at most 255/256.
    """
    kept = 256 - round(256 * rate)
    if key is None or kept == 256:
        return h
    examples, length, *rest = h.shape
    words = jax.random.bits(key, (examples, 1, -(-length // 4), *rest), jnp.uint32)
    # Without the barrier, the compiler would regenerate the words for each of the four values.
    words = jax.lax.optimization_barrier(words)
    # Test whether byte n of a word is below `kept`, without shifting it down.
    unit = (1 << jnp.arange(0, 32, 8, dtype=jnp.uint32)).reshape(1, 4, *(1,) * (h.ndim - 1))
    # Without this barrier, the compiler writes a whole word per value where one bit is enough.
    stays = jax.lax.optimization_barrier((words & (0xFF * unit)) < kept * unit)
    return jnp.where(stays.reshape(examples, -1, *rest)[:, :length], h * (256 / kept), 0)


def doubled(x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W C"]:
    """Repeats every pixel twice in height and in width."""
    # Along the width, multiply by a 0/1 matrix, which is faster on a TPU than moving pixels.
    twice = jnp.repeat(jnp.eye(x.shape[2], dtype=x.dtype), 2, axis=0)
    # HIGHEST makes this exact on accelerators that round float32 products by default.
    wide = jnp.einsum("vw,bhwc->bhvc", twice, x, precision=jax.lax.Precision.HIGHEST)
    return repeat(wide, "b h w c -> b (h i) w c", i=2)


class GroupNorm(nnx.Module):
    """(x - mean) / sqrt(variance + epsilon) scale + bias, with moments per group of channels, in float32.

    Gives the same result as nnx.GroupNorm but sums over space first and over channels last: sums over a part
    of the channels cross the lanes of a TPU, which takes longer (by its compiler's estimate).
    """

    def __init__(self, width: int, *, groups: int, epsilon: float = 1e-6):
        self.groups, self.epsilon = groups, epsilon
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "B *space C"]) -> Float[Array, "B *space C"]:
        wide, space = x.astype(jnp.float32), tuple(range(1, x.ndim - 1))

        def average(values: Array) -> Array:
            groups = rearrange(jnp.mean(values, space), "b (g c) -> b g c", g=self.groups)
            return repeat(jnp.mean(groups, axis=-1), "b g -> b (g c)", c=groups.shape[-1])

        mean = average(wide)
        variance = jnp.maximum(average(wide**2) - mean**2, 0)
        factor = jax.lax.rsqrt(variance + self.epsilon) * self.scale[...]
        offset = self.bias[...] - mean * factor
        return (wide * jnp.expand_dims(factor, space) + jnp.expand_dims(offset, space)).astype(x.dtype)


def make_norm(norm: Norm, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
    """Layer norm over channels, or group norm with at most 32 groups; the paper does not state which."""
    if norm == "layer":
        return nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
    return GroupNorm(width, groups=min(32, width // 4))


class ResNetBlock(nnx.Module):
    """x + conv(dropout(swish(modulate(norm(conv(swish(norm(x)))))))).

    Both convolutions are 3x3; the second is initialised to zero.
    """

    def __init__(
        self,
        width: int,
        *,
        dropout: float,
        norm: Norm,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.norm_1 = make_norm(norm, width, dtype=dtype, rngs=rngs)
        self.conv_1 = nnx.Conv(width, width, (3, 3), dtype=dtype, rngs=rngs)
        self.norm_2 = make_norm(norm, width, dtype=dtype, rngs=rngs)
        self.rate = dropout
        self.conv_2 = nnx.Conv(width, width, (3, 3), dtype=dtype, kernel_init=_zeros, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B H W C"], scale_shift: Float[Array, "B 2*C"], key: jax.Array | None
    ) -> Float[Array, "B H W C"]:
        h = checkpoint_name(self.conv_1(jax.nn.swish(self.norm_1(x))), "conv_1")
        h = modulate(self.norm_2(h), scale_shift)
        h = dropout(jax.nn.swish(h), self.rate, key)
        return x + self.conv_2(h)


@jax.custom_vjp
def layer_norm(
    x: Float[Array, "*B C"], scale: Float[Array, " C"], bias: Float[Array, " C"]
) -> Float[Array, "*B C"]:
    """(x - mean) / sqrt(variance + 1e-6) scale + bias over the last axis, in float32; returns x's dtype.

    Only x and its moments are saved for the gradient: on a TPU the other intermediate values cost more to
    store than to recompute. It has no forward derivative; `plain_layer_norm` has.
    """
    return _layer_norm(x, scale, bias)[0]


def plain_layer_norm(
    x: Float[Array, "*B C"], scale: Float[Array, " C"], bias: Float[Array, " C"]
) -> Float[Array, "*B C"]:
    """`layer_norm` with JAX's own derivatives."""
    return _layer_norm(x, scale, bias)[0]


def _layer_norm(x: Array, scale: Array, bias: Array) -> tuple[Array, tuple[Array, ...]]:
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.maximum(jnp.mean(wide**2, axis=-1, keepdims=True) - mean**2, 0)
    inverse = jax.lax.rsqrt(variance + 1e-6)
    factor = inverse * scale
    return (wide * factor + (bias - mean * factor)).astype(x.dtype), (x, mean, inverse, scale)


def _layer_norm_gradient(residuals: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array]:
    x, mean, inverse, scale = residuals
    gradient = gradient.astype(jnp.float32)
    normalised = (x.astype(jnp.float32) - mean) * inverse
    inner = gradient * scale
    along = jnp.mean(inner * normalised, axis=-1, keepdims=True)
    x_gradient = inverse * (inner - jnp.mean(inner, axis=-1, keepdims=True) - normalised * along)
    # Without the barrier, the products for the gradients of weights and of inputs would each recompute this.
    x_gradient = jax.lax.optimization_barrier(x_gradient.astype(x.dtype))
    over = tuple(range(x.ndim - 1))
    return x_gradient, jnp.sum(gradient * normalised, over), jnp.sum(gradient, over)


layer_norm.defvjp(_layer_norm, _layer_norm_gradient)


@jax.custom_jvp
def _apart(x: Array) -> Array:
    """Returns x and prevents the compiler from fusing it into its consumers; the gradient may be fused."""
    return jax.lax.optimization_barrier(x)


_apart.defjvp(lambda primals, tangents: (_apart(*primals), *tangents))


# (x, scale, bias) -> normalised x, over the last axis.
NormFn = Callable[[Array, Array, Array], Array]


class SelfAttention(nnx.Module):
    """softmax(n(q) n(k)^T / sqrt(head width)) v, n a layer norm; the output is initialised to zero.

    The keys and values of a text are concatenated to those of the feature map.
    """

    def __init__(
        self,
        width: int,
        *,
        head_width: int,
        text_width: int | None,
        attend: AttentionFn,
        head_norm: NormFn,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        """text_width: width of the text's tokens; None if there is no text."""
        self.head_width, self.attend, self.head_norm = head_width, attend, head_norm
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm_q = nnx.LayerNorm(head_width, dtype=dtype, rngs=rngs)
        self.norm_k = nnx.LayerNorm(head_width, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(width, width, dtype=dtype, kernel_init=_zeros, rngs=rngs)
        if text_width is not None:
            self.text_kv = nnx.Linear(text_width, 2 * width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B L C"], text: Text | None = None) -> Float[Array, "B L C"]:
        # Separate products for q, k and v, so that each is written in the layout that attention reads.
        kernel = rearrange(self.qkv.kernel[...], "c (n h d) -> n c h d", n=3, d=self.head_width)
        q, k, v = checkpoint_name(
            [jnp.einsum("blc,chd->bhld", x, part) for part in kernel.astype(x.dtype)], "qkv"
        )
        mask = None
        if text is not None:
            kernel = rearrange(self.text_kv.kernel[...], "c (n h d) -> n c h d", n=2, d=self.head_width)
            k, v = (
                jnp.concatenate([part, jnp.einsum("blc,chd->bhld", text.tokens, its)], axis=2)
                for part, its in zip((k, v), kernel.astype(x.dtype), strict=True)
            )
            mask = jnp.pad(text.mask, ((0, 0), (x.shape[1], 0)), constant_values=True)
        q, k = (self._normalised(part, norm) for part, norm in ((q, self.norm_q), (k, self.norm_k)))
        h = self.attend(q * self.head_width**-0.5, k, v, mask)
        assert self.out.bias is not None
        kernel = rearrange(self.out.kernel[...], "(h d) c -> h d c", d=self.head_width).astype(h.dtype)
        return jnp.einsum("bhld,hdc->blc", h, kernel) + self.out.bias[...].astype(h.dtype)

    def _normalised(self, heads: Float[Array, "B H L D"], norm: nnx.LayerNorm) -> Float[Array, "B H L D"]:
        assert norm.scale is not None and norm.bias is not None
        return self.head_norm(heads, norm.scale[...], norm.bias[...])


class TransformerBlock(nnx.Module):
    """x + mlp(norm(x)), then x + attention(norm(x)); scale and shift act on the MLP's hidden channels."""

    def __init__(
        self,
        width: int,
        *,
        hidden: int,
        head_width: int,
        text_width: int | None,
        attend: AttentionFn,
        head_norm: NormFn,
        dropout: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        """hidden: number of channels inside the MLP."""
        self.norm_mlp = nnx.LayerNorm(width, use_bias=False, dtype=dtype, rngs=rngs)
        self.mlp_in = nnx.Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.rate = dropout
        self.mlp_out = nnx.Linear(hidden, width, dtype=dtype, kernel_init=_zeros, rngs=rngs)
        self.norm_attention = nnx.LayerNorm(width, use_bias=False, dtype=dtype, rngs=rngs)
        self.attention = SelfAttention(
            width,
            head_width=head_width,
            text_width=text_width,
            attend=attend,
            head_norm=head_norm,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        x: Float[Array, "B L C"],
        scale_shift: Float[Array, "B M"],
        text: Text | None,
        key: jax.Array | None,
    ) -> Float[Array, "B L C"]:
        # Otherwise, without a gradient, a TPU's compiler fuses both products into one slower operation.
        h = jax.nn.swish(_apart(checkpoint_name(self.mlp_in(self.norm_mlp(x)), "mlp_in")))
        h = modulate(h, scale_shift)
        h = dropout(h, self.rate, key)
        x = x + self.mlp_out(h)
        return x + self.attention(self.norm_attention(x), text)
