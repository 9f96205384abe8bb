"""Shortcut models (arXiv:2410.12557): one long step learns from two steps of half its length."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mcm_jax.diffusion import process, segments, steps
from mcm_jax.diffusion.conditions import Cond
from mcm_jax.diffusion.network import until
from mcm_jax.fields import setting
from mcm_jax.objectives.continuous import noisy_flow
from mcm_jax.objectives.objective import Networks


@dataclasses.dataclass(frozen=True)
class Shortcut:
    """||v_hat(z_t, t, u) - sg(v)||^2 / d: without a teacher, from data and from the network itself.

    The network receives both times, and steps from t to u as in `flow_map.FlowMap`. For most examples u = t,
    and v is that of the data, as in diffusion training. For the others, the step has one of the lengths
    1, 1/2, 1/4, ..., and v is that of the one step that ends where two steps of half the length end,
    `two_steps`. Two halves of the shortest step take the velocity itself, v_hat(z, t, t).

    The paper's paths are straight, z_t = (1 - t) x + t eps, where v is the mean of both steps' v. On ours the
    steps are rotations. It splits the batch and calls the target network for one part of it only; we call it
    for every example, so that devices have equal work.
    """

    smallest_steps: int = setting(
        128, "a power of two: no step is shorter than 1 / smallest_steps of the time", low=2
    )
    share: float = setting(0.125, "share of examples that learn from two steps", low=0, high=1)
    target_decay: float = setting(
        0.999, "decay of the bias-corrected average whose two steps are the target", low=0, high=0.999999
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
        key_times, key_eps, key_dropout = jax.random.split(key, 3)
        logsnr_t, logsnr_m, logsnr_u, is_shortest = self._draw_logsnr(key_times, networks, len(x))
        z_t, v_data = noisy_flow(networks, x, cond, key_eps, logsnr_t=logsnr_t, teacher_guidance=0.0)
        target_fn = networks.target or networks.student

        def half(z: Float[Array, "B ..."], start: Float[Array, " B"], end: Float[Array, " B"]) -> Array:
            end = jnp.where(is_shortest, start, end)
            return jax.lax.stop_gradient(until(target_fn, end)(z, start, cond, key_dropout))

        v_first = half(z_t, logsnr_t, logsnr_m)
        x_first = process.x_from_v(v_first, z_t, logsnr_t=logsnr_t)
        z_m = steps.ddim(x_first, z_t, logsnr_t=logsnr_t, logsnr_s=logsnr_m)
        v_second = half(z_m, logsnr_m, logsnr_u)
        v_long = two_steps(z_t, v_first, v_second, logsnr_t=logsnr_t, logsnr_m=logsnr_m, logsnr_u=logsnr_u)
        target = jnp.where(process.over_pixels(logsnr_u > logsnr_t, x), v_long, v_data)
        v_hat = until(networks.student, logsnr_u)(z_t, logsnr_t, cond, key_dropout)
        return process.mean_square(v_hat - target)

    def _draw_logsnr(
        self, key: jax.Array, networks: Networks, batch_size: int
    ) -> tuple[Float[Array, " B"], Float[Array, " B"], Float[Array, " B"], Array]:
        """Log-SNRs at t, in the middle of the step and at its end u, and whether it is the shortest.

        All three are those of t ~ U(0, 1) where u = t.
        """
        key_length, key_step, key_flow, key_t = jax.random.split(key, 4)
        halvings = self.smallest_steps.bit_length() - 1
        num_steps = 2 ** jax.random.randint(key_length, (batch_size,), 0, halvings)
        times = segments.draw_halves(key_step, batch_size=batch_size, student_steps=num_steps)
        is_flow = jax.random.bernoulli(key_flow, 1 - self.share, (batch_size,))
        t = jax.random.uniform(key_t, (batch_size,))
        logsnr_t, logsnr_m, logsnr_u = (networks.schedule(jnp.where(is_flow, t, time)) for time in times)
        return logsnr_t, logsnr_m, logsnr_u, 2 * num_steps == self.smallest_steps


def two_steps(
    z_t: Float[Array, "B ..."],
    v_first: Float[Array, "B ..."],
    v_second: Float[Array, "B ..."],
    *,
    logsnr_t: Float[Array, " B"],
    logsnr_m: Float[Array, " B"],
    logsnr_u: Float[Array, " B"],
) -> Float[Array, "B ..."]:
    """The v whose step t -> u ends where the steps t -> m of v_first and m -> u of v_second end.

    v = (sin a cos b v_first + sin b v_second - sin a sin b z_t) / sin(a + b) for the angles a and b of the
    steps; on straight paths, where a and b tend to 0, the weighted mean. Finite at u = t.
    """
    thetas = [process.over_pixels(process.angle(each), z_t) for each in (logsnr_t, logsnr_m, logsnr_u)]
    a, b = thetas[0] - thetas[1], thetas[1] - thetas[2]
    weighted = jnp.sin(a) * jnp.cos(b) * v_first + jnp.sin(b) * (v_second - jnp.sin(a) * z_t)
    return weighted / jnp.maximum(jnp.sin(a + b), jnp.finfo(z_t.dtype).tiny)
