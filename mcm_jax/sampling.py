"""The loops over steps that turn noise into images, for teacher and student (SPEC 3)."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mcm_jax.diffusion import process, steps
from mcm_jax.diffusion.network import ModelFn
from mcm_jax.diffusion.schedules import Schedule

Sampler = Literal["ddim", "addim"]


def image_keys(key: jax.Array, image_indices: Int[Array, "B"]) -> jax.Array:
    """One key per image, a function of (key, image index) only: never of batch, order or device."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(image_indices)


def initial_noise(keys: jax.Array, image_shape: tuple[int, ...]) -> Float[Array, "B ..."]:
    """z_1 ~ N(0, I), each image from its own key."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), image_shape))(keys)


def draw_labels(keys: jax.Array, class_probabilities: Float[Array, "classes"]) -> Int[Array, "B"]:
    """A class for each image from its own key."""
    logits = jnp.log(class_probabilities)
    return jax.vmap(lambda key: jax.random.categorical(jax.random.fold_in(key, 1), logits))(keys)


def sample(
    model_fn: ModelFn,
    z_1: Float[Array, "B ..."],
    cond: Int[Array, "B"],
    *,
    schedule: Schedule,
    num_steps: int,
    sampler: Sampler = "ddim",
) -> Float[Array, "B ..."]:
    """Integrates z_1 over t = 1, 1 - 1/N, ..., 1/N, s = t - 1/N; returns the last x_hat in [-1, 1].

    The last step returns x_hat and not z_0, in which a shifted schedule leaves noise of up to a grey
    level. Not in the paper: clipping x_hat in every step; we clip the last only.

    Args:
      model_fn: teacher or student; called num_steps times, without dropout.
      z_1: standard normal noise.
      cond: class labels.
      schedule: the one the network was trained with.
      num_steps: N; a student's own S, any N >= 1 for a teacher.
      sampler: "ddim", or "addim" with the analytic x_var (for a teacher: a student carries the
        adjustment already).
    """
    # The grid is made outside of the compiled loop, where a time would not be rounded to float32.
    grid = np.arange(num_steps, -1, -1, dtype=np.float64) / num_steps
    logsnr = schedule(jnp.asarray(grid, jnp.float32))
    batch = z_1.shape[:1]

    def x_hat_at(z_t: Float[Array, "B ..."], logsnr_t: Float[Array, "B"]) -> Float[Array, "B ..."]:
        return process.x_from_v(model_fn(z_t, logsnr_t, cond, None), z_t, logsnr_t=logsnr_t)

    def step(i: Int[Array, ""], z_t: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
        logsnr_t, logsnr_s = (jnp.broadcast_to(logsnr[n], batch) for n in (i, i + 1))
        x_hat = x_hat_at(z_t, logsnr_t)
        if sampler == "addim":
            x_var = steps.analytic_x_var(logsnr_t)
            return steps.addim(x_hat, z_t, logsnr_t=logsnr_t, logsnr_s=logsnr_s, x_var=x_var)
        return steps.ddim(x_hat, z_t, logsnr_t=logsnr_t, logsnr_s=logsnr_s)

    z_t = jax.lax.fori_loop(0, num_steps - 1, step, z_1)
    x_hat = x_hat_at(z_t, jnp.broadcast_to(logsnr[num_steps - 1], batch))
    return jnp.clip(x_hat, -1.0, 1.0)
