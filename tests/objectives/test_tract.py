import jax
import jax.numpy as jnp
import numpy as np

from mcm_jax.objectives.tract import Tract
from tests.objectives.test_consistency import COND, KEY, X, constant_grid, linear_model, networks


def loss(theta, *, target=None, weight="max_snr_one", student_steps=4, teacher_steps=64):
    student = linear_model(theta)
    functions = networks(student, linear_model(0.2), student if target is None else target)
    objective = Tract(stages=(teacher_steps, student_steps), loss_weight=weight)
    return objective(functions, X, COND, KEY, jnp.int32(0))


def test_one_phase_without_momentum_is_distillation_with_a_constant_grid():
    """For the same distance, weight and DDIM step: loss and gradient (the target being the student's own)."""

    def distillation(theta):
        objective = constant_grid(teacher_step="ddim", distance="squared", loss_weight="snr_plus_one")
        functions = networks(linear_model(theta), linear_model(0.2))
        return objective(functions, X, COND, KEY, jnp.int32(0))

    def tract(theta):
        target = linear_model(jax.lax.stop_gradient(theta))
        return loss(theta, target=target, weight="snr_plus_one")

    np.testing.assert_array_equal(tract(0.3), distillation(0.3))
    a, b = (jax.grad(lambda theta, f=f: f(theta).mean())(0.3) for f in (tract, distillation))
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_its_own_weight():
    """max(SNR, 1) over SNR + 1 is between 1/2, where SNR = 1, and 1."""
    ratio = np.asarray(loss(0.3) / loss(0.3, weight="snr_plus_one"))
    assert np.all((ratio >= 0.5 - 1e-6) & (ratio <= 1 + 1e-6))
    assert ratio.std() > 0.01


def test_the_target_network_is_used():
    assert not np.allclose(loss(0.3, target=linear_model(0.1)), loss(0.3))
