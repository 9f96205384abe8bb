"""Flow maps: students of any two times."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax.diffusion import mixtures, process, sampling, schedules
from mcm_jax.diffusion.conditions import Cond
from mcm_jax.objectives.continuous import along_flow, tangent
from mcm_jax.objectives.flow_map import FlowMap
from mcm_jax.objectives.objective import Networks
from tests.objectives.test_continuous import GAUSSIAN, MEAN, STD, flow

SCHEDULE = schedules.cosine()
KEY = jax.random.key(5)
X = MEAN + STD * jax.random.normal(jax.random.key(1), (512, 1))
COND = jnp.zeros(len(X), jnp.int32)


def perfect(z_t, logsnr_t, cond: Cond, key, logsnr_u):
    """v_hat whose step from t ends on the flow of the Gaussian at u; the exact v if u = t."""
    delta = process.over_pixels(process.angle(logsnr_t) - process.angle(logsnr_u), z_t)
    exact = mixtures.model_fn(GAUSSIAN)(z_t, logsnr_t, cond, key)
    short = jnp.abs(delta) < 1e-3  # where the difference of nearly equal numbers is not exact
    step = jnp.cos(delta) * z_t - flow(z_t, logsnr_t, logsnr_u)
    return jnp.where(short, exact, step / jnp.where(short, 1.0, jnp.sin(delta)))


def loss_of(objective, student, *, teacher=None, train_step=10**6):
    networks = Networks(student=student, teacher=teacher, schedule=SCHEDULE, null_cond=1)
    return jax.jit(lambda key: objective(networks, X, COND, key, jnp.int32(train_step)))(KEY)


@pytest.mark.parametrize("proposal", ["uniform", "lognormal"])
@pytest.mark.parametrize("along", ["target", "predicted"])
def test_a_perfect_student_has_no_loss(proposal, along):
    objective = FlowMap(proposal=proposal, along=along, equal_share=0.3)
    teacher = mixtures.model_fn(GAUSSIAN)
    # A difference d of v costs about (d / 0.1)^2; float32 leaves some 1e-4, divided by sin(delta) > 1e-3.
    values = loss_of(objective, perfect, teacher=teacher)
    assert float(jnp.mean(values)) < 1e-3
    beside = loss_of(objective, lambda *inputs, **end: perfect(*inputs, **end) + 0.1, teacher=teacher)
    assert float(jnp.mean(beside)) > 0.05


def student(z_t, logsnr_t, cond, key, logsnr_u):
    return jnp.sin(2 * z_t) * process.over_pixels(jnp.cos(logsnr_t / 4) + jnp.sin(logsnr_u / 6) + cond, z_t)


@pytest.mark.parametrize("normalised", ["tangent", "loss"])
@pytest.mark.parametrize("along", ["target", "predicted"])
def test_the_loss_is_that_of_the_normalised_tangent(normalised, along):
    """With the parts drawn as the objective draws them; improved MeanFlow differentiates along its own v."""
    objective = FlowMap(normalised=normalised, along=along, floor=0.05, warmup_steps=4, warmup_last=0.8)
    key_times, key_eps, _ = jax.random.split(KEY, 3)
    logsnr_t, logsnr_u = objective._draw_logsnr(key_times, len(X), SCHEDULE)
    eps = jax.random.normal(key_eps, X.shape)
    z_t = process.diffuse(X, eps, logsnr_t=logsnr_t)
    velocity = process.v_from_x_eps(X, eps, logsnr_t=logsnr_t)
    own = student(z_t, logsnr_t, COND, None, logsnr_t)
    v, v_dot = along_flow(
        lambda z, logsnr: student(z, logsnr, COND, None, logsnr_u),
        z_t,
        own if along == "predicted" else velocity,
        logsnr_t=logsnr_t,
    )
    g = tangent(
        z_t, velocity, v, v_dot, logsnr_t=logsnr_t, logsnr_step=logsnr_u, warmup=jnp.float32(0.8 * 3 / 4)
    )
    size = np.square(np.asarray(g)).mean(axis=1)
    expected = size / (size + 0.05) if normalised == "loss" else size / (np.sqrt(size) + 0.05) ** 2
    np.testing.assert_allclose(loss_of(objective, student, train_step=3), expected, rtol=1e-3, atol=1e-5)


def test_the_times():
    objective = FlowMap(equal_share=0.25)
    logsnr_t, logsnr_u = objective._draw_logsnr(KEY, 20_000, SCHEDULE)
    assert np.all(logsnr_u >= logsnr_t)
    # Four standard errors of a share: 4 sqrt(3/16 / 20,000) = 0.012.
    assert np.mean(logsnr_u == logsnr_t) == pytest.approx(0.25, abs=0.012)
    # The larger of two uniform times is sqrt(U).
    t = 2 / np.pi * np.arctan(np.exp(-np.asarray(logsnr_t, np.float64) / 2))
    np.testing.assert_allclose(np.quantile(t, [0.25, 0.5]), [0.5, 0.5**0.5], atol=0.015)
    normal = dataclasses.replace(objective, proposal="lognormal", equal_share=1.0)
    noise = -np.asarray(normal._draw_logsnr(KEY, 20_000, SCHEDULE)[0]) / 2
    # The larger of two standard normal values has mean 1 / sqrt(pi).
    assert noise.mean() == pytest.approx(-0.4 + np.pi**-0.5, abs=0.03)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_samples_of_a_perfect_student_follow_the_flow_in_any_number_of_steps(num_steps):
    keys = sampling.image_keys(KEY, jnp.arange(8))
    z_1 = sampling.initial_noise(keys, (1,))
    found = sampling.sample(
        perfect,
        z_1,
        COND[:8],
        keys,
        logsnr=schedules.uniform_grid(SCHEDULE, num_steps),
        logsnr_end=SCHEDULE(jnp.zeros(())),
        clip="never",
    )
    start, end = (jnp.full(8, SCHEDULE(jnp.float32(t))) for t in (1.0, 0.0))
    # x_hat at t = 0 is z_0 up to its noise of 5.5e-4.
    np.testing.assert_allclose(found, flow(z_1, start, end), atol=2e-3)
