"""From images to the numbers of a result (SPEC 7), with the floors and ceilings that make them readable.

The Frechet distance is on EfficientNet-Lite0 features: a proxy that orders models of one data set, not
comparable with any FID. It is biased upwards with few samples, so every name ends in the count:
`fd_effnet_lite0_2048`.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

from mcm_jax.evaluation.efficientnet import FEATURES, Extractor
from mcm_jax.evaluation.frechet import frechet_distance
from mcm_jax.evaluation.metrics import Moments, nearest_neighbour_distances
from mcm_jax.evaluation.references import Cache, Reference

DISTANCE = "fd_effnet_lite0"
NEAREST = "nearest_neighbour_distance"

Images = UInt8[np.ndarray, "N H W 3"]


@dataclasses.dataclass(frozen=True)
class Scores:
    """`metrics` by name; `rank_deficient`: a covariance had fewer images than dimensions, on either side."""

    metrics: dict[str, float]
    num_samples: int
    rank_deficient: bool
    features_seconds: float


def evaluate_samples(
    batches: Iterable[Images], extractor: Extractor, reference: Reference, *, also_first: int = 0
) -> Scores:
    """Scores a stream of uint8 images against a reference, holding one batch at a time.

    Metrics: `fd_effnet_lite0_{n}` for all n of them; the same for the first `also_first`, where that is fewer
    (to stand beside another set of that size); and, where the reference kept its features, the mean distance
    to the nearest one.
    """
    whole, first = Moments(FEATURES), Moments(FEATURES)
    nearest_sum, seconds = 0.0, 0.0
    for batch in batches:
        start = time.monotonic()
        features = extractor(batch)
        seconds += time.monotonic() - start
        first.update(features[: max(also_first - whole.count, 0)])
        whole.update(features)
        if reference.features is not None:
            nearest_sum += float(nearest_neighbour_distances(features, reference.features).sum())
    metrics = {f"{DISTANCE}_{whole.count}": _distance(whole, reference)}
    if 2 <= first.count < whole.count:
        metrics[f"{DISTANCE}_{first.count}"] = _distance(first, reference)
    if reference.features is not None:
        metrics[NEAREST] = nearest_sum / whole.count
    rank_deficient = whole.rank_deficient or reference.rank_deficient
    return Scores(metrics, whole.count, rank_deficient, seconds)


def floors_and_ceilings(
    extractor: Extractor,
    cache: Cache,
    *,
    reference: Reference,
    reference_images: Callable[[], Images],
    test: Reference | None,
    untrained_images: Callable[[], Images] | None = None,
    untrained_num: int = 0,
    untrained_identity: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """What other images score against the same reference; each kept in the cache.

    - `test_images_fd_effnet_lite0_{n}`: the n test images. Real images get no lower at that count (floor).
    - `test_images_nearest_neighbour_distance`: how far an unseen real image is from its nearest training
      image.
    - `mean_image_fd_effnet_lite0`: the training set's mean image, repeated; any count gives the same
      (ceiling).
    - `untrained_network_fd_effnet_lite0_{n}`: `untrained_images()`, n of them, sampled by the caller from the
      same network before training (ceiling); `untrained_identity` is what determines them.
    """
    bounds = dict(
        cache.numbers(
            {"bound": "mean image", "reference": reference.sha256},
            lambda: {
                f"mean_image_{DISTANCE}": _mean_image_distance(extractor, reference, reference_images())
            },
        )
    )
    if test is not None and test.count >= 2:
        identity = {"bound": "test images", "reference": reference.sha256, "test": test.sha256}
        bounds |= cache.numbers(identity, lambda: _test_bounds(reference, test))
    if untrained_images is not None and untrained_num >= 2:
        identity = {"bound": "untrained network", "reference": reference.sha256, "num": untrained_num}
        bounds |= cache.numbers(
            {**identity, "images": dict(untrained_identity or {})},
            lambda: _untrained_bounds(extractor, reference, untrained_images()),
        )
    return bounds


def _distance(moments: Moments, reference: Reference) -> float:
    return frechet_distance(moments.mean, moments.covariance, reference.mean, reference.cov)


def _mean_image_distance(extractor: Extractor, reference: Reference, images: Images) -> float:
    """All samples equal: mean their features, covariance zero."""
    mean_image = np.rint(images.mean(axis=0, dtype=np.float64)).astype(np.uint8)
    features = extractor(mean_image[None])[0].astype(np.float64)
    return frechet_distance(features, np.zeros((FEATURES, FEATURES)), reference.mean, reference.cov)


def _test_bounds(reference: Reference, test: Reference) -> dict[str, float]:
    distance = frechet_distance(test.mean, test.cov, reference.mean, reference.cov)
    bounds = {f"test_images_{DISTANCE}_{test.count}": distance}
    if test.features is not None and reference.features is not None:
        nearest = nearest_neighbour_distances(test.features, reference.features)
        bounds[f"test_images_{NEAREST}"] = float(nearest.mean())
    return bounds


def _untrained_bounds(extractor: Extractor, reference: Reference, images: Images) -> dict[str, float]:
    moments = Moments(FEATURES)
    moments.update(extractor(images))
    return {f"untrained_network_{DISTANCE}_{moments.count}": _distance(moments, reference)}
