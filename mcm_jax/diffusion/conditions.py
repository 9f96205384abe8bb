"""Conditions of images: a pytree of arrays with a leading batch axis, such as class labels [B].

The null condition is one without a batch axis: 'any class', or no caption.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree, Shaped

from mcm_jax.diffusion import process

Cond = PyTree[Shaped[Array, "B ..."]]
NullCond = PyTree


def unconditional(cond: Cond, null_cond: NullCond) -> Cond:
    """The null condition for every example of `cond`.

    Examples:
      >>> unconditional(jnp.array([3, 5]), 10).tolist()
      [10, 10]
    """
    return jax.tree.map(
        lambda leaf, null: jnp.broadcast_to(jnp.asarray(null, leaf.dtype), leaf.shape), cond, null_cond
    )


def drop(cond: Cond, dropped: Bool[Array, " B"], null_cond: NullCond) -> Cond:
    """Replaces the condition of the examples in `dropped` by the null condition.

    Examples:
      >>> drop(jnp.array([3, 5]), jnp.array([False, True]), 10).tolist()
      [3, 10]
    """
    return jax.tree.map(
        lambda leaf, null: jnp.where(process.over_pixels(dropped, leaf), null, leaf),
        cond,
        unconditional(cond, null_cond),
    )
