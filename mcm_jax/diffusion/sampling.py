"""The loops over steps that turn noise into images, for teacher and student (SPEC 3)."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mcm_jax.diffusion import process, steps
from mcm_jax.diffusion.network import ModelFn

Sampler = Literal["ddim", "addim", "noisy_ddim", "ddpm", "heun"]
XVar = Literal["analytic", "measured"]
Clip = Literal["last", "every", "never"]

# What is folded into an image's key for each of its draws; the steps' noise follows after.
_NOISE, _LABEL, _MEASUREMENT, _STEPS = range(4)


def image_keys(key: jax.Array, image_indices: Int[Array, "B"]) -> jax.Array:
    """One key per image, a function of (key, image index) only: never of batch, order or device."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(image_indices)


def _normal(keys: jax.Array, purpose: int | Int[Array, ""], shape: tuple[int, ...]) -> Float[Array, "B ..."]:
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, purpose), shape))(keys)


def initial_noise(keys: jax.Array, image_shape: tuple[int, ...]) -> Float[Array, "B ..."]:
    """z_1 ~ N(0, I), each image from its own key."""
    return _normal(keys, _NOISE, image_shape)


def draw_labels(keys: jax.Array, class_probabilities: Float[Array, "classes"]) -> Int[Array, "B"]:
    """A class for each image from its own key."""
    logits = jnp.log(class_probabilities)
    return jax.vmap(lambda key: jax.random.categorical(jax.random.fold_in(key, _LABEL), logits))(keys)


def network_calls(sampler: Sampler, num_steps: int) -> int:
    """Function evaluations of `sample` on a grid of num_steps points: Heun takes two a step but the last."""
    return 2 * num_steps - 1 if sampler == "heun" else num_steps


def sample(
    model_fn: ModelFn,
    z_1: Float[Array, "B ..."],
    cond: Int[Array, "B"],
    keys: jax.Array,
    *,
    logsnr: Float[Array, "N"],
    sampler: Sampler = "ddim",
    x_var: Float[Array, "N"] | None = None,
    clip: Clip = "last",
) -> Float[Array, "B ..."]:
    """Integrates z_1 from logsnr[0] to logsnr[N - 1]; returns the x_hat found there.

    The last step returns x_hat and not z_0, in which a shifted schedule leaves noise of up to a grey level.

    Args:
      model_fn: teacher or student, guided or not; see `network_calls` for how often it is called, always
        without dropout.
      z_1: standard normal noise.
      cond: class labels.
      keys: one key an image, for the noise of noisy_ddim and ddpm.
      logsnr: where the network is called, ascending: `schedules.uniform_grid` or `schedules.karras_grid`.
      sampler: students take "ddim": they carry aDDIM's adjustment already.
      x_var: variance per pixel of x given z_t at every point of the grid, for addim and noisy_ddim; None:
        the analytic one. It is the conditional prediction's, whatever the guidance.
      clip: not in the paper: clip x_hat in every step ("every") or in the last (ours); "never" is for data
        that lie outside of [-1, 1].
    """
    batch = z_1.shape[:1]
    x_var = steps.analytic_x_var(logsnr) if x_var is None else x_var

    def predict(
        z_t: Float[Array, "B ..."], logsnr_t: Float[Array, "B"]
    ) -> tuple[Float[Array, "B ..."], Float[Array, "B ..."]]:
        v_hat = model_fn(z_t, logsnr_t, cond, None)
        x_hat = process.x_from_v(v_hat, z_t, logsnr_t=logsnr_t)
        if clip != "every":
            return x_hat, process.eps_from_v(v_hat, z_t, logsnr_t=logsnr_t)
        x_hat = jnp.clip(x_hat, -1.0, 1.0)
        return x_hat, process.eps_from_x(x_hat, z_t, logsnr_t=logsnr_t)

    def step(i: Int[Array, ""], z_t: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
        logsnr_t, logsnr_s, x_var_t = (
            jnp.broadcast_to(value, batch) for value in (logsnr[i], logsnr[i + 1], x_var[i])
        )
        times = {"logsnr_t": logsnr_t, "logsnr_s": logsnr_s}
        x_hat, eps_hat = predict(z_t, logsnr_t)
        if sampler == "addim":
            return steps.addim(x_hat, z_t, x_var=x_var_t, **times)
        if sampler in ("noisy_ddim", "ddpm"):
            noise = _normal(keys, _STEPS + i, z_t.shape[1:])
            if sampler == "ddpm":
                return steps.ddpm(x_hat, z_t, noise, **times)
            return steps.noisy_ddim(x_hat, z_t, noise, x_var=x_var_t, **times)
        z_s = steps.ddim(x_hat, z_t, **times)
        if sampler == "ddim":
            return z_s
        _, eps_hat_s = predict(z_s, logsnr_s)
        return steps.heun(z_s, eps_hat, eps_hat_s, **times)

    z_t = jax.lax.fori_loop(0, len(logsnr) - 1, step, z_1)
    x_hat, _ = predict(z_t, jnp.broadcast_to(logsnr[-1], batch))
    return x_hat if clip == "never" else jnp.clip(x_hat, -1.0, 1.0)


def measure_x_var(
    model_fn: ModelFn,
    x: Float[Array, "B ..."],
    cond: Int[Array, "B"],
    keys: jax.Array,
    *,
    logsnr: Float[Array, "N"],
) -> Float[Array, "N B"]:
    """||x - x_hat(z_t)||^2 / d at every point of a sampler's grid, for clean images x (SPEC 3b).

    aDDIM's measured x_var is eta times the mean of this over data, eta = 0.75.

    Args:
      model_fn: the conditional, unguided network.
      keys: one key an image, for the noise in z_t.
    """
    eps = _normal(keys, _MEASUREMENT, x.shape[1:])

    def at(logsnr_t: Float[Array, ""]) -> Float[Array, "B"]:
        logsnr_t = jnp.broadcast_to(logsnr_t, x.shape[:1])
        z_t = process.diffuse(x, eps, logsnr_t=logsnr_t)
        v_hat = model_fn(z_t, logsnr_t, cond, None)
        return process.mean_square(x - process.x_from_v(v_hat, z_t, logsnr_t=logsnr_t))

    return jax.lax.map(at, logsnr)
