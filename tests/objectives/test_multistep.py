"""One student for several numbers of steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax.diffusion import process, sampling, schedules, segments
from mcm_jax.models.conditions import Classes
from mcm_jax.models.network import Network
from mcm_jax.objectives.consistency import Consistency
from mcm_jax.objectives.continuous import Continuous
from tests.objectives.test_consistency import COND, KEY, SCHEDULE, X, linear_model, networks
from tests.objectives.test_continuous import ARCHITECTURES

STEPS = (1, 2, 5)


def student(z_t, logsnr_t, cond, key, logsnr_u):
    """A network that depends on all its inputs."""
    del key
    factor = jnp.cos(logsnr_t / 8) + 0.3 * jnp.sin(logsnr_u / 5) + cond
    return z_t * process.over_pixels(factor, z_t)


def for_one(steps, schedule=SCHEDULE):
    """The network that a student of only this number of steps would be: its time determines the end."""
    ends = schedule(jnp.arange(steps) / steps)

    def model_fn(z_t, logsnr_t, cond, key):
        # The segment's upper bound belongs to it; 1e-4 is more than the rounding of a log-SNR.
        segment = jnp.sum(logsnr_t[:, None] < ends[1:] - 1e-4, axis=1)
        return student(z_t, logsnr_t, cond, key, ends[segment])

    return model_fn


def loss(objective, student, teacher):
    return jax.jit(lambda key: objective(networks(student, teacher), X, COND, key, jnp.int32(2)))(KEY)


@pytest.mark.parametrize(
    "objective",
    [
        Consistency(STEPS, teacher_steps_first=30.0, teacher_steps_last=30.0),
        Continuous(STEPS, warmup_steps=1, steps_weight_power=1.0),
        Continuous(STEPS, warmup_steps=1, proposal="lognormal"),
    ],
)
@pytest.mark.parametrize("teacher", [None, linear_model(0.2)])
def test_every_example_has_the_loss_of_a_student_of_its_own_number_of_steps(objective, teacher):
    """So the optimum for each (t, u) is that of the dedicated students."""
    key_times = jax.random.split(KEY, 3)[0]
    number = 2 if isinstance(objective, Continuous) else 0
    drawn = objective.draw_steps(jax.random.fold_in(key_times, number), len(X))
    assert set(drawn.tolist()) == set(STEPS)
    losses = loss(objective, student, teacher) / objective.steps_weight(drawn)
    for steps in STEPS:
        alone = dataclasses.replace(objective, student_steps=(steps,))
        own = drawn == steps
        # The ends are computed in float32 in another order.
        np.testing.assert_allclose(losses[own], loss(alone, for_one(steps), teacher)[own], rtol=1e-4)


@pytest.mark.parametrize(("draw", "weigh"), [(0.0, 0.0), (1.0, 0.0), (-1.0, 1.0)])
def test_the_numbers_of_steps_are_drawn_and_weighted_by_powers(draw, weigh):
    objective = Consistency((1, 2, 4), steps_power=draw, steps_weight_power=weigh)
    steps = objective.draw_steps(KEY, 20_000)
    expected = np.array([1.0, 2.0**draw, 4.0**draw])
    found = np.array([np.mean(steps == s) for s in (1, 2, 4)])
    # Four standard errors of a share: 4 sqrt(1/4 / 20,000) = 0.014.
    np.testing.assert_allclose(found, expected / expected.sum(), atol=0.014)
    weights = np.broadcast_to(objective.steps_weight(steps), steps.shape)
    np.testing.assert_allclose(weights / weights[0], (steps / steps[0]) ** weigh, rtol=1e-5)
    exact = np.sum(expected / expected.sum() * objective.steps_weight(jnp.array([1, 2, 4])))
    np.testing.assert_allclose(exact, 1.0, rtol=1e-6)


def test_one_number_of_steps_is_not_drawn():
    objective = Consistency((4,))
    assert (objective.draw_steps(KEY, 8), objective.steps_weight(4), objective.takes_end) == (4, 1.0, False)
    with pytest.raises(ValueError, match="student_steps is not set"):
        Consistency().draw_steps(KEY, 8)


def test_times_of_several_numbers_of_steps_are_those_of_each():
    steps = jnp.array([1, 2, 5, 5])
    per_segment = segments.steps_per_segment(jnp.float32(33.0), student_steps=steps)
    assert per_segment.tolist() == [33, 16, 7, 7]
    together = segments.draw_times(KEY, batch_size=4, student_steps=steps, steps_per_segment=per_segment)
    for n in range(4):
        alone = segments.draw_times(
            KEY, batch_size=4, student_steps=int(steps[n]), steps_per_segment=per_segment[n]
        )
        for found, expected in zip(together, alone, strict=True):
            assert found[n] == expected[n]


@pytest.mark.parametrize("num_steps", [1, 3])
def test_the_sampler_passes_the_end_of_each_step(num_steps):
    """A student of one number of steps, which knows its ends, gives the same samples."""
    keys = sampling.image_keys(KEY, jnp.arange(4))
    z_1 = sampling.initial_noise(keys, (4, 4, 3))
    grid = schedules.uniform_grid(SCHEDULE, num_steps)
    sample = functools.partial(sampling.sample, z_1=z_1, cond=COND[:4], keys=keys, logsnr=grid, clip="never")
    found = sample(student, logsnr_end=SCHEDULE(jnp.zeros(())))
    np.testing.assert_allclose(found, sample(for_one(num_steps)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "uvit", "adm", "edm2"])
def test_a_student_starts_as_its_teacher_and_learns_to_use_the_end(name):
    settings, shape = ARCHITECTURES[name]
    teacher = Network(settings, shape, Classes(2))
    network = Network(settings, shape, Classes(2), takes_end=True)
    assert network.without_end == teacher
    rng = np.random.default_rng(0)
    # Zero at initialisation, most layers would have no effect.
    params = jax.tree.map(
        lambda leaf: leaf + rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype),
        jax.jit(teacher.init)(jax.random.key(0)),
    )
    z_t = jax.random.normal(KEY, (2, *shape))
    logsnr_t, logsnr_u, label = jnp.array([-1.0, 2.0]), jnp.array([1.0, 14.0]), jnp.array([0, 1])
    started = jax.jit(network.init_from)(jax.random.key(1), params)
    kept = jax.tree.leaves_with_path(params)
    paths = dict(jax.tree.leaves_with_path(started))
    assert len(paths) > len(kept)
    for path, leaf in kept:
        np.testing.assert_array_equal(paths[path], leaf)

    @jax.jit
    def v_fn(params, logsnr_u):
        return network.apply(params, z_t, logsnr_t, label, None, logsnr_u)

    expected = jax.jit(teacher.apply)(params, z_t, logsnr_t, label, None)
    np.testing.assert_array_equal(v_fn(started, logsnr_u), expected)
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(v_fn(params, logsnr_u) ** 2)))(started)
    # As Adam's first update, whose size does not depend on the gradient's.
    moved = jax.tree.map(lambda leaf, slope: leaf - 0.01 * jnp.sign(slope), started, gradient)
    changed = np.abs(np.asarray(v_fn(moved, logsnr_u) - v_fn(moved, logsnr_u[::-1])))
    assert np.all(changed.reshape(2, -1).max(axis=1) > 1e-6)


def test_a_network_reports_a_missing_or_useless_end():
    settings, shape = ARCHITECTURES["mlp"]
    inputs = (jnp.zeros((1, *shape)), jnp.zeros(1), jnp.zeros(1, jnp.int32), None)
    network = Network(settings, shape, Classes(2), takes_end=True)
    params = jax.jit(network.init)(jax.random.key(0))
    with pytest.raises(ValueError, match="needs the end of the step"):
        network.apply(params, *inputs)
    with pytest.raises(ValueError, match="does not take the end of the step"):
        network.without_end.apply(params, *inputs, jnp.zeros(1))
