"""The diffusion objective that trains the teacher (SPEC 5)."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from einops import reduce
from jaxtyping import Array, Float, Int

from mcm_jax.diffusion import conditions, process
from mcm_jax.diffusion.conditions import Cond
from mcm_jax.fields import setting
from mcm_jax.objectives.objective import Networks

LevelWeights = Literal["reciprocal", "equal"]


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """L = ||v - v_hat(z_t, lambda_t)||^2 / d, t ~ U(0, 1): the v-loss."""

    levels: tuple[int, ...] = setting(
        (), "resolutions of the multiscale loss in pixels, e.g. (128, 64); (): the plain v-loss", low=1
    )
    level_weights: LevelWeights = setting(
        "reciprocal", "weights of the levels (open; ours: 1/r, normalised to sum 1)"
    )
    label_dropout: float = setting(
        0.0,
        "fraction of labels replaced by 'any class', or of captions dropped; 0.1 if guidance is used (open)",
        low=0,
        high=1,
    )

    def __call__(
        self,
        networks: Networks,
        x: Float[Array, "B ..."],
        cond: Cond,
        key: jax.Array,
        train_step: Int[Array, ""],
    ) -> Float[Array, " B"]:
        """The loss of every example; see `objective.Objective`. It does not depend on train_step."""
        del train_step
        key_t, key_eps, key_dropout, key_label = jax.random.split(key, 4)
        logsnr_t = networks.schedule(jax.random.uniform(key_t, x.shape[:1]))
        eps = jax.random.normal(key_eps, x.shape)
        dropped = jax.random.bernoulli(key_label, self.label_dropout, x.shape[:1])
        cond = conditions.drop(cond, dropped, networks.null_cond)
        z_t = process.diffuse(x, eps, logsnr_t=logsnr_t)
        v = process.v_from_x_eps(x, eps, logsnr_t=logsnr_t)
        error = v - networks.student(z_t, logsnr_t, cond, key_dropout)
        if not self.levels:
            return process.mean_square(error)
        return multiscale_mean_square(error, levels=self.levels, level_weights=self.level_weights)


def multiscale_mean_square(
    error: Float[Array, "B H W C"], *, levels: Sequence[int], level_weights: LevelWeights = "reciprocal"
) -> Float[Array, " B"]:
    """The multiscale loss of simple diffusion (arXiv:2301.11093): sum over r of w_r L_r, per example.

    L_r is the mean square of the error after averaging over blocks down to r x r pixels. The paper does not
    state whether the weights 1/r sum to one; ours do ("reciprocal": 1/3 and 2/3 for the levels 128 and 64),
    which preserves the scale of the loss. "equal" gives every level the same weight.

    Args:
      levels: resolutions r in pixels; each must divide H = W.
    """
    pooled = [reduce(error, "b (r i) (q j) c -> b r q c", "mean", r=r, q=r) for r in levels]
    weights = jnp.reciprocal(jnp.array(levels, jnp.float32)) if level_weights == "reciprocal" else None
    return jnp.average(jnp.stack([process.mean_square(e) for e in pooled]), axis=0, weights=weights)
