"""Chunked moments are whole moments; padding never counts; neighbours are the nearest."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcm_jax.evaluation.metrics import (
    ClassScores,
    Moments,
    kernel_distance,
    nearest_neighbour_distances,
    precision_recall,
)
from mcm_jax.system.errors import InputError

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


def logits(count: int, classes: int = 4) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(count, classes), scale=2).astype(np.float32)


def test_the_inception_score_is_the_mean_of_its_tenths():
    """By the definition, a divergence from the marginal for every image."""
    drawn = logits(43)
    p = np.exp(drawn.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    parts = [p[43 * part // 10 : 43 * (part + 1) // 10] for part in range(10)]
    scores = [np.exp(np.mean(np.sum(q * np.log(q / q.mean(axis=0)), axis=1))) for q in parts]
    whole = ClassScores(43, 4)
    whole.update(drawn, np.arange(43))
    assert whole.score == pytest.approx(np.mean(scores), rel=1e-12)
    assert np.std(scores) > 0.01


def test_class_scores_know_no_order_and_no_host():
    drawn, order = logits(40), np.random.default_rng(4).permutation(40)
    whole, first, second = (ClassScores(40, 4) for _ in range(3))
    whole.update(drawn, np.arange(40))
    first.update(drawn[order[:13]], order[:13])
    second.update(drawn[order[13:]], order[13:])
    first.merge(second)
    assert first.score == pytest.approx(whole.score, rel=1e-12)


def test_class_scores_at_their_ends():
    """1 where all look alike, the number of classes where each is one of them for sure, which is finite."""
    sure = 1e4 * np.eye(4, dtype=np.float32)[np.arange(40) % 4]
    for drawn, expected in ((np.ones((40, 4), np.float32), 1), (sure, 4)):
        scores = ClassScores(40, 4)
        scores.update(drawn, np.arange(40))
        assert scores.score == pytest.approx(expected)
    assert np.isnan(ClassScores(40, 4).score)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_kid_is_the_unbiased_estimate_over_all_pairs(chunk):
    draw = np.random.default_rng(5)
    x, y = draw.normal(size=(7, 3)), draw.normal(size=(5, 3)) + 1

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / 3 + 1) ** 3

    def mean(pairs):
        return float(np.mean([kernel(a, b) for a, b in pairs]))

    expected = (
        mean([(x[i], x[j]) for i in range(7) for j in range(7) if i != j])
        + mean([(y[i], y[j]) for i in range(5) for j in range(5) if i != j])
        - 2 * mean([(a, b) for a in x for b in y])
    )
    assert kernel_distance(x, y, chunk=chunk) == pytest.approx(expected, rel=1e-12)


def test_kid_of_one_distribution_is_zero_on_average():
    draw = np.random.default_rng(6)
    found = [kernel_distance(draw.normal(size=(20, 2)), draw.normal(size=(30, 2))) for _ in range(400)]
    # Four standard errors of the mean.
    assert abs(np.mean(found)) < 4 * np.std(found) / 20 and min(found) < 0


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_precision_and_recall_are_the_definition(chunk):
    draw = np.random.default_rng(7)
    samples, reference = draw.normal(size=(23, 2)), draw.normal(size=(31, 2)) * [1, 0.3] + [0.5, 0]

    def radius(rows, i):
        return sorted(np.linalg.norm(rows[i] - row) for j, row in enumerate(rows) if j != i)[2]

    def within(row, rows):
        return any(np.linalg.norm(row - centre) <= radius(rows, i) for i, centre in enumerate(rows))

    expected = (
        np.mean([within(row, reference) for row in samples]),
        np.mean([within(row, samples) for row in reference]),
    )
    assert precision_recall(samples, reference, chunk=chunk) == pytest.approx(expected)
    assert 0 < expected[0] < 1 and expected[0] != expected[1]


def test_precision_and_recall_at_their_ends():
    rows_ = np.random.default_rng(8).normal(size=(20, 3))
    assert precision_recall(rows_, rows_) == (1.0, 1.0)
    assert precision_recall(rows_, rows_ + 100) == (0.0, 0.0)
    # All samples one image: each is right, and they cover nothing else.
    assert precision_recall(np.repeat(rows_[:1], 9, axis=0), rows_) == (1.0, pytest.approx(1 / 20))
    with pytest.raises(InputError, match="more than 3 images"):
        precision_recall(rows_[:3], rows_)
