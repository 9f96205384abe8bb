"""ECT's and iCT's teacher steps and weights, against their formulas in float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax.config import rows, validation
from mcm_jax.config.settings import default_config
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
        assert jnp.all(levels.logsnr_t <= levels.logsnr_s) and jnp.all(levels.logsnr_s <= levels.logsnr_step)
        np.testing.assert_array_equal(levels.is_last, levels.logsnr_s == levels.logsnr_step)
        np.testing.assert_array_equal(levels.logsnr_t, steps[0].logsnr_t)
    # At stage 0, q = 2: up to the noise level at which 8 / (1 + e^t) = 1, the step leads to the end.
    assert jnp.all(steps[0].is_last[noise_of(steps[0].logsnr_t) < math.log(7)])
    np.testing.assert_array_equal(steps[0].logsnr_s, steps[1].logsnr_s)
    shares = [np.mean(levels.is_last) for levels in steps]
    assert shares[1] > shares[2] > shares[3]


def test_ects_last_stage_stays():
    """Its steps are short, but not too short for float32, also where the draws end."""
    last, later = (ECT._draw_levels(KEY, 4096, SCHEDULE, jnp.int32(n), 2) for n in (70, 10**6))
    jax.tree.map(np.testing.assert_array_equal, last, later)
    shares = 1 - noise_of(last.logsnr_s) / noise_of(last.logsnr_t)
    # q^-8 to 5 q^-8, less where the segment ends.
    inside = shares[~np.asarray(last.is_last)]
    assert inside.min() > 0.99 / 2**8 and inside.max() < 5.01 / 2**8
    lowest = np.asarray(last.logsnr_t) == np.max(last.logsnr_t)
    assert not np.any(np.asarray(last.is_last) & lowest)


@pytest.mark.parametrize("student_steps", [1, 3])
def test_with_s_segments_ect_is_limited_to_each(student_steps):
    objective = dataclasses.replace(ECT, student_steps=(student_steps,), proposal="uniform")
    levels = objective._draw_levels(KEY, 4096, SCHEDULE, jnp.int32(40), student_steps)
    ends = np.asarray(SCHEDULE(jnp.arange(student_steps) / student_steps))
    np.testing.assert_allclose(np.unique(levels.logsnr_step), np.sort(ends), rtol=1e-6)


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
    assert changed == set(rows.CT_STYLES[style]) | {"anneal_steps"} | (
        {"ect_stage_steps"} if style == "ect" else set()
    )
    with pytest.raises(InputError, match="there is no config row"):
        rows.tiny(f"cd,{style},steps=1", dataset="openmoji", resolution=16)


@pytest.mark.parametrize(
    ("grid", "name", "value"),
    [
        ("annealed", "ect_q", 4.0),
        ("annealed", "ect_stages", 4),
        ("doubling", "ect_stage_steps", 10),
        ("doubling", "proposal", "lognormal"),
        ("annealed", "proposal_mean", 0.0),
        ("ect", "anneal_steps", 10),
        ("ect", "teacher_steps_first", 10.0),
    ],
)
def test_settings_without_effect_are_refused(grid, name, value):
    plain = default_config()
    plain.update(objective="ct", teacher_checkpoint="teacher")
    plain.consistency.update(student_steps=(1,), teacher_grid=grid)
    validation.validate(plain)
    plain.consistency[name] = value
    with pytest.raises(InputError, match=rf"{name}=.* has no effect with .*teacher_grid={grid}"):
        validation.validate(plain)


def test_grids_that_cannot_be():
    config = rows.tiny("ct,ict,steps=1", dataset="openmoji", resolution=16)
    config.teacher_checkpoint = "teacher"
    config.consistency.teacher_steps_last = 8.0
    with pytest.raises(InputError, match=r"must be at least teacher_steps_first=10\.0"):
        validation.validate(config)
    config = rows.tiny("ct,ect,steps=1", dataset="openmoji", resolution=16)
    config.teacher_checkpoint = "teacher"
    config.consistency.loss_weight = "inverse_gap"
    with pytest.raises(InputError, match="inverse_gap needs a grid"):
        validation.validate(config)
