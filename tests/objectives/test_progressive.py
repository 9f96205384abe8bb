import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax.diffusion import process, schedules, segments, steps
from mcm_jax.objectives.progressive import Progressive
from tests import reference
from tests.objectives.test_consistency import (
    COND,
    KEY,
    SHAPE,
    X,
    key_numbers,
    linear_model,
    networks,
    numpy_x_hat,
    quadratic_slope,
)

SCHEDULE = schedules.cosine()


def progressive(student, teacher, *, x=X, student_steps=8, **settings):
    objective = Progressive(stages=(2 * student_steps, student_steps), **settings)
    return objective(networks(student, teacher), x, COND, KEY, jnp.int32(0))


def loss(theta, **options):
    return progressive(linear_model(theta), linear_model(0.2), **options)


@pytest.mark.parametrize("teacher_step", ["ddim", "addim"])
@pytest.mark.parametrize("student_steps", [1, 8, 512])
@pytest.mark.parametrize("midpoint_xvar", ["path", "fresh"])
def test_the_whole_loss_in_float64(teacher_step, student_steps, midpoint_xvar):
    """Two steps of the teacher, then invDDIM over both, literally."""
    xvar_frac = 0.4
    actual = loss(
        0.3,
        student_steps=student_steps,
        teacher_step=teacher_step,
        xvar_frac=xvar_frac,
        midpoint_xvar=midpoint_xvar,
    )
    key_times, key_eps, _ = jax.random.split(KEY, 3)
    t, m, s = segments.draw_halves(key_times, batch_size=8, student_steps=student_steps)
    noise = np.asarray(jax.random.normal(key_eps, SHAPE), np.float64)
    fresh_noise = np.asarray(jax.random.normal(jax.random.fold_in(key_eps, 1), SHAPE), np.float64)

    def teach(z, x, at, to, fresh=None):
        x_teacher = numpy_x_hat(0.2, z, at)
        measured = x_teacher if fresh is None else numpy_x_hat(0.2, fresh, at)
        x_var = xvar_frac * np.mean((measured - x) ** 2) if teacher_step == "addim" else 0.0
        return reference.addim(x_teacher, z, at, to, x_var)

    for n in range(8):
        at, middle, to = (float(SCHEDULE(time[n])) for time in (t, m, s))
        x = np.asarray(X[n], np.float64)
        alpha, sigma = reference.alpha_sigma(at)
        z_t = alpha * x + sigma * noise[n]
        fresh = None
        if midpoint_xvar == "fresh":
            alpha_m, sigma_m = reference.alpha_sigma(middle)
            fresh = alpha_m * x + sigma_m * fresh_noise[n]
        z_s = teach(teach(z_t, x, at, middle), x, middle, to, fresh)
        x_diff = reference.inv_ddim(z_s, z_t, at, to) - numpy_x_hat(0.3, z_t, at)
        expected = max(np.exp(at), 1) * np.mean(x_diff**2)
        # Neighbouring log-SNRs of 1,024 teacher steps differ by 6e-3 and are rounded to 1e-6.
        np.testing.assert_allclose(actual[n], expected, rtol=2e-3)


def test_the_target_is_the_composition():
    """A DDIM step with the composed x is the two steps in a row."""
    keys = jax.random.split(jax.random.key(0), 4)
    x_first, x_second, z_t = (jax.random.normal(key, SHAPE) for key in keys[:3])
    t, m, s = (SCHEDULE(time) for time in segments.draw_halves(keys[3], batch_size=8, student_steps=16))
    z_m = steps.ddim(x_first, z_t, logsnr_t=t, logsnr_s=m)
    two = steps.ddim(x_second, z_m, logsnr_t=m, logsnr_s=s)
    x = steps.composed_x(x_first, x_second, logsnr_t=t, logsnr_m=m, logsnr_s=s)
    np.testing.assert_allclose(steps.ddim(x, z_t, logsnr_t=t, logsnr_s=s), two, atol=5e-6)


def test_a_student_that_is_its_teacher_on_a_straight_line_has_no_loss():
    """x_hat = c everywhere: both steps and the student say the same."""

    def constant(z_t, logsnr_t, cond, key):
        del cond, key
        alpha, sigma = (process.over_pixels(f(logsnr_t), z_t) for f in (process.alpha, process.sigma))
        return (alpha * z_t - 0.3) / sigma

    values = progressive(constant, constant, student_steps=4, xvar_frac=0.0)
    # x comes back from v to 1e-7 / sigma; times the weight SNR, of up to 1 / sigma^2.
    assert values.max() < 1e-8


def test_addim_without_variance_is_ddim():
    ddim = loss(0.3, teacher_step="ddim")
    np.testing.assert_array_equal(loss(0.3, xvar_frac=0.0), ddim)
    assert not np.allclose(loss(0.3), ddim)


def test_the_weight_can_be_chosen():
    ratio = np.asarray(loss(0.3, loss_weight="snr_plus_one") / loss(0.3))
    assert np.all((ratio >= 1 - 1e-6) & (ratio <= 2 + 1e-6)) and ratio.std() > 0.01


def test_examples_do_not_influence_each_other():
    whole, disturbed = loss(0.3), loss(0.3, x=X.at[1:].multiply(-0.5))
    np.testing.assert_array_equal(whole[0], disturbed[0])
    assert not np.any(np.asarray(whole[1:]) == np.asarray(disturbed[1:]))


def test_three_network_evaluations():
    """Two of the teacher without dropout, one of the student with it."""
    calls = []

    def counted(name, theta):
        def model_fn(z_t, logsnr_t, cond, key):
            calls.append((name, key_numbers(key)))
            return linear_model(theta)(z_t, logsnr_t, cond, key)

        return model_fn

    progressive(counted("student", 0.3), counted("teacher", 0.2), student_steps=4)
    dropout = key_numbers(jax.random.split(KEY, 3)[2])
    assert sorted(calls) == [("student", dropout), ("teacher", None), ("teacher", None)]


def test_the_gradient_is_that_of_a_quadratic():
    _, slope = jax.jvp(loss, (0.3,), (1.0,))
    np.testing.assert_allclose(slope, quadratic_slope(loss, 0.3), rtol=1e-4)


def test_the_defaults():
    explicit = loss(0.3, teacher_step="addim", xvar_frac=0.75, loss_weight="max_snr_one")
    np.testing.assert_array_equal(loss(0.3), explicit)
