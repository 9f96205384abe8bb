"""Chunked moments are whole moments; padding never counts; neighbours are the nearest."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcm_jax.errors import InputError
from mcm_jax.evaluation.metrics import Moments, nearest_neighbour_distances

# Far from the origin, where a sum of squares would lose what the covariance is made of.
OFFSET = 1e4


def rows(count: int, dimension: int = 5, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return OFFSET + rng.normal(size=(count, dimension)) @ rng.normal(size=(dimension, dimension))


def moments_of(*chunks: np.ndarray) -> Moments:
    moments = Moments(5)
    for chunk in chunks:
        moments.update(chunk)
    return moments


def assert_moments(moments: Moments, data: np.ndarray) -> None:
    assert moments.count == len(data)
    np.testing.assert_allclose(moments.mean, data.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(moments.covariance, np.cov(data, rowvar=False), rtol=1e-9, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 8))
def test_any_chunks_and_any_merge_give_the_moments_of_the_whole(sizes, parts):
    data = rows(sum(sizes) + 2)
    chunks = np.split(data, np.cumsum(sizes))
    assert_moments(moments_of(*chunks), data)
    first, second = moments_of(*chunks[:parts]), moments_of(*chunks[parts:])
    first.merge(second)
    assert_moments(first, data)


@given(st.integers(2, 6), st.integers(0, 4))
def test_padding_never_counts(kept, padding):
    """Masked rows may hold anything at all, even what is not a number."""
    data = rows(kept)
    padded = np.concatenate([data, np.full((padding, 5), np.nan)])
    moments = Moments(5)
    moments.update(padded, np.arange(len(padded)) < kept)
    assert_moments(moments, data)


def test_float32_features_are_accumulated_in_float64():
    data = np.full((100_000, 1), 0.1, np.float32)
    data[::2] = 0.3
    moments = Moments(1)
    for chunk in np.split(data, 100):
        moments.update(chunk)
    assert moments.mean[0] == pytest.approx(data.astype(np.float64).mean(), rel=1e-14)
    assert moments.covariance.dtype == np.float64


def test_a_covariance_of_one_row_is_refused():
    with pytest.raises(InputError, match="at least 2"):
        _ = moments_of(rows(1)).covariance


@pytest.mark.parametrize(("count", "deficient"), [(5, True), (6, False)])
def test_rank_needs_more_rows_than_dimensions(count, deficient):
    moments = moments_of(rows(count))
    assert moments.rank_deficient is deficient
    spread = np.linalg.svd(moments.covariance, compute_uv=False)
    assert (spread[-1] < 1e-9 * spread[0]) is np.bool_(deficient)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_nearest_neighbours_are_those_of_the_full_distance_matrix(chunk):
    data, reference = rows(11), rows(7, seed=1)
    expected = np.linalg.norm(data[:, None] - reference[None], axis=-1).min(axis=1)
    distances = nearest_neighbour_distances(data, reference, chunk=chunk)
    np.testing.assert_allclose(distances, expected, rtol=1e-6)


def test_a_copy_is_its_own_nearest_neighbour_at_distance_zero():
    data = np.random.default_rng(0).uniform(0, 6, (20, 1280)).astype(np.float32)
    assert nearest_neighbour_distances(data, data[::-1]).max() < 1e-5
