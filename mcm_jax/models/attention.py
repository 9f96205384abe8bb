"""softmax(q k^T) v of feature maps, every position seeing all: written out, or a TPU's fused kernel."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jaxtyping import Array, Float

# (q, k, v) -> softmax(q k^T) v; q is scaled.
AttentionFn = Callable[..., Float[Array, "B H L D"]]
# What the result is called for rematerialisation (`uvit.Remat`), with all that the kernel's gradient needs.
NAME = "attention"
_TILE = 128
_LONGEST = 1024


def einsum(
    q: Float[Array, "B H L D"], k: Float[Array, "B H L D"], v: Float[Array, "B H L D"]
) -> Float[Array, "B H L D"]:
    """softmax(q k^T) v, the softmax in float32. Holds all B H L^2 weights in memory."""
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
    """The same by JAX's splash attention, whose weights never leave a TPU's vector memory.

    `einsum` where L or D is no multiple of 128, the kernel's tile, and where L is over 1024: whole rows of
    weights are held, and longer ones don't fit. The compiler can't split a kernel over
    devices: under a mesh, wrap it in `shard_map`.

    Args:
      interpret: run the kernel's text without a TPU, slowly, for tests.
    """
    _, heads, length, width = q.shape
    if length % _TILE or width % _TILE or length > _LONGEST:
        return einsum(q, k, v)
    # One block: whole rows of weights.
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
    return jax.vmap(kernel)(q, k, v)
