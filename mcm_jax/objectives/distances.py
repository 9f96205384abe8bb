"""How far a prediction is from its target, and how much that counts at a noise level (SPEC 4, 5)."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from mcm_jax.diffusion import process

Distance = Literal["huber", "squared"]
Reduction = Literal["mean", "sum"]
LossWeight = Literal["snr_plus_one", "sqrt_snr_plus_one", "max_snr_one"]


def distance(
    x_diff: Float[Array, "B ..."], *, kind: Distance, huber_epsilon: float, reduction: Reduction = "mean"
) -> Float[Array, " B"]:
    """`pseudo_huber` or ||x_diff||^2 / d ("squared"; not divided by d under "sum"), one value an example."""
    square = process.mean_square(x_diff)
    if reduction == "sum":
        square = square * (x_diff.size // x_diff.shape[0])
    return square if kind == "squared" else pseudo_huber(square, epsilon=huber_epsilon)


def pseudo_huber(square: Float[Array, " B"], *, epsilon: float) -> Float[Array, " B"]:
    """sqrt(m + epsilon^2) - epsilon of m = ||x_diff||^2 / d, per example.

    Small epsilon: the unsquared distance; large: the squared one, scaled. Not in the paper: sum or
    mean over d; we chose the mean because only then is epsilon = 1 the "scaled squared l2 loss" that
    the paper calls it. Computed without the difference, which cancels in float32 for small m.
    """
    return square / (jnp.sqrt(square + epsilon**2) + epsilon)


def weight(logsnr_t: Float[Array, " B"], *, kind: LossWeight) -> Float[Array, " B"]:
    """w_t = SNR(t) + 1 ("snr_plus_one", the paper's "for instance"), its square root, or max(SNR(t), 1).

    Times the squared distance in x, SNR + 1 is the squared distance in v; for the unsquared distance of
    a small huber_epsilon it is sqrt(SNR + 1) that does so. max(SNR, 1) is that of progressive distillation
    and TRACT, the larger of the squared distances in x and in eps.
    """
    snr = jnp.exp(logsnr_t)
    if kind == "max_snr_one":
        return jnp.maximum(snr, 1.0)
    return 1 + snr if kind == "snr_plus_one" else jnp.sqrt(1 + snr)
