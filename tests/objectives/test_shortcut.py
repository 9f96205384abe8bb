"""Shortcut models against two DDIM steps, and on a Gaussian, whose flow is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax.config import rows, validation
from mcm_jax.diffusion import mixtures, process, steps
from mcm_jax.objectives import shortcut
from mcm_jax.objectives.objective import Networks
from mcm_jax.objectives.shortcut import Shortcut
from tests.objectives.test_continuous import GAUSSIAN
from tests.objectives.test_flow_map import COND, KEY, SCHEDULE, X, perfect, student


def test_one_step_of_v_is_two_ddim_steps():
    with jax.enable_x64(True):
        z_t, v_first, v_second = jax.random.normal(KEY, (3, 5, 4), jnp.float64)
        t, m, u = jnp.linspace(-9, 1, 5), jnp.linspace(-4, 3, 5), jnp.linspace(-3, 9, 5)
        x_first = process.x_from_v(v_first, z_t, logsnr_t=t)
        z_m = steps.ddim(x_first, z_t, logsnr_t=t, logsnr_s=m)
        x_second = process.x_from_v(v_second, z_m, logsnr_t=m)
        end = steps.ddim(x_second, z_m, logsnr_t=m, logsnr_s=u)
        v = shortcut.two_steps(z_t, v_first, v_second, logsnr_t=t, logsnr_m=m, logsnr_u=u)
        x = process.x_from_v(v, z_t, logsnr_t=t)
        np.testing.assert_allclose(steps.ddim(x, z_t, logsnr_t=t, logsnr_s=u), end, rtol=1e-10, atol=1e-12)


def loss_of(objective, student, target=None):
    networks = Networks(student=student, teacher=None, target=target, schedule=SCHEDULE, null_cond=1)
    return np.asarray(jax.jit(lambda key: objective(networks, X, COND, key, jnp.int32(0)))(KEY))


def drawn(objective):
    networks = Networks(student=student, teacher=None, schedule=SCHEDULE, null_cond=1)
    return objective._draw_logsnr(jax.random.split(KEY, 3)[0], networks, len(X))


def test_the_flow_is_the_fixed_point_of_every_length():
    """Without the shortest steps: there, two halves follow the velocity, not the flow."""
    objective = Shortcut(share=1.0, smallest_steps=2**12)
    _, _, _, is_shortest = drawn(objective)
    values = loss_of(objective, perfect)[~is_shortest]
    # v of steps as short as 1e-3 is the quotient of two differences in float32.
    assert values.mean() < 1e-3
    beside = loss_of(objective, lambda *inputs, **end: 1.1 * perfect(*inputs, **end))[~is_shortest]
    assert beside.mean() > 10 * values.mean()


def test_most_examples_are_diffusion_training():
    objective = Shortcut(share=0.0)
    logsnr_t, _, logsnr_u, _ = drawn(objective)
    np.testing.assert_array_equal(logsnr_t, logsnr_u)
    eps = jax.random.normal(jax.random.split(KEY, 3)[1], X.shape)
    z_t = process.diffuse(X, eps, logsnr_t=logsnr_t)
    expected = student(z_t, logsnr_t, COND, None, logsnr_t) - process.v_from_x_eps(X, eps, logsnr_t=logsnr_t)
    np.testing.assert_allclose(loss_of(objective, student), np.square(expected).mean(axis=1), rtol=1e-4)


def test_the_target_network_takes_both_halves():
    """The halves of a step are seen with their own ends, those of the shortest with none."""
    objective, seen = Shortcut(share=1.0, smallest_steps=8), []

    def target(z_t, logsnr_t, cond, key, logsnr_u):
        seen.append((logsnr_t, logsnr_u))
        return student(z_t, logsnr_t, cond, key, logsnr_u)

    networks = Networks(student=student, teacher=None, target=target, schedule=SCHEDULE, null_cond=1)
    actual = objective(networks, X, COND, KEY, jnp.int32(0))
    t, m, u, is_shortest = drawn(objective)
    (t_1, m_1), (m_2, u_2) = seen
    np.testing.assert_array_equal(t_1, t)
    np.testing.assert_array_equal(m_1, np.where(is_shortest, t, m))
    np.testing.assert_array_equal(m_2, m)
    np.testing.assert_array_equal(u_2, np.where(is_shortest, m, u))
    z_t = process.diffuse(X, jax.random.normal(jax.random.split(KEY, 3)[1], X.shape), logsnr_t=t)
    v_1 = student(z_t, t, COND, None, m_1)
    z_m = steps.ddim(process.x_from_v(v_1, z_t, logsnr_t=t), z_t, logsnr_t=t, logsnr_s=m)
    v_2 = student(z_m, m, COND, None, u_2)
    end = steps.ddim(process.x_from_v(v_2, z_m, logsnr_t=m), z_m, logsnr_t=m, logsnr_s=u)
    delta = process.over_pixels(process.angle(t) - process.angle(u), z_t)
    v = (jnp.cos(delta) * z_t - end) / jnp.sin(delta)
    expected = np.square(np.asarray(student(z_t, t, COND, None, u) - v)).mean(axis=1)
    np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=1e-5)


def test_no_gradient_flows_through_the_target():
    objective = Shortcut(share=1.0)

    def loss(scale, scale_target):
        def scaled(factor):
            return lambda *inputs, **end: factor * student(*inputs, **end)

        networks = Networks(
            student=scaled(scale), teacher=None, target=scaled(scale_target), schedule=SCHEDULE, null_cond=1
        )
        return objective(networks, X, COND, KEY, jnp.int32(0)).mean()

    gradients = jax.grad(loss, argnums=(0, 1))(0.7, 0.7)
    assert gradients[0] != 0 and gradients[1] == 0


def test_the_steps():
    objective = Shortcut(share=0.25, smallest_steps=8)
    t, m, u, is_shortest = (
        np.asarray(each)
        for each in dataclasses.replace(objective)._draw_logsnr(
            KEY, Networks(student=student, teacher=None, schedule=lambda t: -t, null_cond=1), 20_000
        )
    )
    is_step = u > t
    # Four standard errors of a share: 4 sqrt(3/16 / 20,000) = 0.012.
    assert is_step.mean() == pytest.approx(0.25, abs=0.012)
    np.testing.assert_allclose(m, (t + u) / 2, atol=1e-6)
    lengths, counts = np.unique((u - t)[is_step].round(6), return_counts=True)
    np.testing.assert_array_equal(lengths, [0.25, 0.5, 1.0])
    np.testing.assert_allclose(counts / counts.sum(), 1 / 3, atol=0.03)
    np.testing.assert_array_equal(is_shortest[is_step], (u - t)[is_step] < 0.3)
    assert np.all(np.abs((t / (u - t + ~is_step))[is_step] % 1) < 1e-6)  # Starts are multiples of the length.


def test_a_perfect_velocity_has_the_datas_variance():
    """On the Gaussian, the diffusion part of the loss is the variance of v given z_t, which is not zero."""
    exact = mixtures.model_fn(GAUSSIAN)
    values = loss_of(Shortcut(share=0.0), lambda z, t, cond, key, logsnr_u: exact(z, t, cond, key))
    worse = loss_of(Shortcut(share=0.0), lambda z, t, cond, key, logsnr_u: exact(z, t, cond, key) + 0.3)
    assert values.mean() + 0.05 < worse.mean()


def test_the_row():
    config = rows.tiny("shortcut", dataset="openmoji", resolution=16)
    config.teacher_checkpoint = "teacher"
    config = validation.validate(config)
    assert config.takes_end and config.is_student and not config.distils
    assert config.target_decay == config.shortcut.target_decay
