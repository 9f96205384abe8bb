"""ECT's and iCT's teacher steps and weights, against their formulas in float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax.config import rows, validation
from mcm_jax.diffusion import schedules, segments
from mcm_jax.objectives.consistency import Consistency
from mcm_jax.objectives.levels import ect_logsnr
from mcm_jax.objectives.objective import Networks
from mcm_jax.system.errors import InputError
from tests import reference

SCHEDULE = schedules.cosine()
KEY = jax.random.key(5)
X = jnp.tanh(jax.random.normal(jax.random.key(1), (8, 4, 4, 3)))
COND = jnp.zeros(8, jnp.int32)
ECT = Consistency((2,), teacher_grid="ect", ect_stage_steps=10, proposal="lognormal")


def noise_of(logsnr):
    return np.exp(-np.asarray(logsnr, np.float64) / 2)


@pytest.mark.parametrize("q", [2.0, 4.0])
@pytest.mark.parametrize("stage", [0, 3])
def test_ects_step(q, stage):
    """r = t (1 - q^-(stage + 1) (1 + 8 / (1 + e^t))), written out for each noise level."""
    for noise_t in (0.01, 0.5, 1.9, 2.1, 30.0):
        r = noise_t * (1 - (1 + 8 / (1 + math.exp(noise_t))) / q ** (stage + 1))
        logsnr_t, logsnr_step = (jnp.array([-2 * math.log(noise)]) for noise in (noise_t, 0.005))
        logsnr_s = ect_logsnr(logsnr_t, logsnr_step, stage=jnp.int32(stage), q=q)
        np.testing.assert_allclose(noise_of(logsnr_s)[0], max(r, 0.005), rtol=1e-5)


def test_ects_first_steps_end_their_segment_and_later_ones_are_shorter():
    steps = [ECT._draw_levels(KEY, 4096, SCHEDULE, jnp.int32(n), 2) for n in (0, 9, 10, 60)]
    for levels in steps:
        assert jnp.all(levels.t <= levels.s) and jnp.all(levels.s <= levels.t_step)
        np.testing.assert_array_equal(levels.is_last, levels.s == levels.t_step)
        np.testing.assert_array_equal(levels.t, steps[0].t)
    # At stage 0, q = 2: up to the noise level at which 8 / (1 + e^t) = 1, the step leads to the end.
    assert jnp.all(steps[0].is_last[noise_of(steps[0].t) < math.log(7)])
    np.testing.assert_array_equal(steps[0].s, steps[1].s)
    shares = [np.mean(levels.is_last) for levels in steps]
    assert shares[1] > shares[2] > shares[3]


@pytest.mark.parametrize("student_steps", [1, 3])
def test_with_s_segments_ect_is_limited_to_each(student_steps):
    objective = dataclasses.replace(ECT, student_steps=(student_steps,), proposal="uniform")
    levels = objective._draw_levels(KEY, 4096, SCHEDULE, jnp.int32(40), student_steps)
    ends = np.asarray(SCHEDULE(jnp.arange(student_steps) / student_steps))
    np.testing.assert_allclose(np.unique(levels.t_step), np.sort(ends), rtol=1e-6)


def test_icts_teacher_steps_double():
    """s0 = 10 to 1280 are eight plateaus of floor(K / 8) updates."""
    grown = jax.vmap(
        lambda step: segments.doubling_teacher_steps(step, first=10.0, last=1280.0, anneal_steps=800)
    )(jnp.arange(0, 900, 7))
    np.testing.assert_array_equal(grown, [min(10 * 2 ** (i // 100), 1280) for i in range(0, 900, 7)])
    # A range that no power of two spans ends at its end.
    last = segments.doubling_teacher_steps(jnp.int32(900), first=10.0, last=100.0, anneal_steps=800)
    assert float(last) == 100.0


def model_fn(z_t, logsnr_t, cond, key):
    return 0.3 * z_t * jnp.cos(logsnr_t / 8)[:, None, None, None]


def loss(objective, train_step=0):
    networks = Networks(student=model_fn, teacher=None, target=None, schedule=SCHEDULE, null_cond=-1)
    return objective(networks, X, COND, KEY, jnp.int32(train_step))


@pytest.mark.parametrize(
    "objective",
    [
        dataclasses.replace(ECT, loss_weight="edm", teacher_step="ddim"),
        Consistency((2,), teacher_grid="doubling", loss_weight="inverse_gap", huber_epsilon=5.4e-4),
    ],
    ids=["ect", "ict"],
)
def test_the_loss_in_float64(objective):
    """One consistency-training step from t to s, and the distance with its weight."""
    actual = loss(objective, train_step=25)
    key_times, key_eps, _ = jax.random.split(KEY, 3)
    levels = objective._draw_levels(key_times, 8, SCHEDULE, jnp.int32(25), 2)
    noise = np.asarray(jax.random.normal(key_eps, X.shape), np.float64)
    assert 0 < np.sum(levels.is_last) < 8 or objective.teacher_grid == "doubling"
    for n in range(8):
        t, s, step = (float(level[n]) for level in levels[:3])
        x = np.asarray(X[n], np.float64)
        (alpha, sigma), (alpha_s, sigma_s) = reference.alpha_sigma(t), reference.alpha_sigma(s)
        z_t, z_s = alpha * x + sigma * noise[n], alpha_s * x + sigma_s * noise[n]
        f_t = alpha * z_t - sigma * 0.3 * z_t * np.cos(t / 8)
        f_s = alpha_s * z_s - sigma_s * 0.3 * z_s * np.cos(s / 8)
        x_target = x if levels.is_last[n] else reference.consistency_target(x, f_s, z_t, t, s, step, 0.0)
        m, epsilon = np.mean((x_target - f_t) ** 2), objective.huber_epsilon
        tau_t, tau_s = np.exp(-t / 2), np.exp(-s / 2)
        w_t = (tau_t**2 + 0.25) / (tau_t * 0.5) ** 2
        if objective.loss_weight == "inverse_gap":
            w_t = 1 / (tau_t - tau_s)
        # Beside float32, the difference of two near noise levels.
        np.testing.assert_allclose(actual[n], w_t * (np.sqrt(m + epsilon**2) - epsilon), rtol=3e-3)


@pytest.mark.parametrize("style", rows.CT_STYLES)
def test_the_rows(style):
    config = rows.tiny(f"ct,{style},steps=1+2", dataset="openmoji", resolution=16)
    config.teacher_checkpoint = "teacher"
    loss = validation.validate(config).loss
    plain = rows.tiny("ct,steps=1+2", dataset="openmoji", resolution=16).consistency
    changed = {name for name, value in plain.items() if value != getattr(loss, name)}
    assert changed == set(rows.CT_STYLES[style])
    with pytest.raises(InputError, match="there is no config row"):
        rows.tiny(f"cd,{style},steps=1", dataset="openmoji", resolution=16)


def test_settings_without_effect_are_refused():
    config = rows.tiny("ct,steps=1", dataset="openmoji", resolution=16)
    config.teacher_checkpoint = "teacher"
    config.consistency.ect_q = 4.0
    with pytest.raises(InputError, match=r"ect_q=4\.0 has no effect with .*teacher_grid=annealed"):
        validation.validate(config)
    config.consistency.update(ect_q=2.0, teacher_grid="doubling", teacher_steps_last=8.0)
    with pytest.raises(InputError, match=r"must be at least teacher_steps_first=64\.0"):
        validation.validate(config)
