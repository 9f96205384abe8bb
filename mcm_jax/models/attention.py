"""Self-attention softmax(q k^T) v over all positions of a feature map: with einsum, or a fused TPU kernel."""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jaxtyping import Array, Float

# (q, k, v) -> softmax(q k^T) v; q is already scaled.
AttentionFn = Callable[..., Float[Array, "B H L D"]]
# The checkpoint name of the result and of all values that the kernel's gradient needs (see `uvit.Remat`).
NAME = "attention"
_TILE = 128
_LONGEST = 1024


def einsum(
    q: Float[Array, "B H L D"], k: Float[Array, "B H L D"], v: Float[Array, "B H L D"]
) -> Float[Array, "B H L D"]:
    """softmax(q k^T) v with the softmax in float32; stores all B H L^2 weights.

    Examples:
      >>> q = k = v = jnp.ones((1, 2, 4, 8))
      >>> einsum(q, k, v).shape
      (1, 2, 4, 8)
    """
    logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits).astype(v.dtype)
    return checkpoint_name(jnp.einsum("bhqk,bhkd->bhqd", weights, v), NAME)


def fused(
    q: Float[Array, "B H L D"],
    k: Float[Array, "B H L D"],
    v: Float[Array, "B H L D"],
    *,
    interpret: bool = False,
) -> Float[Array, "B H L D"]:
    """softmax(q k^T) v by JAX's splash attention, whose weights never leave a TPU's vector memory.

    Falls back to `einsum` if L or D is not a multiple of 128 (the kernel's tile size) or L exceeds 1024: the
    kernel holds whole rows of weights, and longer rows do not fit. The compiler cannot partition a kernel
    over devices; under a mesh, wrap it in `shard_map`.

    Args:
      interpret: run the kernel in Pallas's interpreter (slow), for tests without a TPU.
    """
    _, heads, length, width = q.shape
    if length % _TILE or width % _TILE or length > _LONGEST:
        return einsum(q, k, v)
    # A single block, which holds whole rows of weights.
    sizes = splash_attention_kernel.BlockSizes(
        block_q=length,
        block_kv=length,
        block_q_dkv=length,
        block_kv_dkv=length,
        block_kv_dkv_compute=length,
        use_fused_bwd_kernel=True,
    )
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((length, length))] * heads)
    kernel = splash_attention_kernel.make_splash_mha(
        mask,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=NAME,
        interpret=interpret,
    )
    # The kernel returns a tuple only if it saves residuals.
    return cast(Array, jax.vmap(kernel)(q, k, v))
