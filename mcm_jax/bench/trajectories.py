"""Computes the paths of few-step students and of the exact probability flow (after MCM's first figure).

The data are a one-dimensional mixture. `reporting.trajectories` plots the paths.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.special import ndtri

from mcm_jax.bench import vectors
from mcm_jax.config.settings import Config
from mcm_jax.diffusion import mixtures, process, sampling, schedules, steps
from mcm_jax.diffusion.mixtures import Mixture
from mcm_jax.diffusion.network import ModelFn
from mcm_jax.models.mlp import MLPSettings
from mcm_jax.objectives.consistency import Consistency
from mcm_jax.training.loop import TrainingSettings
from mcm_jax.training.optimizer import OptimizerSettings

MODEL = MLPSettings(width=64, blocks=2)
SCHEDULE = schedules.cosine()
# Intervals of each path, for the flow and for students of any number of steps (1, 2 and 4 divide it).
INTERVALS = 128


class Trajectories(NamedTuple):
    """Paths from noise to data, and samples from random noise with their distance to the data."""

    t: Float[np.ndarray, " P"]  # descends from 1 to 0
    z: Float[np.ndarray, "P N"]  # z_t for every start; the last row is x
    samples: Float[np.ndarray, " M"]  # x from random noise
    distance: float  # squared 2-Wasserstein distance from the samples to the data


def student_config(student_steps: int, *, num_updates: int, seed: int = 0) -> Config:
    """A config for CD in one or two thousand updates.

    The teacher's step is DDIM, because aDDIM overshoots with the exact denoiser of one-dimensional data
    (SPEC 3).
    """
    return Config(
        objective="cd",
        seed=seed,
        consistency=Consistency(
            student_steps=(student_steps,),
            teacher_steps_first=16.0,
            teacher_steps_last=128.0,
            anneal_steps=max(1, num_updates // 2),
            teacher_step="ddim",
        ),
        optimizer=OptimizerSettings(learning_rate=1e-3, warmup_steps=100, decay="linear", ema_decay=0.99),
        training=TrainingSettings(num_steps=num_updates, batch_size=256),
    )


def starts(count: int) -> Float[np.ndarray, " count"]:
    """Noise from which paths start: the quantiles of N(0, 1) at (i + 1/2) / count."""
    return ndtri((np.arange(count) + 0.5) / count).astype(np.float32)


def student(
    mixture: Mixture, z_1: Float[np.ndarray, " N"], *, config: Config, num_samples: int, seed: int = 0
) -> Trajectories:
    """Distils the exact denoiser; returns the student's paths from z_1 and num_samples samples.

    Args:
      config: such as `student_config` returns.
      seed: seed of the samples' noise; equal seeds give equal noise, also in `exact`.
    """
    (student_steps,) = config.student_steps
    run = vectors.train(config, MODEL, mixture)
    z = student_path(run.model_fn, jnp.asarray(z_1)[:, None], student_steps=student_steps)
    samples = vectors.sample(
        run.model_fn, 1, num_samples, seed=seed, num_steps=student_steps, schedule=SCHEDULE
    )
    return _trajectories(mixture, z, samples)


def exact(mixture: Mixture, z_1: Float[np.ndarray, " N"], *, num_samples: int, seed: int = 0) -> Trajectories:
    """Paths and samples of the exact probability flow, the small-step limit of a perfect diffusion model."""
    noise = sampling.initial_noise(sampling.image_keys(jax.random.key(seed), jnp.arange(num_samples)), (1,))

    @jax.jit
    def flow(z_1: Float[Array, "N d"], t: Float[Array, " T"]) -> Float[Array, "T N d"]:
        logsnr = SCHEDULE(jnp.stack([jnp.ones_like(t), t]))

        def to(logsnr_t: Float[Array, ""], logsnr_s: Float[Array, ""]) -> Float[Array, "N d"]:
            return mixtures.probability_flow(
                mixture,
                z_1,
                logsnr_t=jnp.broadcast_to(logsnr_t, len(z_1)),
                logsnr_s=jnp.broadcast_to(logsnr_s, len(z_1)),
            )

        return jax.vmap(to)(*logsnr)

    z = flow(jnp.asarray(z_1)[:, None], jnp.asarray(_times(), jnp.float32))
    # z_0 equals x up to noise of 0.0006.
    samples = flow(noise, jnp.zeros(1))[0]
    return _trajectories(mixture, z, samples)


def student_path(model_fn: ModelFn, z_1: Float[Array, "N d"], *, student_steps: int) -> Float[Array, "P N d"]:
    """z_t at INTERVALS + 1 times along a student's path: DDIM steps with the x_hat of each network call.

    In terms of y = z / sigma these are straight lines between the boundaries of the student's steps. The last
    row is x_hat itself, as `sampling.sample` returns it (unclipped).
    """
    inside = INTERVALS // student_steps
    batch = z_1.shape[:1]
    cond = jnp.zeros(batch, jnp.int32)

    @jax.jit
    def run(z_t: Float[Array, "N d"]) -> Float[Array, "P N d"]:
        logsnr, rows = SCHEDULE(jnp.asarray(_times(), jnp.float32)), [z_t[None]]
        x_hat = z_t  # Replaced at the first network call.
        for begin in range(0, INTERVALS, inside):
            logsnr_t = jnp.broadcast_to(logsnr[begin], batch)
            v_hat = model_fn(z_t, logsnr_t, cond, None)
            x_hat = process.x_from_v(v_hat, z_t, logsnr_t=logsnr_t)

            def to(
                logsnr_s: Array, z_t: Array = z_t, x_hat: Array = x_hat, logsnr_t: Array = logsnr_t
            ) -> Float[Array, "N d"]:
                logsnr_s = jnp.broadcast_to(logsnr_s, batch)
                return steps.ddim(x_hat, z_t, logsnr_t=logsnr_t, logsnr_s=logsnr_s)

            rows.append(jax.vmap(to)(logsnr[begin + 1 : begin + inside + 1]))
            z_t = rows[-1][-1]
        return jnp.concatenate([*rows[:-1], rows[-1][:-1], x_hat[None]])

    return run(z_1)


def marginals(
    mixture: Mixture, t: Float[np.ndarray, " P"], z: Float[np.ndarray, " Z"]
) -> Float[np.ndarray, "P Z"]:
    """p(z_t) at every t and z."""

    @jax.jit
    def at(t: Float[Array, ""]) -> Float[Array, " Z"]:
        logsnr_t = jnp.broadcast_to(SCHEDULE(t), z.shape)
        return jnp.exp(mixtures.log_density(mixture, jnp.asarray(z)[:, None], logsnr_t=logsnr_t))

    return np.asarray(jax.lax.map(at, jnp.asarray(t, jnp.float32)))


def exact_distances(mixture: Mixture, *, num_samples: int, draws: int) -> Float[np.ndarray, " draws"]:
    """Distances of `draws` sets of exact samples to the data; not 0, see `mixtures.marginal_wasserstein`."""
    draw = jax.jit(lambda key: mixtures.sample(mixture, key, num_samples))
    keys = jax.random.split(jax.random.key(0), draws)
    return np.array([mixtures.marginal_wasserstein(mixture, draw(key)) for key in keys])


def _times() -> Float[np.ndarray, " P"]:
    return np.arange(INTERVALS, -1, -1) / INTERVALS


def _trajectories(mixture: Mixture, z: Float[Array, "P N d"], samples: Float[Array, "M d"]) -> Trajectories:
    return Trajectories(
        t=_times(),
        z=np.asarray(z)[..., 0],
        samples=np.asarray(samples)[:, 0],
        distance=mixtures.marginal_wasserstein(mixture, samples),
    )
