import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mcm_jax.training import optimizer
from mcm_jax.training.optimizer import OptimizerSettings


@pytest.mark.parametrize(
    ("decay", "expected"),
    [("constant", [0.25, 0.5, 1.0, 1.0, 1.0]), ("linear", [0.25, 0.5, 1.0, 0.5, 0.0])],
)
def test_learning_rate(decay, expected):
    settings = OptimizerSettings(learning_rate=1.0, warmup_steps=4, decay=decay)
    schedule = optimizer.learning_rate_schedule(settings, num_steps=24)
    np.testing.assert_allclose([schedule(i) for i in (0, 1, 4, 14, 24)], expected, rtol=1e-6, atol=1e-7)


def test_no_warmup():
    settings = OptimizerSettings(learning_rate=0.5, warmup_steps=0, decay="linear")
    schedule = optimizer.learning_rate_schedule(settings, num_steps=10)
    np.testing.assert_allclose([schedule(i) for i in (0, 5, 10)], [0.5, 0.25, 0.0], rtol=1e-6, atol=1e-7)


def test_the_longest_warmup_still_decays():
    settings = OptimizerSettings(learning_rate=1.0, warmup_steps=9, decay="linear")
    schedule = optimizer.learning_rate_schedule(settings, num_steps=10)
    np.testing.assert_allclose([schedule(i) for i in (0, 8, 9, 10)], [1 / 9, 1, 1, 0], rtol=1e-6, atol=1e-7)


def test_optimizers_that_take_turns_have_the_rates_of_their_updates():
    """Of ten updates, five each: the n-th has the learning rate of update 2 n."""
    settings = OptimizerSettings(learning_rate=1.0, decay="linear")
    adam = optimizer.adam(settings, num_steps=10, turns=2)
    state = adam.init(jnp.zeros(()))
    for n in range(5):
        # A constant gradient makes Adam's step the learning rate.
        update, state = adam.update(jnp.ones(()), state)
        np.testing.assert_allclose(update, -(1 - 2 * n / 10), rtol=1e-5)


def test_adam_equals_its_definition():
    """Two updates in float64: clip to norm 1, moments, bias correction."""
    gradients = [np.array([3.0, -4.0]), np.array([0.1, 0.2])]
    expected, m, v = np.zeros(2), np.zeros(2), np.zeros(2)
    for i, gradient in enumerate(gradients, start=1):
        g = gradient / max(1.0, np.linalg.norm(gradient))
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        expected -= 0.1 * (m / (1 - 0.9**i)) / (np.sqrt(v / (1 - 0.99**i)) + 1e-8)
    settings = OptimizerSettings(learning_rate=0.1, b1=0.9, b2=0.99, eps=1e-8, clip_norm=1.0)
    adam = optimizer.adam(settings, num_steps=2)
    params = jnp.zeros(2)
    state = adam.init(params)
    for gradient in gradients:
        updates, state = adam.update(jnp.asarray(gradient, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, expected, rtol=1e-5)
