"""Shortcut models (arXiv:2410.12557): one long step learns from two steps of half its length."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mcm_jax.diffusion import process, segments, steps
from mcm_jax.diffusion.conditions import Cond
from mcm_jax.diffusion.network import ModelFn, until
from mcm_jax.fields import setting
from mcm_jax.objectives.continuous import noisy_flow
from mcm_jax.objectives.objective import Networks


@dataclasses.dataclass(frozen=True)
class Shortcut:
    """||v_hat(z_t, t, u) - sg(v)||^2 / d: without a teacher, from data and from the network itself.

    The network receives both times, and steps from t to u as in `flow_map.FlowMap`. For most examples u = t,
    and v is that of the data, as in diffusion training. For the others, the step is one of 1, 2, 4, ... equal
    steps from noise to data, and v is that of the one step that ends where two steps of half the length end,
    `two_steps`. Two halves of the shortest step take the velocity itself, v_hat(z, t, t).

    The paper's paths are straight, z_t = (1 - t) x + t eps, where v is the mean of both steps' v. On ours the
    steps are rotations. The target network runs without dropout.
    """

    smallest_steps: int = setting(
        128,
        "a power of two: the student learns steps of 1, 1/2, 1/4, ..., 2 / smallest_steps of the time",
        low=2,
        high=4096,
    )
    every: int = setting(8, "one example in this many learns from two steps", low=1)
    target_decay: float = setting(
        0.999,
        "decay of the bias-corrected average whose two steps are the target (that of the published code)",
        low=0,
        high=0.999999,
    )

    @property
    def trained_steps(self) -> tuple[int, ...]:
        """The numbers of steps that samplers may take: 1, 2, 4, ..., smallest_steps / 2."""
        return tuple(2**n for n in range(self.smallest_steps.bit_length() - 1))

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
        key_t, key_steps, key_eps, key_dropout = jax.random.split(key, 4)
        # A part of every device's examples.
        part = slice(None, None, self.every)
        step = self._draw_step(key_steps, networks, len(x[part]))
        logsnr_t = networks.schedule(jax.random.uniform(key_t, (len(x),))).at[part].set(step.logsnr_t)
        logsnr_u = logsnr_t.at[part].set(step.logsnr_u)
        z_t, v = noisy_flow(networks, x, cond, key_eps, logsnr_t=logsnr_t, teacher_guidance=0.0)
        cond_part = jax.tree.map(lambda leaf: leaf[part], cond)
        v = v.at[part].set(step.target(networks.target or networks.student, z_t[part], cond_part))
        v_hat = until(networks.student, logsnr_u)(z_t, logsnr_t, cond, key_dropout)
        return process.mean_square(v_hat - jax.lax.stop_gradient(v))

    def _draw_step(self, key: jax.Array, networks: Networks, batch_size: int) -> "Step":
        """Draws the number of steps, and one of these."""
        key_steps, key_times = jax.random.split(key)
        num_steps = 2 ** jax.random.randint(key_steps, (batch_size,), 0, len(self.trained_steps))
        times = segments.draw_halves(key_times, batch_size=batch_size, student_steps=num_steps)
        t, m, u = map(networks.schedule, times)
        return Step(t, m, u, is_shortest=2 * num_steps == self.smallest_steps)


class Step(NamedTuple):
    """The log-SNRs at the start t of each example's step, in its middle m, and at its end u."""

    logsnr_t: Float[Array, " B"]
    logsnr_m: Float[Array, " B"]
    logsnr_u: Float[Array, " B"]
    is_shortest: Bool[Array, " B"]  # whether it is so short that its halves take the velocity itself

    def target(self, target_fn: ModelFn, z_t: Float[Array, "B ..."], cond: Cond) -> Float[Array, "B ..."]:
        """The v of the step that ends where the two halves of target_fn end."""
        t, m, u, is_shortest = self
        v_first = until(target_fn, jnp.where(is_shortest, t, m))(z_t, t, cond, None)
        z_m = steps.ddim(process.x_from_v(v_first, z_t, logsnr_t=t), z_t, logsnr_t=t, logsnr_s=m)
        v_second = until(target_fn, jnp.where(is_shortest, m, u))(z_m, m, cond, None)
        return two_steps(z_t, v_first, v_second, logsnr_t=t, logsnr_m=m, logsnr_u=u)


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
    steps; on straight paths, where a and b tend to 0, the weighted mean.
    """
    thetas = [process.over_pixels(process.angle(each), z_t) for each in (logsnr_t, logsnr_m, logsnr_u)]
    a, b = thetas[0] - thetas[1], thetas[1] - thetas[2]
    weighted = jnp.sin(a) * jnp.cos(b) * v_first + jnp.sin(b) * (v_second - jnp.sin(a) * z_t)
    return weighted / jnp.sin(a + b)
