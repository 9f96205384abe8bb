"""Names carry counts, streams equal wholes, and the bounds order as they must."""

import numpy as np
import pytest

from mcm_jax.errors import InputError
from mcm_jax.evaluation import protocol
from mcm_jax.evaluation.efficientnet import FEATURES, Extractor, Weights
from mcm_jax.evaluation.frechet import frechet_distance
from mcm_jax.evaluation.references import Cache


class PixelExtractor(Extractor):
    """The pixels as the first features: no network, no compilation."""

    def __init__(self):
        self.weights, self.input_resolution = Weights({}, "f00d"), 96

    def __call__(self, images):
        pixels = images.reshape(len(images), -1).astype(np.float32) / 255
        return np.pad(pixels, ((0, 0), (0, FEATURES - pixels.shape[1])))


def pictures(count: int, seed: int, low: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (count, 4, 4, 3), dtype=np.uint8)


TRAIN, TEST, SAMPLES = pictures(200, 0), pictures(20, 1), pictures(50, 2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    return Cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def reference(cache):
    return cache.reference(PixelExtractor(), split="train", identity={}, images=lambda: TRAIN)


@pytest.fixture(scope="module")
def unseen(cache):
    return cache.reference(PixelExtractor(), split="test", identity={}, images=lambda: TEST)


def distance(images: np.ndarray) -> float:
    """Straight from the pixels, in their 48 dimensions."""
    moments = []
    for rows in (images, TRAIN):
        rows = rows.reshape(len(rows), -1) / 255
        moments += [rows.mean(axis=0), np.cov(rows, rowvar=False)]
    return frechet_distance(*moments)


def test_a_stream_scores_like_the_whole(reference):
    whole = protocol.evaluate_samples([SAMPLES], PixelExtractor(), reference, also_first=20)
    blocks = np.split(SAMPLES, [7, 30])
    parts = protocol.evaluate_samples(iter(blocks), PixelExtractor(), reference, also_first=20)
    assert whole.metrics == pytest.approx(parts.metrics, rel=1e-6)
    assert list(whole.metrics) == [
        "fd_effnet_lite0_50",
        "fd_effnet_lite0_20",
        "nearest_neighbour_distance",
    ]
    assert whole.metrics["fd_effnet_lite0_50"] == pytest.approx(distance(SAMPLES), rel=1e-5)
    assert whole.metrics["fd_effnet_lite0_20"] == pytest.approx(distance(SAMPLES[:20]), rel=1e-5)
    assert whole.num_samples == 50 and whole.rank_deficient


def test_copies_of_training_images_show_in_the_nearest_neighbour_distance(reference):
    copies = protocol.evaluate_samples([TRAIN[:30]], PixelExtractor(), reference).metrics
    fresh = protocol.evaluate_samples([TEST], PixelExtractor(), reference).metrics
    assert copies["nearest_neighbour_distance"] < 1e-5 < 1 < fresh["nearest_neighbour_distance"]


def test_one_sample_is_refused(reference):
    with pytest.raises(InputError, match="at least 2"):
        protocol.evaluate_samples([SAMPLES[:1]], PixelExtractor(), reference)


def test_bounds_are_what_their_names_say_and_are_computed_once(cache, reference, unseen):
    calls = []

    def untrained():
        calls.append("untrained")
        return pictures(16, 3, low=250)

    def train():
        calls.append("train")
        return TRAIN

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
            "test_images_nearest_neighbour_distance": protocol.evaluate_samples(
                [TEST], PixelExtractor(), reference
            ).metrics["nearest_neighbour_distance"],
            "untrained_network_fd_effnet_lite0_16": distance(pictures(16, 3, low=250)),
        },
        rel=1e-5,
    )


def test_without_test_split_or_untrained_samples_their_bounds_are_left_out(cache, reference):
    bounds = protocol.floors_and_ceilings(
        PixelExtractor(), cache, reference=reference, reference_images=lambda: TRAIN, test=None
    )
    assert list(bounds) == ["mean_image_fd_effnet_lite0"]
