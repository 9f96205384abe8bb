"""Distances between prediction and target, and their weights at each noise level (SPEC 4, 5)."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from mcm_jax.diffusion import process

Distance = Literal["huber", "squared"]
Reduction = Literal["mean", "sum"]
LossWeight = Literal["snr_plus_one", "sqrt_snr_plus_one", "max_snr_one", "edm", "sqrt_edm", "one"]


def distance(
    x_diff: Float[Array, "B ..."], *, kind: Distance, huber_epsilon: float, reduction: Reduction = "mean"
) -> Float[Array, " B"]:
    """`pseudo_huber` or ||x_diff||^2 / d ("squared"), per example; "sum" does not divide by d."""
    square = process.mean_square(x_diff)
    if reduction == "sum":
        square = square * (x_diff.size // x_diff.shape[0])
    return square if kind == "squared" else pseudo_huber(square, epsilon=huber_epsilon)


def pseudo_huber(square: Float[Array, " B"], *, epsilon: float) -> Float[Array, " B"]:
    """sqrt(m + epsilon^2) - epsilon for m = ||x_diff||^2 / d, per example.

    A small epsilon gives the unsquared distance, a large one the scaled squared distance. The paper does not
    say whether to use the sum or the mean over d; we chose the mean, because only then is epsilon = 1 the
    "scaled squared l2 loss", as the paper calls it. Computed in a form without the difference, which would
    cancel in float32 for small m.

    If epsilon is far above the deviations of x given z_t, the best prediction is the mean of x; if it is far
    below, it is the geometric median, which favours the largest mode. If n coordinates are independent and
    undecided, the two differ by about E[(x - E x)^3] / (2 n Var x) in each. What counts is n, not d: for data
    of few dimensions, or with one large hidden choice, use epsilon = 1 and the weight SNR + 1.
    """
    return square / (jnp.sqrt(square + epsilon**2) + epsilon)


def weight(logsnr_t: Float[Array, " B"], *, kind: LossWeight) -> Float[Array, " B"]:
    """w_t = SNR(t) + 1 ("snr_plus_one", the paper's example), max(SNR(t), 1), EDM's weight, a root, or 1.

    SNR + 1 turns the squared distance in x into the squared distance in v; its root does the same for
    the unsquared distance of a small huber_epsilon. max(SNR, 1) is the weight of progressive distillation
    and TRACT, which gives the larger of the squared distances in x and in eps. SNR + 4 ("edm") is EDM's
    weight, (s^2 + 0.25) / (0.5 s)^2 with s = sigma / alpha, and "sqrt_edm" its root, for the unsquared
    distance.
    """
    if kind == "one":
        return jnp.ones_like(logsnr_t)
    snr = jnp.exp(logsnr_t)
    if kind == "max_snr_one":
        return jnp.maximum(snr, 1.0)
    if kind in ("edm", "sqrt_edm"):
        return 4 + snr if kind == "edm" else jnp.sqrt(4 + snr)
    return 1 + snr if kind == "snr_plus_one" else jnp.sqrt(1 + snr)
