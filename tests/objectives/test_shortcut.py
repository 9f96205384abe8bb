"""Shortcut models against two DDIM steps, and on a Gaussian, whose flow is known."""

import jax
import jax.numpy as jnp
import numpy as np

from mcm_jax.config import rows, validation
from mcm_jax.diffusion import process, steps
from mcm_jax.objectives import shortcut
from mcm_jax.objectives.objective import Networks
from mcm_jax.objectives.shortcut import Shortcut
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
    """The examples that learn from two steps, as the objective draws them."""
    networks = Networks(student=student, teacher=None, schedule=SCHEDULE, null_cond=1)
    key = jax.random.split(KEY, 4)[1]
    return objective._draw_step(key, networks, len(X[:: objective.every]))


def noisy(logsnr_t):
    return process.diffuse(X, jax.random.normal(jax.random.split(KEY, 4)[2], X.shape), logsnr_t=logsnr_t)


def test_the_flow_is_the_fixed_point_of_every_length():
    """Without the shortest steps: there, two halves follow the velocity, not the flow."""
    objective = Shortcut(every=1, smallest_steps=2**12)
    longer = ~drawn(objective).is_shortest
    values = loss_of(objective, perfect)[longer]
    # v of steps as short as 1e-3 is the quotient of two differences in float32.
    assert values.mean() < 1e-3
    beside = loss_of(objective, lambda *inputs, **end: 1.1 * perfect(*inputs, **end))[longer]
    assert beside.mean() > 10 * values.mean()


def test_most_examples_are_diffusion_training():
    logsnr_t = SCHEDULE(jax.random.uniform(jax.random.split(KEY, 4)[0], (len(X),)))
    eps = jax.random.normal(jax.random.split(KEY, 4)[2], X.shape)
    v = student(noisy(logsnr_t), logsnr_t, COND, None, logsnr_t)
    expected = np.square(v - process.v_from_x_eps(X, eps, logsnr_t=logsnr_t)).mean(axis=1)
    actual = loss_of(Shortcut(every=8), student)
    others = np.arange(len(X)) % 8 > 0
    np.testing.assert_allclose(actual[others], expected[others], rtol=1e-4)
    assert not np.any(np.isclose(actual[~others], expected[~others]))


def test_the_target_network_takes_both_halves():
    """The halves of a step are seen with their own ends, those of the shortest with none."""
    objective, seen = Shortcut(every=4, smallest_steps=8), []

    def target(z_t, logsnr_t, cond, key, logsnr_u):
        seen.append((logsnr_t, logsnr_u))
        assert key is None  # no dropout
        return student(z_t, logsnr_t, cond, key, logsnr_u)

    networks = Networks(student=student, teacher=None, target=target, schedule=SCHEDULE, null_cond=1)
    actual = objective(networks, X, COND, KEY, jnp.int32(0))[::4]
    t, m, u, is_shortest = drawn(objective)
    (t_1, m_1), (m_2, u_2) = seen
    np.testing.assert_array_equal(t_1, t)
    np.testing.assert_array_equal(m_1, np.where(is_shortest, t, m))
    np.testing.assert_array_equal(m_2, m)
    np.testing.assert_array_equal(u_2, np.where(is_shortest, m, u))
    eps = jax.random.normal(jax.random.split(KEY, 4)[2], X.shape)[::4]
    z_t = process.diffuse(X[::4], eps, logsnr_t=t)
    v_1 = student(z_t, t, COND[::4], None, m_1)
    z_m = steps.ddim(process.x_from_v(v_1, z_t, logsnr_t=t), z_t, logsnr_t=t, logsnr_s=m)
    v_2 = student(z_m, m, COND[::4], None, u_2)
    end = steps.ddim(process.x_from_v(v_2, z_m, logsnr_t=m), z_m, logsnr_t=m, logsnr_s=u)
    delta = process.over_pixels(process.angle(t) - process.angle(u), z_t)
    v = (jnp.cos(delta) * z_t - end) / jnp.sin(delta)
    expected = np.square(np.asarray(student(z_t, t, COND[::4], None, u) - v)).mean(axis=1)
    np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=1e-5)


def test_no_gradient_flows_through_the_target():
    def loss(scale, scale_target):
        def scaled(factor):
            return lambda *inputs, **end: factor * student(*inputs, **end)

        networks = Networks(
            student=scaled(scale), teacher=None, target=scaled(scale_target), schedule=SCHEDULE, null_cond=1
        )
        return Shortcut(every=1)(networks, X, COND, KEY, jnp.int32(0)).mean()

    gradients = jax.grad(loss, argnums=(0, 1))(0.7, 0.7)
    assert gradients[0] != 0 and gradients[1] == 0


def test_the_steps():
    networks = Networks(student=student, teacher=None, schedule=lambda t: -t, null_cond=1)
    t, m, u, is_shortest = map(np.asarray, Shortcut(smallest_steps=8)._draw_step(KEY, networks, 20_000))
    np.testing.assert_allclose(m, (t + u) / 2, atol=1e-6)
    lengths, counts = np.unique((u - t).round(6), return_counts=True)
    np.testing.assert_array_equal(lengths, [0.25, 0.5, 1.0])
    # Four standard errors: 4 sqrt(2/9 / 20,000) = 0.013.
    np.testing.assert_allclose(counts / counts.sum(), 1 / 3, atol=0.013)
    np.testing.assert_array_equal(is_shortest, u - t < 0.3)
    assert np.all((t / (u - t)) % 1 == 0)  # Steps lie between multiples of their length.


def test_examples_do_not_influence_each_other():
    def loss(x):
        networks = Networks(student=student, teacher=None, schedule=SCHEDULE, null_cond=1)
        return Shortcut()(networks, x, COND, KEY, jnp.int32(0))

    np.testing.assert_array_equal(loss(X)[1:], loss(X.at[0].set(0.0))[1:])


def test_the_row():
    config = rows.tiny("shortcut", dataset="openmoji", resolution=16)
    config.teacher_checkpoint = "teacher"
    config = validation.validate(config)
    assert config.takes_end and config.is_student and not config.distils
    assert config.student_steps == (1, 2, 4, 8, 16, 32, 64)
    assert config.target_decay == config.shortcut.target_decay
