import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mcm_jax.diffusion import guidance, process, schedules
from mcm_jax.objectives.guidance import Guidance
from tests.objectives.test_consistency import (
    COND,
    KEY,
    SHAPE,
    X,
    conditional_model,
    key_numbers,
    linear_model,
    networks,
    quadratic_slope,
)

SCHEDULE = schedules.cosine()
NULL = 9
unconditional_model = guidance.without_condition(conditional_model, NULL)


def loss(student, *, teacher=conditional_model, guide=None, g=1.5, x=X):
    functions = dataclasses.replace(networks(student, teacher, null_cond=NULL), guide=guide)
    return Guidance(teacher_guidance=g)(functions, x, COND, KEY, jnp.int32(0))


def test_guided_is_linear_in_x():
    """x_hat_g = x_hat_cond + g (x_hat_cond - x_hat_uncond), whatever the prediction it is formed from."""
    z_t, logsnr = jax.random.normal(KEY, SHAPE), jnp.linspace(-8, 8, 8)
    v_g = guidance.guided(conditional_model, unconditional_model, guidance=1.5)(z_t, logsnr, COND, None)
    x_cond, x_uncond = (
        process.x_from_v(conditional_model(z_t, logsnr, cond, None), z_t, logsnr_t=logsnr)
        for cond in (COND, jnp.full_like(COND, NULL))
    )
    x_g = process.x_from_v(v_g, z_t, logsnr_t=logsnr)
    np.testing.assert_allclose(x_g, x_cond + 1.5 * (x_cond - x_uncond), atol=1e-5)


def test_no_guidance_is_the_conditional_prediction():
    z_t, logsnr = jax.random.normal(KEY, SHAPE), jnp.linspace(-8, 8, 8)
    v = guidance.guided(conditional_model, unconditional_model, guidance=0.0)(z_t, logsnr, COND, None)
    np.testing.assert_array_equal(v, conditional_model(z_t, logsnr, COND, None))


def test_the_guided_teacher_itself_has_no_loss():
    perfect_student = guidance.guided(conditional_model, unconditional_model, guidance=1.5)
    np.testing.assert_array_equal(loss(perfect_student), 0)
    assert np.all(np.asarray(loss(conditional_model)) > 0)


def test_autoguidance_leads_away_from_the_guide():
    """The guide, not the network without condition, is subtracted; and it gets the condition."""
    guide = linear_model(0.7)
    perfect_student = guidance.guided(conditional_model, guide, guidance=1.5)
    np.testing.assert_array_equal(loss(perfect_student, guide=guide), 0)
    assert np.all(np.asarray(loss(perfect_student)) > 0)
    assert np.all(np.asarray(loss(perfect_student, guide=guidance.without_condition(guide, NULL))) > 0)


def test_a_model_guided_by_itself_is_not_guided():
    z_t, logsnr = jax.random.normal(KEY, SHAPE), jnp.linspace(-8, 8, 8)
    v = guidance.guided(conditional_model, conditional_model, guidance=3.0)(z_t, logsnr, COND, None)
    np.testing.assert_array_equal(v, conditional_model(z_t, logsnr, COND, None))


def test_by_hand():
    key_t, key_eps, _ = jax.random.split(KEY, 3)
    logsnr = SCHEDULE(jax.random.uniform(key_t, (8,)))
    z_t = process.diffuse(X, jax.random.normal(key_eps, SHAPE), logsnr_t=logsnr)
    v_cond, v_any = (conditional_model(z_t, logsnr, jnp.full(8, c), None) for c in (0, NULL))
    error = np.asarray(v_cond + 1.5 * (v_cond - v_any) - linear_model(0.1)(z_t, logsnr, COND, None))
    np.testing.assert_allclose(loss(linear_model(0.1)), np.mean(error**2, axis=(1, 2, 3)), rtol=1e-5)


def test_examples_do_not_influence_each_other():
    whole, disturbed = loss(linear_model(0.3)), loss(linear_model(0.3), x=X.at[1:].multiply(-0.5))
    np.testing.assert_array_equal(whole[0], disturbed[0])
    assert not np.any(np.asarray(whole[1:]) == np.asarray(disturbed[1:]))


def test_three_network_evaluations():
    calls = []

    def counted(name):
        def model_fn(z_t, logsnr_t, cond, key):
            calls.append((name, int(cond[0]), key_numbers(key)))
            return z_t

        return model_fn

    loss(counted("student"), teacher=counted("teacher"), g=1.0)
    dropout = key_numbers(jax.random.split(KEY, 3)[2])
    assert sorted(calls) == [("student", 0, dropout), ("teacher", 0, None), ("teacher", NULL, None)]


def test_the_gradient_is_that_of_a_quadratic():
    def of_theta(theta):
        return loss(linear_model(theta))

    _, slope = jax.jvp(of_theta, (0.3,), (1.0,))
    np.testing.assert_allclose(slope, quadratic_slope(of_theta, 0.3), rtol=1e-4)
