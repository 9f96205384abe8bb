import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax.diffusion import segments


@pytest.mark.parametrize(
    ("train_step", "expected"),
    [(-10_000, 64.0), (0, 64.0), (50_000, np.sqrt(64 * 1280)), (100_000, 1280.0), (10**6, 1280.0)],
)
def test_annealing_is_exponential_and_clipped(train_step, expected):
    actual = segments.annealed_teacher_steps(
        jnp.int32(train_step), first=64.0, last=1280.0, anneal_steps=100_000
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_constant_teacher():
    steps = segments.annealed_teacher_steps(jnp.int32(77), first=256.0, last=256.0, anneal_steps=10)
    np.testing.assert_allclose(steps, 256.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("teacher", "student", "expected"), [(64, 8, 8), (64.0, 3, 21), (1280, 16, 80), (1, 4, 1), (100, 8, 12)]
)
def test_steps_per_segment(teacher, student, expected):
    assert segments.steps_per_segment(jnp.float32(teacher), student_steps=student) == expected


@hypothesis.given(st.integers(1, 16), st.integers(1, 1280), st.integers(0, 2**31 - 1))
def test_times_lie_on_the_grid(student_steps, n_per, seed):
    times = segments.draw_times(
        jax.random.key(seed),
        batch_size=16,
        student_steps=student_steps,
        steps_per_segment=jnp.int32(n_per),
    )
    grid = student_steps * n_per
    n_t, n_s, n_u = (np.asarray(a, np.float64) * grid for a in (times.t, times.s, times.t_step))
    # 6e-8 relative in float32, times a grid of at most 20480.
    for n in (n_t, n_s, n_u):
        np.testing.assert_allclose(n, np.round(n), atol=2e-3)
    n_t, n_s, n_u = (np.round(n).astype(int) for n in (n_t, n_s, n_u))
    np.testing.assert_array_equal(n_t - n_s, 1)
    np.testing.assert_array_equal(n_u % n_per, 0)
    assert np.all((n_u <= n_s) & (n_t <= n_u + n_per) & (n_t <= grid))
    np.testing.assert_array_equal(times.is_last, n_s == n_u)
    np.testing.assert_array_equal(times.is_last, np.asarray(times.s) == np.asarray(times.t_step))


@pytest.mark.parametrize("student_steps", [3, 4])
def test_times_are_uniform(student_steps):
    """Also where S = N_per: one key for step and n_rel would make them equal there."""
    grid = 4 * student_steps
    times = segments.draw_times(
        jax.random.key(0),
        batch_size=1000 * grid,
        student_steps=student_steps,
        steps_per_segment=jnp.int32(4),
    )
    counts = np.bincount(np.round(np.asarray(times.t) * grid).astype(int), minlength=grid + 1)
    assert counts[0] == 0
    # 1000 expected in each cell, standard deviation 31.
    np.testing.assert_allclose(counts[1:], 1000, atol=150)


@pytest.mark.parametrize("student_steps", [1, 4, 512])
def test_halves_are_a_step_and_its_middle(student_steps):
    t, m, s = segments.draw_halves(jax.random.key(0), batch_size=4096, student_steps=student_steps)
    n = np.rint(np.asarray(t, np.float64) * student_steps).astype(int)
    assert n.min() >= 1 and n.max() == student_steps
    # Formed from integers: the float32 nearest to each fraction.
    np.testing.assert_array_equal(t, (n / student_steps).astype(np.float32))
    np.testing.assert_array_equal(m, ((2 * n - 1) / (2 * student_steps)).astype(np.float32))
    np.testing.assert_array_equal(s, ((n - 1) / student_steps).astype(np.float32))
    if student_steps == 4:
        # 1024 expected each, standard deviation 28.
        np.testing.assert_allclose(np.bincount(n)[1:], 1024, atol=120)
