import dataclasses
import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax.diffusion import guidance, process, schedules, segments, steps
from mcm_jax.objectives import consistency
from mcm_jax.objectives.consistency import Consistency
from mcm_jax.objectives.objective import Networks
from tests import reference

SCHEDULE = schedules.cosine()
SHAPE = (8, 4, 4, 3)
X = jnp.tanh(jax.random.normal(jax.random.key(1), SHAPE))
COND = jnp.zeros(SHAPE[0], jnp.int32)
KEY = jax.random.key(7)


def linear_model(theta):
    """v_hat = theta z_t, with a class and a noise level that matter; theta is a scalar."""

    def model_fn(z_t, logsnr_t, cond, key):
        del key
        return theta * z_t * process.over_pixels(jnp.cos(logsnr_t / 8) + cond, z_t)

    return model_fn


def perfect(z_t, logsnr_t, cond, key):
    """v of x_hat = X."""
    del cond, key
    alpha, sigma = (process.over_pixels(f(logsnr_t), z_t) for f in (process.alpha, process.sigma))
    return (alpha * z_t - X) / sigma


def key_numbers(key):
    """A key as what == compares; None is none."""
    return None if key is None else jax.random.key_data(key).tolist()


def quadratic_slope(function, theta):
    """The derivative of a quadratic is its central difference, however wide."""
    return (function(theta + 1) - function(theta - 1)) / 2


def networks(student, teacher=None, target=None, *, schedule=SCHEDULE, null_cond=-1):
    return Networks(student=student, teacher=teacher, target=target, schedule=schedule, null_cond=null_cond)


def constant_grid(teacher_steps=64, *, student_steps=4, **settings):
    """Consistency with the same N_teacher in every update."""
    first = last = float(teacher_steps)
    return Consistency(
        student_steps=(student_steps,), teacher_steps_first=first, teacher_steps_last=last, **settings
    )


def loss(theta, *, teacher=None, guide=None, key=KEY, x=X, null_cond=-1, **settings):
    functions = networks(linear_model(theta), teacher, null_cond=null_cond)
    functions = dataclasses.replace(functions, guide=guide)
    return constant_grid(**settings)(functions, x, COND, key, jnp.int32(0))


@hypothesis.given(
    st.integers(0, 2**31 - 1),
    st.integers(1, 8),
    st.integers(1, 160),
    st.sampled_from([0.0, 0.3]),
)
def test_target_equals_algorithm_1_literally(seed, student_steps, n_per, x_var):
    """The one-line target against the chain aDDIM, DDIM, invDDIM in float64."""
    keys = jax.random.split(jax.random.key(seed), 4)
    times = segments.draw_times(
        keys[0], batch_size=8, student_steps=student_steps, steps_per_segment=jnp.int32(n_per)
    )
    t, s, u = (SCHEDULE(time) for time in (times.t, times.s, times.t_step))
    x_teacher, x_ref = (0.5 * jax.random.normal(key, SHAPE) for key in keys[1:3])
    z_t = process.diffuse(X, jax.random.normal(keys[3], SHAPE), logsnr_t=t)
    x_step = steps.addim_x(x_teacher, z_t, logsnr_t=t, logsnr_s=s, x_var=jnp.full(8, x_var))
    actual = consistency.consistency_target(
        x_step, x_ref, logsnr_t=t, logsnr_s=s, logsnr_step=u, is_last=times.is_last
    )
    for n in range(8):
        images = (np.asarray(a[n], np.float64) for a in (x_teacher, x_ref, z_t))
        expected = reference.consistency_target(*images, float(t[n]), float(s[n]), float(u[n]), x_var)
        # Log-SNRs differ by down to 3e-3 and are rounded to 1e-6: both ways see the same ones.
        np.testing.assert_allclose(actual[n], expected, atol=2e-4)


def test_anchor_is_exact_whatever_the_student_says():
    x_step = X
    x_ref = jnp.full(SHAPE, jnp.nan)
    logsnr = jnp.linspace(-8, 8, 8)
    target = consistency.consistency_target(
        x_step,
        x_ref,
        logsnr_t=logsnr - 1,
        logsnr_s=logsnr,
        logsnr_step=logsnr,
        is_last=jnp.ones(8, bool),
    )
    np.testing.assert_array_equal(target, x_step)


@pytest.mark.parametrize("weight", ["snr_plus_one", "sqrt_snr_plus_one"])
def test_one_step_segments_are_diffusion_training(weight):
    """N_per = 1 with x_teacher = x: w_t huber(x - x_hat) on the grid's times, loss and gradient."""
    student_steps, epsilon = 16, 1e-4

    def expected(theta):
        key_times, key_eps, _ = jax.random.split(KEY, 3)
        times = segments.draw_times(
            key_times, batch_size=8, student_steps=student_steps, steps_per_segment=jnp.int32(1)
        )
        logsnr = SCHEDULE(times.t)
        z_t = process.diffuse(X, jax.random.normal(key_eps, SHAPE), logsnr_t=logsnr)
        v_hat = linear_model(theta)(z_t, logsnr, COND, None)
        x_hat = process.x_from_v(v_hat, z_t, logsnr_t=logsnr)
        snr_plus_one = 1 / process.sigma(logsnr) ** 2
        w = snr_plus_one if weight == "snr_plus_one" else jnp.sqrt(snr_plus_one)
        distance = jnp.sqrt(jnp.mean((X - x_hat) ** 2, axis=(1, 2, 3)) + epsilon**2) - epsilon
        return w * distance

    actual = functools.partial(
        loss,
        student_steps=student_steps,
        teacher_steps=1,
        loss_weight=weight,
        huber_epsilon=epsilon,
    )
    theta = jnp.float32(0.3)
    np.testing.assert_allclose(actual(theta), expected(theta), rtol=2e-4)
    gradients = [jax.grad(lambda p, f=f: f(p).mean())(theta) for f in (actual, expected)]
    np.testing.assert_allclose(*gradients, rtol=2e-4)


def test_the_gradient_flows_through_f_at_t_alone():
    """The derivative equals that of the loss with the target frozen at the same parameters."""
    theta = jnp.float32(0.3)
    frozen = []

    def spy(z_t, logsnr_t, cond, key):
        v = linear_model(theta)(z_t, logsnr_t, cond, key)
        frozen.append(v)
        return v

    constant_grid()(networks(spy), X, COND, KEY, jnp.int32(0))

    def with_constant_target(p):
        calls = iter([lambda *_: frozen[0], linear_model(p)])
        student = networks(lambda *arguments: next(calls)(*arguments))
        return constant_grid()(student, X, COND, KEY, jnp.int32(0)).mean()

    expected = jax.grad(with_constant_target)(theta)
    assert expected != 0
    np.testing.assert_allclose(jax.grad(lambda p: loss(p).mean())(theta), expected, rtol=1e-5)


@pytest.mark.parametrize(("teacher", "guidance", "calls"), [(False, 0.0, 2), (True, 0.0, 3), (True, 1.5, 4)])
def test_network_evaluations(teacher, guidance, calls):
    count = []

    def model_fn(z_t, logsnr_t, cond, key):
        count.append(key)
        return linear_model(0.1)(z_t, logsnr_t, cond, key)

    functions = networks(model_fn, model_fn if teacher else None)
    constant_grid(teacher_guidance=guidance)(functions, X, COND, KEY, jnp.int32(0))
    assert len(count) == calls
    # Both of the student's calls share the dropout's randomness, which is its own; the teacher has none.
    dropout = key_numbers(jax.random.split(KEY, 3)[2])
    assert [key_numbers(key) for key in count if key is not None] == [dropout, dropout]


def test_the_target_network_is_what_speaks_at_s():
    """Given as a function of its own, it replaces the student in x_ref and nowhere else."""
    seen = {"student": [], "target": []}

    def spy(name, theta):
        def model_fn(z_t, logsnr_t, cond, key):
            seen[name].append((logsnr_t, key))
            return linear_model(theta)(z_t, logsnr_t, cond, key)

        return model_fn

    objective = constant_grid(16, student_steps=2)
    separate = objective(networks(spy("student", 0.3), target=spy("target", 0.3)), X, COND, KEY, jnp.int32(0))
    np.testing.assert_array_equal(separate, loss(0.3, teacher_steps=16, student_steps=2))
    (at_t, key_t), (at_s, key_s) = seen["student"][0], seen["target"][0]
    assert len(seen["student"]) == len(seen["target"]) == 1
    assert np.all(np.asarray(at_s) > np.asarray(at_t))
    np.testing.assert_array_equal(jax.random.key_data(key_t), jax.random.key_data(key_s))
    other = objective(networks(linear_model(0.3), target=linear_model(0.1)), X, COND, KEY, jnp.int32(0))
    assert not np.allclose(other, separate)


def test_no_gradient_through_a_target_network_or_teacher():
    def total(theta):
        functions = networks(linear_model(0.3), linear_model(0.2), linear_model(theta))
        return constant_grid(16, student_steps=2)(functions, X, COND, KEY, jnp.int32(0)).sum()

    assert jax.grad(total)(0.1) == 0


@pytest.mark.parametrize("teacher", [None, linear_model(0.2)])
def test_examples_do_not_influence_each_other(teacher):
    whole = loss(0.3, teacher=teacher)
    disturbed = loss(0.3, teacher=teacher, x=X.at[1:].multiply(-0.5))
    np.testing.assert_array_equal(whole[0], disturbed[0])
    assert not np.any(np.asarray(whole[1:]) == np.asarray(disturbed[1:]))


def test_a_perfect_teacher_is_consistency_training():
    """With x_teacher = x, x_var vanishes and CD is CT."""
    # v has 1 / sigma in it: x comes back to 1e-6 relative, amplified where sigma is small.
    np.testing.assert_allclose(loss(0.3, teacher=perfect), loss(0.3), rtol=5e-3)


def test_ddim_teacher_is_addim_without_variance():
    teacher = linear_model(0.2)
    ddim = loss(0.3, teacher=teacher, teacher_step="ddim")
    np.testing.assert_array_equal(ddim, loss(0.3, teacher=teacher, xvar_frac=0.0))
    assert not np.allclose(ddim, loss(0.3, teacher=teacher))


def test_heuns_step_calls_the_teacher_where_ddim_leads():
    """The target's x, against Heun's step in sigma = sigma_t / alpha_t, in float64."""
    t, s = jnp.linspace(-6.0, 3.0, 8), jnp.linspace(-5.0, 8.0, 8)
    teacher = linear_model(0.2)
    z_t = process.diffuse(X, jax.random.normal(KEY, SHAPE), logsnr_t=t)
    found = constant_grid(teacher_step="heun")._teacher_x(
        networks(perfect, teacher), X, z_t, COND, logsnr_t=t, logsnr_s=s
    )
    z_s = steps.ddim(found, z_t, logsnr_t=t, logsnr_s=s)
    for n in range(8):
        (a_t, s_t), (a_s, s_s) = (reference.alpha_sigma(float(logsnr[n])) for logsnr in (t, s))
        image = np.asarray(z_t[n], np.float64)
        eps_t = (image - a_t * numpy_x_hat(0.2, image, float(t[n]))) / s_t
        euler = a_s * (image / a_t + (s_s / a_s - s_t / a_t) * eps_t)
        eps_s = (euler - a_s * numpy_x_hat(0.2, euler, float(s[n]))) / s_s
        expected = reference.heun(None, eps_t, eps_s, image, float(t[n]), float(s[n]))
        np.testing.assert_allclose(z_s[n], expected, rtol=1e-4, atol=1e-4)


def test_consistency_training_has_no_heun_step():
    """Its step takes the data, with which every integrator is exact."""
    np.testing.assert_array_equal(loss(0.3, teacher_step="heun"), loss(0.3, teacher_step="ddim"))


def numpy_x_hat(theta, z_t, logsnr):
    """x_hat of `linear_model(theta)` for one example of class 0, in float64."""
    alpha, sigma = reference.alpha_sigma(logsnr)
    return alpha * z_t - sigma * theta * z_t * np.cos(logsnr / 8)


@pytest.mark.parametrize("distilled", [False, True])
def test_the_whole_loss_equals_algorithm_1_in_float64(distilled):
    """Every line of Algorithm 1 for the same draws: what f sees at s, x_var's fraction, the weight."""
    theta, theta_teacher, xvar_frac, epsilon = 0.3, 0.2, 0.4, 1e-2
    actual = loss(
        theta,
        teacher=linear_model(theta_teacher) if distilled else None,
        xvar_frac=xvar_frac,
        huber_epsilon=epsilon,
        loss_weight="snr_plus_one",
    )
    key_times, key_eps, _ = jax.random.split(KEY, 3)
    times = segments.draw_times(key_times, batch_size=8, student_steps=4, steps_per_segment=jnp.int32(16))
    noise = np.asarray(jax.random.normal(key_eps, SHAPE), np.float64)
    assert not np.all(times.is_last)
    for n in range(8):
        t, s, step = (float(SCHEDULE(time[n])) for time in (times.t, times.s, times.t_step))
        x = np.asarray(X[n], np.float64)
        alpha, sigma = reference.alpha_sigma(t)
        z_t = alpha * x + sigma * noise[n]
        x_teacher = numpy_x_hat(theta_teacher, z_t, t) if distilled else x
        x_var = xvar_frac * np.mean((x_teacher - x) ** 2)
        x_ref = numpy_x_hat(theta, reference.addim(x_teacher, z_t, t, s, x_var), s)
        if times.is_last[n]:
            x_target = reference.inv_ddim(reference.addim(x_teacher, z_t, t, s, x_var), z_t, t, step)
        else:
            x_target = reference.consistency_target(x_teacher, x_ref, z_t, t, s, step, x_var)
        m = np.mean((x_target - numpy_x_hat(theta, z_t, t)) ** 2)
        expected = (1 + np.exp(t)) * (np.sqrt(m + epsilon**2) - epsilon)
        np.testing.assert_allclose(actual[n], expected, rtol=1e-3)


def conditional_model(z_t, logsnr_t, cond, key):
    """Class 0 and 'any class' (9) have quite different opinions."""
    return linear_model(0.2)(z_t, logsnr_t, jnp.where(cond == 9, 3, cond), key)


def test_the_guided_teacher_in_float64():
    """x_teacher = x_cond + g (x_cond - x_any), while x_var is of the conditional prediction (SPEC 3)."""
    g, xvar_frac = 0.7, 0.4
    actual = loss(0.3, teacher=conditional_model, teacher_guidance=g, null_cond=9, xvar_frac=xvar_frac)
    key_times, key_eps, _ = jax.random.split(KEY, 3)
    times = segments.draw_times(key_times, batch_size=8, student_steps=4, steps_per_segment=jnp.int32(16))
    noise = np.asarray(jax.random.normal(key_eps, SHAPE), np.float64)
    for n in range(8):
        t, s, step = (float(SCHEDULE(time[n])) for time in (times.t, times.s, times.t_step))
        x = np.asarray(X[n], np.float64)
        alpha, sigma = reference.alpha_sigma(t)
        z_t = alpha * x + sigma * noise[n]
        x_cond = numpy_x_hat(0.2, z_t, t)
        x_any = alpha * z_t - sigma * 0.2 * z_t * (np.cos(t / 8) + 3)
        x_guided = x_cond + g * (x_cond - x_any)
        x_var = xvar_frac * np.mean((x_cond - x) ** 2)
        x_ref = numpy_x_hat(0.3, reference.addim(x_guided, z_t, t, s, x_var), s)
        if times.is_last[n]:
            x_target = reference.inv_ddim(reference.addim(x_guided, z_t, t, s, x_var), z_t, t, step)
        else:
            x_target = reference.consistency_target(x_guided, x_ref, z_t, t, s, step, x_var)
        expected = math.sqrt(1 + np.exp(t)) * reference.pseudo_huber(
            x_target - numpy_x_hat(0.3, z_t, t), 1e-4
        )
        np.testing.assert_allclose(actual[n], expected, rtol=1e-3)


@pytest.mark.parametrize("teacher_step", ["addim", "ddim", "heun"])
def test_a_guide_takes_the_place_of_the_unconditional_teacher(teacher_step):
    options = {"teacher": conditional_model, "teacher_guidance": 0.7, "teacher_step": teacher_step}
    unguided = loss(0.3, teacher=conditional_model, teacher_step=teacher_step)
    any_class = guidance.without_condition(conditional_model, 9)
    # 9 is 'any class' of the first only, so that the second needs its guide.
    expected, actual = loss(0.3, null_cond=9, **options), loss(0.3, guide=any_class, **options)
    np.testing.assert_array_equal(actual, expected)
    assert not np.allclose(actual, unguided)
    by_itself = loss(0.3, guide=conditional_model, **options)
    np.testing.assert_array_equal(by_itself, unguided)


def test_the_defaults():
    teacher = linear_model(0.2)
    explicit = loss(
        0.3,
        teacher=teacher,
        teacher_step="addim",
        xvar_frac=0.75,
        teacher_guidance=0.0,
        distance="huber",
        huber_epsilon=1e-4,
        huber_reduction="mean",
        target_network="student",
        loss_weight="sqrt_snr_plus_one",
    )
    np.testing.assert_array_equal(loss(0.3, teacher=teacher), explicit)
    guided = loss(0.3, teacher=teacher, teacher_guidance=1.0)
    np.testing.assert_array_equal(guided, loss(0.3, teacher=teacher, teacher_guidance=1.0, null_cond=-1))
