"""Continuous-time consistency against closed forms and against the discrete objective, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax.diffusion import mixtures, process, schedules, steps
from mcm_jax.models.adm import ADMSettings
from mcm_jax.models.conditions import Classes
from mcm_jax.models.edm2 import EDM2Settings
from mcm_jax.models.mlp import MLPSettings
from mcm_jax.models.network import Network
from mcm_jax.models.placement import Placement
from mcm_jax.models.uvit import UViTSettings
from mcm_jax.objectives import consistency, continuous
from mcm_jax.objectives.continuous import Continuous
from mcm_jax.objectives.objective import Networks

SCHEDULE = schedules.cosine()
KEY = jax.random.key(3)
ONE = jnp.ones(())


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def test_a_ddim_step_is_a_rotation(float64):
    z, v = jax.random.normal(KEY, (2, 5, 4), jnp.float64)
    logsnr_t, logsnr_s = jnp.linspace(-9, 3, 5), jnp.linspace(-3, 9, 5)
    x = process.x_from_v(v, z, logsnr_t=logsnr_t)
    delta = (process.angle(logsnr_t) - process.angle(logsnr_s))[:, None]
    expected = steps.ddim(x, z, logsnr_t=logsnr_t, logsnr_s=logsnr_s)
    np.testing.assert_allclose(jnp.cos(delta) * z - jnp.sin(delta) * v, expected, rtol=1e-12, atol=1e-12)


# --- Forward differentiation. ---


def uvit(**changes):
    return UViTSettings(
        kinds=("resnet", "transformer"),
        widths=(8, 16),
        blocks=(1, 1),
        dropouts=(0.0, 0.0),
        embedding_width=16,
        head_width=8,
        mlp_factor=2,
        **changes,
    )


ARCHITECTURES = {
    "mlp": (MLPSettings(width=8, blocks=2), (6,)),
    "uvit": (uvit(), (8, 8, 3)),
    "uvit, group norm": (uvit(resnet_norm="group"), (8, 8, 3)),
    "adm": (
        ADMSettings(widths=(8, 16), attention_levels=(False, True), blocks=1, heads=2, dtype="float32"),
        (8, 8, 3),
    ),
    "edm2": (
        EDM2Settings(widths=(8, 16), attention_levels=(False, True), blocks=1, head_width=8, dtype="float32"),
        (8, 8, 3),
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_network_is_differentiable_along_the_flow(name, float64):
    """dv/dtheta equals the slope of v on the way."""
    settings, shape = ARCHITECTURES[name]
    network = Network(settings, shape, Classes(2), Placement().with_forward_derivative)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(leaf + rng.normal(0, 0.1, leaf.shape)),
        jax.jit(network.init)(jax.random.key(0)),
    )
    z_t, velocity = jax.random.normal(KEY, (2, 2, *shape), jnp.float64)
    theta = jnp.array([0.4, 1.1])
    label = jnp.array([0, 1])

    @jax.jit
    def v_at(h):
        logsnr = -2 * jnp.log(jnp.tan(theta + h))
        return network.apply(params, z_t + h * velocity, logsnr, label, None)

    def v_fn(z, logsnr):
        return network.apply(params, z, logsnr, label, None)

    logsnr_t = -2 * jnp.log(jnp.tan(theta))
    along = jax.jit(lambda z: continuous.along_flow(v_fn, z, velocity, logsnr_t=logsnr_t))
    v, v_dot = along(z_t)
    slope = (v_at(1e-4) - v_at(-1e-4)) / 2e-4
    np.testing.assert_allclose(v, v_at(0.0), rtol=1e-5, atol=1e-6)
    scale = float(jnp.max(jnp.abs(slope)))
    # The embedding of the noise level turns by 636 radians per radian, so the steps are short, which leaves
    # 1e-3 or a little more of the float32 that the networks return. Measured up to 2.9e-3.
    np.testing.assert_allclose(v_dot / scale, slope / scale, atol=1e-2)
    assert scale > 0.05


# --- The tangent. ---

# N(0.3, 0.4^2) in one dimension: its flow is a line from z_t to z_s.
MEAN, STD = 0.3, 0.4


def flow(z_t, logsnr_t, logsnr_s):
    """The probability flow of N(MEAN, STD^2) from t to s."""
    alpha_t, alpha_s = (process.alpha(a)[:, None] for a in (logsnr_t, logsnr_s))
    std_t, std_s = (
        jnp.sqrt(process.alpha(a) ** 2 * STD**2 + process.sigma(a) ** 2)[:, None]
        for a in (logsnr_t, logsnr_s)
    )
    return alpha_s * MEAN + std_s / std_t * (z_t - alpha_t * MEAN)


def perfect(logsnr_step):
    """v_hat(z, logsnr) whose DDIM step ends on the flow at logsnr_step."""

    def v_fn(z, logsnr):
        delta = (process.angle(logsnr) - process.angle(logsnr_step))[:, None]
        return (jnp.cos(delta) * z - flow(z, logsnr, logsnr_step)) / jnp.sin(delta)

    return v_fn


GAUSSIAN = mixtures.gaussian(np.array([MEAN]), np.array([[STD**2]]))


def tangent_of(v_fn, z_t, velocity, *, logsnr_t, logsnr_step, warmup=ONE):
    v, v_dot = continuous.along_flow(v_fn, z_t, velocity, logsnr_t=logsnr_t)
    return continuous.tangent(
        z_t, velocity, v, v_dot, logsnr_t=logsnr_t, logsnr_step=logsnr_step, warmup=warmup
    )


def batch():
    """z_t, the exact v, and pairs of log-SNRs (t, end of the segment)."""
    logsnr_t, logsnr_step = jnp.array([-6.0, -1.0, 0.5, 5.0]), jnp.array([-2.0, 1.0, 6.0, 9.0])
    z_t = jax.random.normal(KEY, (4, 1), jnp.float64)
    exact = mixtures.model_fn(GAUSSIAN)(z_t, logsnr_t, jnp.zeros(4, jnp.int32), None)
    return z_t, exact, logsnr_t, logsnr_step


def test_the_tangent_of_a_perfect_student_is_zero(float64):
    z_t, exact, logsnr_t, logsnr_step = batch()
    g = tangent_of(perfect(logsnr_step), z_t, exact, logsnr_t=logsnr_t, logsnr_step=logsnr_step)
    # The exact denoiser is float32.
    np.testing.assert_allclose(g, 0, atol=3e-6)
    beside = tangent_of(
        lambda z, logsnr: perfect(logsnr_step)(z, logsnr) + 0.1,
        z_t, exact, logsnr_t=logsnr_t, logsnr_step=logsnr_step,
    )  # fmt: skip
    assert np.all(np.abs(beside) > 1e-3)


def test_the_tangent_is_that_of_the_step_to_the_end(float64):
    """g = cos(delta) df/dtheta, by differences of f along the flow."""
    z_t, exact, logsnr_t, logsnr_step = batch()

    def v_fn(z, logsnr):
        return jnp.sin(2 * z) * jnp.cos(logsnr / 4)[:, None]

    def f(h):
        theta = process.angle(logsnr_t) + h
        delta = (theta - process.angle(logsnr_step))[:, None]
        z = z_t + h * exact
        return jnp.cos(delta) * z - jnp.sin(delta) * v_fn(z, -2 * jnp.log(jnp.tan(theta)))

    delta = (process.angle(logsnr_t) - process.angle(logsnr_step))[:, None]
    expected = jnp.cos(delta) * (f(1e-4) - f(-1e-4)) / 2e-4
    g = tangent_of(v_fn, z_t, exact, logsnr_t=logsnr_t, logsnr_step=logsnr_step)
    np.testing.assert_allclose(g, expected, rtol=1e-5, atol=1e-6)


def test_at_the_end_of_the_segment_it_is_diffusion_training(float64):
    z_t, exact, logsnr_t, _ = batch()
    g = tangent_of(lambda z, logsnr: jnp.sin(z), z_t, exact, logsnr_t=logsnr_t, logsnr_step=logsnr_t)
    np.testing.assert_allclose(g, exact - jnp.sin(z_t), rtol=1e-12)


def test_the_data_replace_the_teacher_on_average(float64):
    """g is affine in the velocity: its mean over x given z_t is the g of the mean velocity, the teacher's."""
    z_t, exact, logsnr_t, logsnr_step = batch()
    places = {"logsnr_t": logsnr_t, "logsnr_step": logsnr_step}

    def v_fn(z, logsnr):
        return jnp.sin(2 * z) * jnp.cos(logsnr / 4)[:, None]

    spread = jax.random.normal(jax.random.key(8), z_t.shape)
    sides = [tangent_of(v_fn, z_t, exact + sign * spread, **places) for sign in (-1, 1)]
    np.testing.assert_allclose(sum(sides) / 2, tangent_of(v_fn, z_t, exact, **places), rtol=1e-10, atol=1e-12)
    assert np.all(np.abs(sides[0] - sides[1]) > 1e-3)


def test_the_discrete_gradient_tends_to_the_tangent(float64):
    """x_target - x_hat = -h sigma / (sin(delta) cos(delta)) g + O(h^2) for a teacher step of the angle h."""
    z_t, exact, logsnr_t, logsnr_step = batch()

    def v_fn(z, logsnr):
        return jnp.sin(2 * z) * jnp.cos(logsnr / 4)[:, None]

    def difference(h):
        logsnr_s = -2 * jnp.log(jnp.tan(process.angle(logsnr_t) - h))
        x_step = process.x_from_v(exact, z_t, logsnr_t=logsnr_t)
        z_s = steps.ddim(x_step, z_t, logsnr_t=logsnr_t, logsnr_s=logsnr_s)
        x_target = consistency.consistency_target(
            x_step,
            process.x_from_v(v_fn(z_s, logsnr_s), z_s, logsnr_t=logsnr_s),
            logsnr_t=logsnr_t, logsnr_s=logsnr_s, logsnr_step=logsnr_step, is_last=jnp.zeros(4, bool),
        )  # fmt: skip
        return (x_target - process.x_from_v(v_fn(z_t, logsnr_t), z_t, logsnr_t=logsnr_t)) / h

    delta = (process.angle(logsnr_t) - process.angle(logsnr_step))[:, None]
    factor = process.sigma(logsnr_t)[:, None] / (jnp.sin(delta) * jnp.cos(delta))
    g = tangent_of(v_fn, z_t, exact, logsnr_t=logsnr_t, logsnr_step=logsnr_step)
    errors = [float(jnp.linalg.norm(difference(h) + factor * g)) for h in (4e-3, 2e-3, 1e-3)]
    ratios = np.divide(errors[:-1], errors[1:])
    np.testing.assert_allclose(ratios, 2, rtol=0.05)
    assert errors[-1] < 0.05 * float(jnp.linalg.norm(factor * g))


# --- The loss. ---

X = jnp.tanh(jax.random.normal(jax.random.key(1), (8, 4, 4, 3)))
COND = jnp.zeros(8, jnp.int32)


def linear(theta):
    return lambda z, logsnr, cond, key: theta * z * process.over_pixels(jnp.cos(logsnr / 8) + cond, z)


def networks(theta, *, teacher=None, target=None):
    return Networks(student=linear(theta), teacher=teacher, target=target, schedule=SCHEDULE, null_cond=-1)


def loss_of(objective, theta, *, train_step=10**6, key=KEY, **others):
    return objective(networks(theta, **others), X, COND, key, jnp.int32(train_step))


@pytest.mark.parametrize("teacher", [None, linear(0.2)])
@pytest.mark.parametrize("proposal", ["uniform", "lognormal"])
def test_loss_and_gradient(proposal, teacher):
    """The loss is ||g~||^2 / d, and its gradient -2 g~ dv/dtheta / d, of the normalised g~."""
    objective = Continuous(student_steps=(4,), proposal=proposal)
    theta = 0.3
    loss, slope = jax.jvp(lambda theta: loss_of(objective, theta, teacher=teacher), (theta,), (1.0,))

    key_times, key_eps, _ = jax.random.split(KEY, 3)
    logsnr_t, logsnr_step = objective._draw_logsnr(key_times, 8, SCHEDULE, 4)
    eps = jax.random.normal(key_eps, X.shape)
    z_t = process.diffuse(X, eps, logsnr_t=logsnr_t)
    velocity = process.v_from_x_eps(X, eps, logsnr_t=logsnr_t)
    if teacher is not None:
        velocity = teacher(z_t, logsnr_t, COND, None)
    g = tangent_of(
        lambda z, logsnr: linear(theta)(z, logsnr, COND, None), z_t, velocity,
        logsnr_t=logsnr_t, logsnr_step=logsnr_step,
    )  # fmt: skip
    g = np.asarray(g, np.float64)
    g /= np.sqrt(np.mean(g**2, axis=(1, 2, 3), keepdims=True)) + 0.1
    v_slope = np.asarray(linear(1.0)(z_t, logsnr_t, COND, None), np.float64)
    np.testing.assert_allclose(loss, np.mean(g**2, axis=(1, 2, 3)), rtol=1e-4)
    # The smallest slopes cancel.
    np.testing.assert_allclose(slope, -2 * np.mean(g * v_slope, axis=(1, 2, 3)), rtol=1e-3, atol=1e-4)


def test_the_second_term_grows_with_the_updates():
    """At update 0 the tangent is cos^2(delta) (velocity - v_hat): a teacher has none, later it has."""
    objective = Continuous(student_steps=(2,), warmup_steps=100, proposal="uniform")
    at = [loss_of(objective, 0.2, teacher=linear(0.2), train_step=i) for i in (0, 50, 100, 200)]
    np.testing.assert_allclose(at[0], 0, atol=1e-10)
    assert np.all(at[0] < at[1]) and np.all(at[1] < at[2])
    np.testing.assert_array_equal(at[2], at[3])


def test_guidance_changes_the_teachers_flow():
    objective = Continuous(student_steps=(2,), teacher_guidance=0.5)
    guided = loss_of(objective, 0.3, teacher=linear(0.2))
    # `linear` depends on the class: the null class -1 has another flow.
    plain = loss_of(dataclasses.replace(objective, teacher_guidance=0.0), 0.3, teacher=linear(0.2))
    assert not np.allclose(guided, plain)


def test_the_target_network_makes_the_tangent():
    objective = Continuous(student_steps=(2,))
    own = loss_of(objective, 0.3, teacher=linear(0.2))
    np.testing.assert_array_equal(own, loss_of(objective, 0.3, teacher=linear(0.2), target=linear(0.3)))
    assert not np.allclose(own, loss_of(objective, 0.3, teacher=linear(0.2), target=linear(0.1)))


def test_tangent_and_student_share_their_dropout():
    keys = []

    def recorded(z, logsnr, cond, key):
        keys.append(np.asarray(jax.random.key_data(key)).tolist())
        return linear(0.3)(z, logsnr, cond, key)

    teacher_keys = []

    def teacher(z, logsnr, cond, key):
        teacher_keys.append(key)
        return linear(0.2)(z, logsnr, cond, key)

    found = Networks(student=recorded, teacher=teacher, schedule=SCHEDULE, null_cond=-1)
    Continuous(student_steps=(2,))(found, X, COND, KEY, jnp.int32(0))
    assert (
        len(keys) == 2
        and keys[0] == keys[1] == np.asarray(jax.random.key_data(jax.random.split(KEY, 3)[2])).tolist()
    )
    assert teacher_keys == [None]


def test_examples_do_not_influence_each_other():
    objective = Continuous(student_steps=(2,))

    def loss(x):
        return objective(networks(0.3), x, COND, KEY, jnp.int32(10**6))

    np.testing.assert_array_equal(loss(X)[1:], loss(X.at[0].set(0.0))[1:])


# --- Times. ---


@pytest.mark.parametrize("student_steps", [1, 4])
@pytest.mark.parametrize("proposal", ["uniform", "lognormal"])
def test_every_time_is_in_its_segment(proposal, student_steps):
    objective = Continuous(student_steps=(student_steps,), proposal=proposal)
    logsnr_t, logsnr_step = objective._draw_logsnr(KEY, 4096, SCHEDULE, student_steps)
    ends = np.asarray(SCHEDULE(jnp.linspace(0, 1, student_steps + 1)))
    segment = np.argmin(np.abs(np.asarray(logsnr_step)[:, None] - ends[:-1]), axis=1)
    np.testing.assert_allclose(logsnr_step, ends[segment], rtol=1e-6)
    assert np.all(logsnr_t <= logsnr_step) and np.all(logsnr_t >= ends[segment + 1] - 1e-5)
    assert set(segment) == set(range(student_steps))


def test_the_proposals_have_their_distributions():
    lognormal = Continuous(student_steps=(4,), proposal="lognormal")
    logsnr_t, _ = lognormal._draw_logsnr(KEY, 20_000, SCHEDULE, 4)
    # Four standard errors.
    assert abs(np.mean(-logsnr_t / 2) + 1.0) < 4 * 1.6 / 20_000**0.5
    assert abs(np.std(-logsnr_t / 2) - 1.6) < 4 * 1.6 / 40_000**0.5
    uniform, _ = Continuous(student_steps=(4,))._draw_logsnr(KEY, 20_000, SCHEDULE, 4)
    t = np.sort(np.asarray(process.angle(uniform)) * 2 / np.pi)  # The cosine schedule's t.
    assert np.max(np.abs(t - np.linspace(0, 1, len(t)))) < 0.02
