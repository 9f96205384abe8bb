"""Names carry counts, streams equal wholes, and the bounds order as they must."""

import dataclasses

import numpy as np
import pytest

from mcm_jax.evaluation import protocol
from mcm_jax.evaluation.frechet import frechet_distance
from mcm_jax.evaluation.metrics import ClassScores, kernel_distance, precision_recall
from mcm_jax.evaluation.references import Cache
from mcm_jax.system.errors import InputError
from tests.evaluation.pixels import PixelExtractor, network


def pictures(count: int, seed: int, low: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (count, 4, 4, 3), dtype=np.uint8)


def labelled(images):
    return images, np.arange(len(images), dtype=np.int32) % 4


TRAIN, TEST, SAMPLES = pictures(200, 0), pictures(20, 1), pictures(50, 2)
INCEPTION = PixelExtractor(
    network((("pool", 30), ("spatial", 12), ("logits", 9)), distance="fid", sha256="beef")
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    return Cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def reference(cache):
    return cache.reference(PixelExtractor(), split="train", identity={}, images=lambda: [labelled(TRAIN)])


@pytest.fixture(scope="module")
def unseen(cache):
    return cache.reference(PixelExtractor(), split="test", identity={}, images=lambda: [labelled(TEST)])


def distance(images: np.ndarray) -> float:
    """Straight from the pixels, in their 48 dimensions."""
    moments = []
    for rows in (images, TRAIN):
        rows = rows.reshape(len(rows), -1) / 255
        moments += [rows.mean(axis=0), np.cov(rows, rowvar=False)]
    return frechet_distance(*moments)


def score(images, reference, extractor=None, **how):
    extractor = extractor or PixelExtractor()
    return protocol.evaluate_samples([labelled(images)], extractor, reference, num=len(images), **how)


def test_a_stream_scores_like_the_whole(reference):
    whole = score(SAMPLES, reference, also_first=20)
    blocks = [labelled(block) for block in np.split(SAMPLES, [7, 30])]
    parts = protocol.evaluate_samples(iter(blocks), PixelExtractor(), reference, num=50, also_first=20)
    assert whole.metrics == pytest.approx(parts.metrics, rel=1e-6)
    assert list(whole.metrics) == [
        "fd_effnet_lite0_50",
        "fd_effnet_lite0_20",
        "nearest_neighbour_distance",
    ]
    assert whole.metrics["fd_effnet_lite0_50"] == pytest.approx(distance(SAMPLES), rel=1e-5)
    assert whole.metrics["fd_effnet_lite0_20"] == pytest.approx(distance(SAMPLES[:20]), rel=1e-5)
    assert whole.num_samples == 50 and not whole.rank_deficient
    # A covariance of 48 dimensions has full rank from 49 images on.
    assert [score(SAMPLES[:n], reference).rank_deficient for n in (48, 49)] == [True, False]


def test_copies_of_training_images_show_in_the_nearest_neighbour_distance(reference):
    copies = score(TRAIN[:30], reference).metrics
    fresh = score(TEST, reference).metrics
    assert copies["nearest_neighbour_distance"] < 1e-5 < 1 < fresh["nearest_neighbour_distance"]


def test_one_sample_is_refused(reference):
    with pytest.raises(InputError, match="at least 2"):
        score(SAMPLES[:1], reference)


def test_bounds_are_what_their_names_say_and_are_computed_once(cache, reference, unseen):
    calls = []

    def untrained():
        calls.append("untrained")
        return [labelled(pictures(16, 3, low=250))]

    def train():
        calls.append("train")
        return [labelled(part) for part in np.split(TRAIN, [77])]

    def bounds(identity):
        return protocol.floors_and_ceilings(
            PixelExtractor(),
            cache,
            reference=reference,
            reference_images=train,
            test=unseen,
            untrained_images=untrained,
            untrained_num=16,
            untrained_identity=identity,
        )

    found = bounds({"config": 1})
    assert bounds({"config": 1}) == found
    assert sorted(calls) == ["train", "untrained"]
    bounds({"config": 2})
    assert sorted(calls) == ["train", "untrained", "untrained"]
    mean_image = np.rint(TRAIN.mean(axis=0))[None].repeat(5, axis=0)
    assert found == pytest.approx(
        {
            "mean_image_fd_effnet_lite0": distance(mean_image),
            "test_images_fd_effnet_lite0_20": distance(TEST),
            "test_images_nearest_neighbour_distance": score(TEST, reference).metrics[
                "nearest_neighbour_distance"
            ],
            "untrained_network_fd_effnet_lite0_16": distance(pictures(16, 3, low=250)),
        },
        rel=1e-5,
    )


def test_without_test_split_or_untrained_samples_their_bounds_are_left_out(cache, reference):
    bounds = protocol.floors_and_ceilings(
        PixelExtractor(), cache, reference=reference, reference_images=lambda: [labelled(TRAIN)], test=None
    )
    assert list(bounds) == ["mean_image_fd_effnet_lite0"]


@pytest.fixture(scope="module")
def inception_reference(cache):
    return cache.reference(INCEPTION, split="train", identity={}, images=lambda: [labelled(TRAIN)])


def test_every_metric_of_inceptions_features(inception_reference):
    """Each is what its own function gives for the same features, whatever blocks they come in."""
    pool, spatial, logits = (INCEPTION(SAMPLES)[name] for name in ("pool", "spatial", "logits"))
    train = INCEPTION(TRAIN)
    classes = ClassScores(50, 9)
    classes.update(logits, np.arange(50))
    precision, recall = precision_recall(pool, train["pool"])

    def moments(rows):
        return rows.mean(axis=0, dtype=np.float64), np.cov(rows.astype(np.float64), rowvar=False)

    labels, train_labels = np.arange(50) % 4, np.arange(200) % 4
    of_classes = [
        frechet_distance(*moments(pool[labels == n]), *moments(train["pool"][train_labels == n]))
        for n in range(4)
    ]
    blocks = [labelled(SAMPLES[:32]), labelled(SAMPLES[32:])]
    found = protocol.evaluate_samples(
        blocks, INCEPTION, inception_reference, num=50, metrics=tuple(protocol.METRICS)
    )
    assert found.metrics == pytest.approx(
        {
            "fid_50": frechet_distance(*moments(pool), *moments(train["pool"])),
            "sfid_50": frechet_distance(*moments(spatial), *moments(train["spatial"])),
            "inception_score_50": classes.score,
            "kid_50": kernel_distance(pool, train["pool"]),
            "precision_50": precision,
            "recall_50": recall,
            "class_fid_50": np.mean(of_classes),
            "nearest_neighbour_distance": found.metrics["nearest_neighbour_distance"],
        },
        rel=1e-5,
    )


def test_what_a_reference_has_not_kept_is_left_out(inception_reference):
    bare = dataclasses.replace(
        inception_reference, features=None, labels=None, moments={"pool": inception_reference.moments["pool"]}
    )
    found = score(SAMPLES, bare, INCEPTION, metrics=tuple(protocol.METRICS))
    assert list(found.metrics) == ["fid_50", "inception_score_50"]


def test_what_there_are_too_few_samples_for_is_left_out(inception_reference):
    found = score(SAMPLES[:4], inception_reference, INCEPTION, metrics=("inception_score", "class_fid"))
    assert found.metrics == {}


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (("fid",), "--metrics=fid is not one of frechet, nearest"),
        (("frechet", "kid"), "--metrics=kid is defined only for"),
    ],
)
def test_metrics_of_other_features_are_refused(metrics, message):
    with pytest.raises(InputError, match=message):
        protocol.check_metrics(metrics, network(), num=50)
    protocol.check_metrics(tuple(protocol.METRICS), INCEPTION.network, num=31)


@pytest.mark.parametrize(("metric", "size"), [("frechet", 30), ("sfid", 12)])
def test_a_singular_fid_has_to_be_asked_for(metric, size):
    """Of the pool features and the spatial ones; the proxy is told of any number."""
    protocol.check_metrics((metric,), INCEPTION.network, num=size + 1)
    with pytest.raises(
        InputError, match=f"--metrics={metric} needs more than {size} images for a covariance"
    ):
        protocol.check_metrics((metric,), INCEPTION.network, num=size)
    protocol.check_metrics((metric,), INCEPTION.network, num=size, allow_singular=True)
    protocol.check_metrics(("frechet",), network(), num=2)


@pytest.mark.parametrize("distance", ["fd_dinov2", "fd_dinov2_other"])
def test_a_singular_distance_of_dinov2_has_to_be_asked_for(distance):
    dinov2 = network((("pool", 30),), distance=distance)
    protocol.check_metrics(("frechet",), dinov2, num=31)
    with pytest.raises(InputError, match="--metrics=frechet needs more than 30 images for a covariance"):
        protocol.check_metrics(("frechet",), dinov2, num=30)
    protocol.check_metrics(("frechet",), dinov2, num=30, allow_singular=True)
    with pytest.raises(InputError, match="--metrics=kid is defined only for Inception's features"):
        protocol.check_metrics(("kid",), dinov2, num=31)


@pytest.mark.parametrize(("metric", "fewest"), [("precision_recall", 4), ("inception_score", 10)])
def test_too_few_samples_are_refused_beforehand(metric, fewest):
    protocol.check_metrics((metric,), INCEPTION.network, num=fewest)
    with pytest.raises(InputError, match=f"needs at least {fewest} images, but there are {fewest - 1}"):
        protocol.check_metrics((metric,), INCEPTION.network, num=fewest - 1)


def test_a_stream_that_ends_early_is_no_result(reference):
    with pytest.raises(ValueError, match="50 of 51 images were added"):
        protocol.evaluate_samples([labelled(SAMPLES)], PixelExtractor(), reference, num=51)
