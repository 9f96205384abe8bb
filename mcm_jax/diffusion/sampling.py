"""The sampling loop that turns noise into images, for teacher and student (SPEC 3)."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mcm_jax.diffusion import process, steps
from mcm_jax.diffusion.conditions import Cond
from mcm_jax.diffusion.network import ModelFn, until

Sampler = Literal["ddim", "addim", "noisy_ddim", "ddpm", "heun", "consistency"]
XVar = Literal["analytic", "measured"]
Clip = Literal["last", "every", "never"]

# Constants folded into an image's key, one for each random draw. Step i uses _STEPS + i.
_NOISE, _LABEL, _MEASUREMENT, _STEPS = range(4)


def image_keys(key: jax.Array, image_indices: Int[Array, " B"]) -> jax.Array:
    """One key per image, which depends only on (key, image index), not on batch, order or device.

    Examples:
      >>> keys = image_keys(jax.random.key(0), jnp.arange(10))
      >>> same = image_keys(jax.random.key(0), jnp.array([7]))
      >>> bool(jnp.all(jax.random.key_data(keys[7]) == jax.random.key_data(same[0])))
      True
    """
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(image_indices)


def _normal(keys: jax.Array, purpose: int | Int[Array, ""], shape: tuple[int, ...]) -> Float[Array, "B ..."]:
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, purpose), shape))(keys)


def initial_noise(keys: jax.Array, image_shape: tuple[int, ...]) -> Float[Array, "B ..."]:
    """z_1 ~ N(0, I), each image from its own key."""
    return _normal(keys, _NOISE, image_shape)


def draw_labels(keys: jax.Array, class_probabilities: Float[Array, " classes"]) -> Int[Array, " B"]:
    """Draws a class for each image, from the image's own key.

    Examples:
      >>> keys = image_keys(jax.random.key(0), jnp.arange(3))
      >>> draw_labels(keys, jnp.array([0.0, 1.0])).tolist()
      [1, 1, 1]
    """
    logits = jnp.log(class_probabilities)
    return jax.vmap(lambda key: jax.random.categorical(jax.random.fold_in(key, _LABEL), logits))(keys)


def draw_examples(keys: jax.Array, count: int) -> Int[Array, " B"]:
    """Draws one of `count` examples for each image, from the image's own key.

    Examples:
      >>> keys = image_keys(jax.random.key(0), jnp.arange(100))
      >>> sorted(set(draw_examples(keys, 3).tolist()))
      [0, 1, 2]
    """
    return jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, _LABEL), (), 0, count))(keys)


def network_calls(sampler: Sampler, num_steps: int) -> int:
    """Number of network calls of `sample` on a grid of num_steps points.

    Heun makes two calls per step, except for one in the last step.

    Examples:
      >>> network_calls("addim", 18), network_calls("heun", 18)
      (18, 35)
    """
    return 2 * num_steps - 1 if sampler == "heun" else num_steps


def sample(
    model_fn: ModelFn,
    z_1: Float[Array, "B ..."],
    cond: Cond,
    keys: jax.Array,
    *,
    logsnr: Float[Array, " N"],
    logsnr_end: Float[Array, ""] | None = None,
    sampler: Sampler = "ddim",
    x_var: Float[Array, " N"] | None = None,
    clip: Clip = "last",
    trajectory: bool = False,
) -> Float[Array, "B ..."]:
    """Integrates from z_1 at logsnr[0] to logsnr[N - 1] and returns the x_hat predicted there.

    The result is x_hat rather than z_0, because a shifted schedule leaves noise of up to one grey level in
    z_0.

    Args:
      model_fn: teacher or student, with or without guidance. It is called `network_calls` times, without
        dropout.
      z_1: standard normal noise.
      cond: what each image shows, such as class labels.
      keys: one key per image, for the noise of noisy_ddim, ddpm and consistency.
      logsnr: the log-SNRs at which the network is called, ascending, from `schedules.uniform_grid`,
        `schedules.karras_grid` or `schedules.published_grid`.
      logsnr_end: the log-SNR at t = 0, for a model_fn that takes the end of each step; None: it does not. Its
        prediction is not the mean of x, so it needs ddim.
      sampler: use "ddim" for students, which have already learned aDDIM's adjustment, but "ddpm" for those of
        moment matching, whose x_hat is a sample rather than a mean. "consistency" adds new
        noise to x_hat in each step (arXiv:2303.01469, algorithm 1, without their sigma_min of 0.002, which
        reduces the noise by less than 1e-5 of itself at the published noise levels).
      x_var: for addim and noisy_ddim, the variance per pixel of x given z_t at every grid point; None uses
        the analytic variance. Guidance does not change it, as it belongs to the conditional prediction.
      clip: not in the paper. Clip x_hat in the "last" step (our default), in "every" step, or "never" (for
        data outside [-1, 1]).
      trajectory: return the x_hat predicted at every point of the grid, [B, N, ...]. The last one is the
        usual result. Unless clip is "never", those returned are clipped, also those whose step is not.

    Examples:
      The exact denoiser of two Gaussians stands in for a network:

      >>> from mcm_jax.diffusion import mixtures, schedules
      >>> teacher = mixtures.model_fn(mixtures.two_components())
      >>> keys = image_keys(jax.random.key(0), jnp.arange(4))
      >>> z_1, cond = initial_noise(keys, (1,)), jnp.zeros(4, jnp.int32)
      >>> grid = schedules.uniform_grid(schedules.cosine(), 64)
      >>> x = sample(teacher, z_1, cond, keys, logsnr=grid, sampler="ddpm")
      >>> x.shape
      (4, 1)
      >>> sample(teacher, z_1, cond, keys, logsnr=grid, trajectory=True).shape
      (4, 64, 1)
    """
    batch = z_1.shape[:1]
    x_var = steps.analytic_x_var(logsnr) if x_var is None else x_var
    ends = None if logsnr_end is None else jnp.append(logsnr[1:], logsnr_end)

    def predict(
        z_t: Float[Array, "B ..."], i: int | Int[Array, ""]
    ) -> tuple[Float[Array, "B ..."], Float[Array, "B ..."]]:
        logsnr_t = jnp.broadcast_to(logsnr[i], batch)
        fn = model_fn if ends is None else until(model_fn, jnp.broadcast_to(ends[i], batch))
        v_hat = fn(z_t, logsnr_t, cond, None)
        x_hat = process.x_from_v(v_hat, z_t, logsnr_t=logsnr_t)
        if clip != "every":
            return x_hat, process.eps_from_v(v_hat, z_t, logsnr_t=logsnr_t)
        x_hat = jnp.clip(x_hat, -1.0, 1.0)
        return x_hat, process.eps_from_x(x_hat, z_t, logsnr_t=logsnr_t)

    def step(
        z_t: Float[Array, "B ..."], i: Int[Array, ""]
    ) -> tuple[Float[Array, "B ..."], Float[Array, "B ..."]]:
        logsnr_t, logsnr_s, x_var_t = (
            jnp.broadcast_to(value, batch) for value in (logsnr[i], logsnr[i + 1], x_var[i])
        )
        times = {"logsnr_t": logsnr_t, "logsnr_s": logsnr_s}
        x_hat, eps_hat = predict(z_t, i)
        if sampler == "addim":
            return steps.addim(x_hat, z_t, x_var=x_var_t, **times), x_hat
        if sampler in ("noisy_ddim", "ddpm", "consistency"):
            noise = _normal(keys, _STEPS + i, z_t.shape[1:])
            if sampler == "consistency":
                return process.diffuse(x_hat, noise, logsnr_t=logsnr_s), x_hat
            if sampler == "ddpm":
                return steps.ddpm(x_hat, z_t, noise, **times), x_hat
            return steps.noisy_ddim(x_hat, z_t, noise, x_var=x_var_t, **times), x_hat
        z_s = steps.ddim(x_hat, z_t, **times)
        if sampler == "ddim":
            return z_s, x_hat
        _, eps_hat_s = predict(z_s, i + 1)
        return steps.heun(z_s, eps_hat, eps_hat_s, **times), x_hat

    last = len(logsnr) - 1
    if trajectory:
        z_t, earlier = jax.lax.scan(step, z_1, jnp.arange(last))
        x_hat, _ = predict(z_t, last)
        x_hat = jnp.moveaxis(jnp.concatenate([earlier, x_hat[None]]), 0, 1)
    else:
        z_t = jax.lax.fori_loop(0, last, lambda i, z_t: step(z_t, i)[0], z_1)
        x_hat, _ = predict(z_t, last)
    return x_hat if clip == "never" else jnp.clip(x_hat, -1.0, 1.0)


def measure_x_var(
    model_fn: ModelFn,
    x: Float[Array, "B ..."],
    cond: Cond,
    keys: jax.Array,
    *,
    logsnr: Float[Array, " N"],
) -> Float[Array, "N B"]:
    """||x - x_hat(z_t)||^2 / d at every point of a sampler's grid, for clean images x (SPEC 3b).

    aDDIM's measured x_var is eta = 0.75 times the mean of this quantity over data.

    Args:
      model_fn: the conditional network without guidance.
      x: clean images.
      cond: what they show.
      keys: one key per image, for the noise in z_t.
      logsnr: the grid.
    """
    eps = _normal(keys, _MEASUREMENT, x.shape[1:])

    def at(logsnr_t: Float[Array, ""]) -> Float[Array, " B"]:
        logsnr_t = jnp.broadcast_to(logsnr_t, x.shape[:1])
        z_t = process.diffuse(x, eps, logsnr_t=logsnr_t)
        v_hat = model_fn(z_t, logsnr_t, cond, None)
        return process.mean_square(x - process.x_from_v(v_hat, z_t, logsnr_t=logsnr_t))

    return jax.lax.map(at, logsnr)
