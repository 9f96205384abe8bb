import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax.diffusion import process, schedules, segments, steps
from mcm_jax.objectives import consistency
from mcm_jax.objectives.diffusion import diffusion_loss
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


def loss(theta, *, teacher=None, key=KEY, x=X, **options):
    options = {"student_steps": 4, "teacher_steps": jnp.float32(64), **options}
    return consistency.consistency_loss(
        linear_model(theta), teacher, x, COND, key, schedule=SCHEDULE, **options
    )


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
        teacher_steps=jnp.float32(1),
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

    consistency.consistency_loss(
        spy, None, X, COND, KEY, schedule=SCHEDULE, student_steps=4, teacher_steps=jnp.float32(64)
    )

    def with_constant_target(p):
        calls = iter([lambda *_: frozen[0], linear_model(p)])
        return consistency.consistency_loss(
            lambda *arguments: next(calls)(*arguments),
            None,
            X,
            COND,
            KEY,
            schedule=SCHEDULE,
            student_steps=4,
            teacher_steps=jnp.float32(64),
        ).mean()

    expected = jax.grad(with_constant_target)(theta)
    assert expected != 0
    np.testing.assert_allclose(jax.grad(lambda p: loss(p).mean())(theta), expected, rtol=1e-5)


@pytest.mark.parametrize(("teacher", "calls"), [(False, 2), (True, 3)])
def test_network_evaluations(teacher, calls):
    count = []

    def model_fn(z_t, logsnr_t, cond, key):
        count.append(key)
        return linear_model(0.1)(z_t, logsnr_t, cond, key)

    consistency.consistency_loss(
        model_fn,
        model_fn if teacher else None,
        X,
        COND,
        KEY,
        schedule=SCHEDULE,
        student_steps=4,
        teacher_steps=jnp.float32(64),
    )
    assert len(count) == calls
    # Both of the student's calls share the dropout's randomness; the teacher has none.
    student = [key for key in count if key is not None]
    assert len(student) == 2
    np.testing.assert_array_equal(jax.random.key_data(student[0]), jax.random.key_data(student[1]))


@pytest.mark.parametrize("teacher", [None, linear_model(0.2)])
def test_examples_do_not_influence_each_other(teacher):
    whole = loss(0.3, teacher=teacher)
    disturbed = loss(0.3, teacher=teacher, x=X.at[1:].multiply(-0.5))
    np.testing.assert_array_equal(whole[0], disturbed[0])
    assert not np.any(np.asarray(whole[1:]) == np.asarray(disturbed[1:]))


def test_a_perfect_teacher_is_consistency_training():
    """With x_teacher = x, x_var vanishes and CD is CT."""

    def perfect(z_t, logsnr_t, cond, key):
        del cond, key
        alpha, sigma = (process.over_pixels(f(logsnr_t), z_t) for f in (process.alpha, process.sigma))
        return (alpha * z_t - X) / sigma

    # v has 1 / sigma in it: x comes back to 1e-6 relative, amplified where sigma is small.
    np.testing.assert_allclose(loss(0.3, teacher=perfect), loss(0.3), rtol=5e-3)


def test_ddim_teacher_is_addim_without_variance():
    teacher = linear_model(0.2)
    ddim = loss(0.3, teacher=teacher, teacher_step="ddim")
    np.testing.assert_array_equal(ddim, loss(0.3, teacher=teacher, xvar_frac=0.0))
    assert not np.allclose(ddim, loss(0.3, teacher=teacher))


@hypothesis.given(st.floats(1e-6, 10), st.sampled_from([1e-4, 1e-2, 1.0]))
def test_pseudo_huber_equals_float64(scale, epsilon):
    x_diff = scale * jax.random.normal(KEY, SHAPE)
    m = np.mean(np.asarray(x_diff, np.float64) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(
        consistency.pseudo_huber(x_diff, epsilon=epsilon),
        np.sqrt(m + epsilon**2) - epsilon,
        # float64's own difference cancels to 1e-16 of epsilon.
        rtol=3e-6,
        atol=2e-16,
    )


def test_pseudo_huber_gradient_is_finite_at_zero():
    gradient = jax.grad(lambda d: consistency.pseudo_huber(d, epsilon=1e-4).sum())(jnp.zeros(SHAPE))
    np.testing.assert_array_equal(gradient, 0)


def test_weights():
    logsnr = jnp.array([-15.0, 0.0, 4.0])
    expected = 1 + np.exp([-15.0, 0.0, 4.0])
    np.testing.assert_allclose(consistency.weight(logsnr, kind="snr_plus_one"), expected, rtol=1e-6)
    np.testing.assert_allclose(
        consistency.weight(logsnr, kind="sqrt_snr_plus_one"), np.sqrt(expected), rtol=1e-6
    )


def test_diffusion_loss_of_the_best_constant():
    """v_hat = 0: the expected v-loss is E[alpha^2 + sigma^2 x^2] = 1/2 + mean(x^2) / 2 over t ~ U."""
    x = jnp.tile(X, (512, 1, 1, 1))
    values = diffusion_loss(linear_model(0.0), x, jnp.zeros(len(x), jnp.int32), KEY, schedule=SCHEDULE)
    # 4096 examples with standard deviation 0.3: standard error 0.005.
    np.testing.assert_allclose(values.mean(), 0.5 + 0.5 * jnp.mean(X**2), atol=0.02)


def test_diffusion_examples_do_not_influence_each_other():
    function = functools.partial(diffusion_loss, linear_model(0.3), schedule=SCHEDULE)
    whole, disturbed = function(X, COND, KEY), function(X.at[1:].multiply(-1), COND, KEY)
    np.testing.assert_array_equal(whole[0], disturbed[0])


def test_the_perfect_prediction_has_no_diffusion_loss():
    def perfect(z_t, logsnr_t, cond, key):
        del cond, key
        alpha, sigma = (process.over_pixels(f(logsnr_t), z_t) for f in (process.alpha, process.sigma))
        return (alpha * z_t - X) / sigma

    # Division by sigma of down to 5e-4 amplifies float32's rounding.
    assert diffusion_loss(perfect, X, COND, KEY, schedule=SCHEDULE).max() < 1e-4


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
