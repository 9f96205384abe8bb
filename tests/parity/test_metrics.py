"""Our metrics beside those of pytorch-fid and torch-fidelity, on the same features."""

import numpy as np
import pytest

from mcm_jax.evaluation.frechet import frechet_distance
from mcm_jax.evaluation.metrics import ClassScores, Moments, kernel_distance, precision_recall

torch = pytest.importorskip("torch")
fid_score = pytest.importorskip("pytorch_fid.fid_score")
pytest.importorskip("torch_fidelity")


def features(count, seed, dimension=2048):
    """Correlated and skewed, not negative, as features behind a ReLU are."""
    draw = np.random.default_rng(seed)
    mix = np.random.default_rng(100).normal(size=(dimension, dimension)) / dimension**0.5
    rows = np.maximum(draw.normal(size=(count, dimension)) @ mix + 0.3 + 0.05 * seed, 0)
    return rows.astype(np.float32)


def moments(rows):
    seen = Moments(rows.shape[1])
    for chunk in np.array_split(rows, 7):
        seen.update(chunk)
    return seen.mean, seen.covariance


def test_frechet_distance():
    """Of many more rows than dimensions; both of theirs take the root of a product that is not symmetric."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    rows, others = features(10_000, 0), features(10_000, 1)
    found = frechet_distance(*moments(rows), *moments(others))
    expected = fid_score.calculate_frechet_distance(
        *(
            part
            for one in (rows, others)
            for part in (one.mean(axis=0, dtype=np.float64), np.cov(one.astype(np.float64), rowvar=False))
        )
    )
    assert found == pytest.approx(expected, rel=1e-6)
    statistics = [fid_features_to_statistics(torch.from_numpy(one)) for one in (rows, others)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    assert found == pytest.approx(theirs, rel=1e-6)


def test_inception_score():
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    logits = 3 * np.random.default_rng(2).normal(size=(1234, 1008)).astype(np.float32)
    scores = ClassScores(len(logits), 1008)
    scores.update(logits, np.arange(len(logits)))
    theirs = isc_features_to_metric(torch.from_numpy(logits), splits=10, shuffle=False)
    assert scores.score == pytest.approx(theirs[KEY_METRIC_ISC_MEAN], rel=1e-9)


def test_kernel_distance():
    """Their one subset is all samples."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    rows, others = features(500, 0), features(500, 1)
    theirs = kid_features_to_metric(
        torch.from_numpy(rows).double(),
        torch.from_numpy(others).double(),
        kid_subsets=1,
        kid_subset_size=500,
        verbose=False,
    )
    assert kernel_distance(rows, others) == pytest.approx(theirs[KEY_METRIC_KID_MEAN], rel=1e-9)


def test_precision_and_recall():
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    rows, others = features(700, 0, 16), features(900, 3, 16)
    theirs = prc_features_to_metric(
        torch.from_numpy(rows).double(),
        torch.from_numpy(others).double(),
        prc_neighborhood=3,
        prc_batch_size=300,
        verbose=False,
    )
    precision, recall = precision_recall(rows, others)
    assert 0.02 < precision < 0.98 and 0.02 < recall < 0.98
    # Theirs are means in float32.
    assert precision == pytest.approx(theirs[KEY_METRIC_PRECISION], abs=1e-6)
    assert recall == pytest.approx(theirs[KEY_METRIC_RECALL], abs=1e-6)
