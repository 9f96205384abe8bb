"""Attention softmax(q k^T) v over a feature map and a text: by einsum, or a fused kernel of TPUs or GPUs."""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jaxtyping import Array, Bool, Float

# (q, k, v, mask) -> softmax(q k^T) v; q is already scaled. The mask states which keys exist; None: all.
AttentionFn = Callable[..., Float[Array, "B H L D"]]
# The checkpoint name of the result and of what `splash` needs for its gradient (see `remat.Remat`). What
# `cudnn` needs has no name, so it is computed again.
NAME = "attention"
_TILE = 128
_LONGEST = 1024
_WIDEST = 128


def einsum(
    q: Float[Array, "B H L D"],
    k: Float[Array, "B H K D"],
    v: Float[Array, "B H K D"],
    mask: Bool[Array, "B K"] | None = None,
) -> Float[Array, "B H L D"]:
    """softmax(q k^T) v with the softmax in float32; stores all B H L K weights.

    Args:
      mask: the keys that exist, at least one for each example; None: all.

    Examples:
      >>> q = k = v = jnp.ones((1, 2, 4, 8))
      >>> einsum(q, k, v).shape
      (1, 2, 4, 8)
    """
    logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask[:, None, None, :], logits, -jnp.inf)
    weights = jax.nn.softmax(logits).astype(v.dtype)
    return checkpoint_name(jnp.einsum("bhqk,bhkd->bhqd", weights, v), NAME)


def splash(
    q: Float[Array, "B H L D"],
    k: Float[Array, "B H K D"],
    v: Float[Array, "B H K D"],
    mask: Bool[Array, "B K"] | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "B H L D"]:
    """softmax(q k^T) v by JAX's splash attention, whose weights never leave a TPU's vector memory.

    Falls back to `einsum` if L or K is not a multiple of 128 (the kernel's tile size) or exceeds 1024: the
    kernel holds whole rows of weights, and longer rows do not fit. Narrower heads are padded with zeros. The
    compiler cannot partition a kernel over devices; under a mesh, wrap it in `shard_map`.

    Args:
      mask: as in `einsum`.
      interpret: run the kernel in Pallas's interpreter (slow), for tests without a TPU.
    """
    (_, heads, length, width), keys = q.shape, k.shape[2]
    if length % _TILE or keys % _TILE or max(length, keys) > _LONGEST:
        return einsum(q, k, v, mask)
    q, k, v = (jnp.pad(part, [(0, 0)] * 3 + [(0, -width % _TILE)]) for part in (q, k, v))
    # A single block, which holds whole rows of weights.
    sizes = splash_attention_kernel.BlockSizes(
        block_q=length,
        block_kv=keys,
        block_q_dkv=length,
        block_kv_dkv=keys,
        block_kv_dkv_compute=keys,
        use_fused_bwd_kernel=True,
    )
    every_key = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((length, keys))] * heads)
    kernel = splash_attention_kernel.make_splash_mha(
        every_key,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=NAME,
        interpret=interpret,
    )
    segments = None
    if mask is not None:
        # A query attends to the keys of its segment: all queries are in segment 1, and so are existing keys.
        ones = jnp.ones((len(q), length), jnp.int32)
        segments = splash_attention_kernel.SegmentIds(ones, mask.astype(jnp.int32))
    # The kernel returns a tuple only if it saves residuals.
    return cast(Array, jax.vmap(kernel)(q, k, v, segments))[..., :width]


def cudnn(
    q: Float[Array, "B H L D"],
    k: Float[Array, "B H K D"],
    v: Float[Array, "B H K D"],
    mask: Bool[Array, "B K"] | None = None,
) -> Float[Array, "B H L D"]:
    """softmax(q k^T) v by cuDNN's flash attention, whose weights never leave an NVIDIA GPU's multiprocessors.

    Falls back to `einsum` for what the kernel does not support: float32, heads that are wider than 128 or not
    a multiple of 8, and, with a mask, an odd L or K. The order of the sums in its gradient changes between
    runs.

    Args:
      mask: as in `einsum`.
    """
    (_, _, length, width), keys = q.shape, k.shape[2]
    odd = mask is not None and (length % 2 or keys % 2)
    if q.dtype not in (jnp.bfloat16, jnp.float16) or width % 8 or width > _WIDEST or odd:
        return einsum(q, k, v, mask)
    by_position = [rearrange(part, "b h l d -> b l h d") for part in (q, k, v)]
    if mask is not None:
        mask = jnp.broadcast_to(mask[:, None, None, :], (len(q), 1, length, keys))
    h = jax.nn.dot_product_attention(*by_position, mask=mask, scale=1.0, implementation="cudnn")
    return checkpoint_name(rearrange(h, "b l h d -> b h l d"), NAME)


def fused(platform: str) -> AttentionFn | None:
    """The fused kernel of a platform, None if there is none; "cuda" stands for NVIDIA GPUs since Ampere."""
    kernels: dict[str, AttentionFn] = {"tpu": splash, "cuda": cudnn}
    return kernels.get(platform)
