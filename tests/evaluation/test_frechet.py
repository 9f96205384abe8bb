"""Closed forms, an independent square root, and what a squared distance of Gaussians must obey."""

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from mcm_jax.evaluation.frechet import frechet_distance, frechet_distance_of_rows


def random_gaussian(seed: int, dimension: int, rank: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(dimension, rank or dimension))
    return rng.normal(size=dimension), factor @ factor.T / dimension


@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(0, 10), st.floats(0, 10))
def test_one_dimension_is_the_difference_of_means_and_of_standard_deviations(m_1, m_2, s_1, s_2):
    distance = frechet_distance(np.array([m_1]), np.array([[s_1**2]]), np.array([m_2]), np.array([[s_2**2]]))
    assert distance == pytest.approx((m_1 - m_2) ** 2 + (s_1 - s_2) ** 2, abs=1e-11)


def test_diagonal_covariances_add_up_over_dimensions():
    rng = np.random.default_rng(0)
    mean_1, mean_2 = rng.normal(size=(2, 7))
    s_1, s_2 = rng.uniform(0.1, 2, size=(2, 7))
    expected = np.sum((mean_1 - mean_2) ** 2) + np.sum((s_1 - s_2) ** 2)
    assert frechet_distance(mean_1, np.diag(s_1**2), mean_2, np.diag(s_2**2)) == pytest.approx(expected)


def test_commuting_covariances_need_only_their_eigenvalues():
    rng = np.random.default_rng(1)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    s_1, s_2 = rng.uniform(0.1, 2, size=(2, 6))
    zero = np.zeros(6)
    distance = frechet_distance(
        zero, rotation @ np.diag(s_1**2) @ rotation.T, zero, rotation @ np.diag(s_2**2) @ rotation.T
    )
    assert distance == pytest.approx(np.sum((s_1 - s_2) ** 2))


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_the_general_matrix_square_root(seed):
    (mean_1, cov_1), (mean_2, cov_2) = random_gaussian(seed, 12), random_gaussian(seed + 100, 12)
    root = scipy.linalg.sqrtm(cov_1 @ cov_2).real
    expected = np.sum((mean_1 - mean_2) ** 2) + np.trace(cov_1 + cov_2 - 2 * root)
    assert frechet_distance(mean_1, cov_1, mean_2, cov_2) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 9))
def test_symmetric_invariant_and_quadratic(seed, rank_1, rank_2):
    """d(1, 2) = d(2, 1); rotating and shifting both changes nothing; scaling both by c scales it by c^2."""
    (mean_1, cov_1), (mean_2, cov_2) = random_gaussian(seed, 9, rank_1), random_gaussian(seed + 1, 9, rank_2)
    distance = frechet_distance(mean_1, cov_1, mean_2, cov_2)
    close = pytest.approx(distance, rel=1e-7, abs=1e-7)
    assert frechet_distance(mean_2, cov_2, mean_1, cov_1) == close
    rng = np.random.default_rng(seed)
    rotation, shift = np.linalg.qr(rng.normal(size=(9, 9)))[0], rng.normal(size=9)
    moved = [
        part
        for mean, cov in ((mean_1, cov_1), (mean_2, cov_2))
        for part in (rotation @ mean + shift, rotation @ cov @ rotation.T)
    ]
    assert frechet_distance(*moved) == close
    assert frechet_distance(3 * mean_1, 9 * cov_1, 3 * mean_2, 9 * cov_2) / 9 == close


@pytest.mark.parametrize("rank", [0, 1, 5, 40])
def test_a_singular_covariance_is_at_distance_zero_from_itself(rank):
    factor = np.random.default_rng(rank).normal(size=(40, rank))
    mean, cov = np.ones(40), factor @ factor.T
    assert 0 <= frechet_distance(mean, cov, mean, cov) < 1e-9


def test_a_point_mass_is_as_far_as_the_trace():
    mean, cov = random_gaussian(3, 8)
    zero = np.zeros((8, 8))
    assert frechet_distance(mean, zero, mean, cov) == pytest.approx(np.trace(cov))
    assert frechet_distance(mean, cov, mean, zero) == pytest.approx(np.trace(cov))


def test_null_directions_add_no_rounding():
    """cov_2 = 9 u u^T against the identity: n + 9 - 2 * 3. No root of a rounded zero may come on top."""
    u = np.random.default_rng(0).normal(size=200)
    u /= np.linalg.norm(u)
    zero, identity, line = np.zeros(200), np.eye(200), 9 * np.outer(u, u)
    assert frechet_distance(zero, identity, zero, line) == pytest.approx(203, abs=1e-9)
    assert frechet_distance(zero, line, zero, identity) == pytest.approx(203, abs=1e-9)


@pytest.mark.parametrize(("count", "other"), [(2, 3), (5, 40), (60, 30)])
def test_of_rows_is_of_their_moments(count, other):
    rng = np.random.default_rng(2)
    rows, others = rng.normal(size=(count, 9)), rng.normal(size=(other, 9)) * 2 + 1
    moments = [(part.mean(axis=0), np.cov(part, rowvar=False)) for part in (rows, others)]
    expected = frechet_distance(*moments[0], *moments[1])
    assert frechet_distance_of_rows(rows, others) == pytest.approx(expected, rel=1e-9)
