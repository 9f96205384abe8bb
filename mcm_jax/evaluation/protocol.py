"""From images to the numbers of a result (SPEC 7), with the floors and ceilings that make them readable.

On Inception's features of 50,000 samples the Frechet distance is the field's FID. On EfficientNet-Lite0's it
is a proxy that orders models of one data set, comparable with no FID. Both are biased upwards with few
samples, so every name ends in the count: `fid_50k`, `fid_2048`, `fd_effnet_lite0_2048`.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from mcm_jax.evaluation.features import Extractor, FeatureNetwork
from mcm_jax.evaluation.frechet import frechet_distance, frechet_distance_of_rows
from mcm_jax.evaluation.metrics import (
    NEIGHBOURS,
    ClassScores,
    Moments,
    kernel_distance,
    nearest_neighbour_distances,
    precision_recall,
)
from mcm_jax.evaluation.references import Blocks, Cache, Reference
from mcm_jax.evaluation.unfinished import Arrays, joined, part
from mcm_jax.records import MEAN_IMAGE, NEAREST, TEST_IMAGES, UNTRAINED_NETWORK, with_count
from mcm_jax.system.errors import InputError

# What may be asked for, in the order of results.
METRICS = ("frechet", "nearest", "sfid", "inception_score", "kid", "precision_recall", "class_fid")
# By name defined on the features of every network; the others on Inception's only.
_OF_ALL_FEATURES = ("frechet", "nearest")
# Of these all features of the samples are held.
_HELD = ("kid", "precision_recall", "class_fid")
# Compare with single images of the reference, which must have kept their features.
OF_SINGLE_IMAGES = ("nearest", *_HELD)

Images = UInt8[np.ndarray, "N H W 3"]


@dataclasses.dataclass(frozen=True)
class Scores:
    """`metrics` by name; `rank_deficient`: a covariance had fewer images than dimensions, on either side."""

    metrics: dict[str, float]
    num_samples: int
    rank_deficient: bool
    features_seconds: float


_FEWEST = {"inception_score": ClassScores.PARTS, "precision_recall": NEIGHBOURS + 1}
# Frechet distances, and the features whose covariance they need.
_COVARIANCES = {"frechet": "pool", "sfid": "spatial"}


def check_metrics(
    metrics: Sequence[str], network: FeatureNetwork, *, num: int, allow_singular: bool = False
) -> None:
    """Raises InputError for a metric that there is not, or not of these features or so few samples.

    allow_singular: of a FID and sFID too, of no more samples than features, whose covariance is singular. The
    proxy is always told of any number: it names its count and is compared at equal counts only.
    """
    for metric in metrics:
        if metric not in METRICS:
            raise InputError(f"--metrics={metric}: there are {', '.join(METRICS)}")
        if metric not in _OF_ALL_FEATURES and network.distance != "fid":
            raise InputError(
                f"--metrics={metric} is defined on Inception's features only: add --features=inception"
            )
        fewest = _FEWEST.get(metric, 2)
        if num < fewest:
            raise InputError(f"--metrics={metric} needs {fewest} images or more, there are {num}")
        size = network.dimensions.get(_COVARIANCES.get(metric, ""), 0)
        if network.distance == "fid" and num <= size and not allow_singular:
            raise InputError(
                f"--metrics={metric} needs more than {size} images for a covariance of full rank, there are "
                f"{num}; give more (50000 are usual), or --allow_singular to have it all the same"
            )


def lacking(metric: str, reference: Reference, *, labelled: bool = True) -> str | None:
    """What a reference, or samples without labels, lack for a metric; None: nothing."""
    if metric == "sfid" and "spatial" not in reference.moments:
        return "the reference has no moments of spatial features"
    if metric in OF_SINGLE_IMAGES and reference.features is None:
        return "the reference has no single images"
    if metric == "precision_recall" and len(reference.features) <= NEIGHBOURS:
        return f"the reference has no more than {NEIGHBOURS} images"
    if metric == "class_fid" and reference.labels is None:
        return "the reference's images have no labels"
    if metric == "class_fid" and not labelled:
        return "the images have no labels"
    return None


class Tally:
    """What the metrics of a stream of samples need, block by block; it can be kept, and gone on with."""

    def __init__(
        self,
        extractor: Extractor,
        reference: Reference,
        *,
        num: int,
        metrics: Sequence[str] = ("frechet", "nearest"),
        also_first: int = 0,
    ):
        """Metrics are left out for which something is `lacking`, or for which there are too few samples.

        Args:
          num: samples in all.
          metrics: of METRICS.
          also_first: the Frechet distance is also told of that many, where there are more samples (to stand
            beside another set of that size).
        """
        sizes = extractor.network.dimensions
        self._extractor, self._reference = extractor, reference
        self._num, self._also_first = num, also_first
        self._metrics = [name for name in METRICS if name in metrics and not lacking(name, reference)]
        self._moments = {"whole": Moments(sizes["pool"]), "first": Moments(sizes["pool"])}
        if "sfid" in self._metrics:
            self._moments["spatial"] = Moments(sizes["spatial"])
        self._classes = ClassScores(num, sizes["logits"]) if "inception_score" in self._metrics else None
        self._rows: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._nearest_sum, self._seconds = 0.0, 0.0

    @property
    def count(self) -> int:
        """Samples that have been seen."""
        return self._moments["whole"].count

    def update(self, images: Images, labels: np.ndarray) -> None:
        """Adds the samples that come next."""
        start = time.monotonic()
        found = self._extractor(images)
        self._seconds += time.monotonic() - start
        pool, before = found["pool"], self.count
        self._moments["first"].update(pool[: max(self._also_first - before, 0)])
        self._moments["whole"].update(pool)
        if "spatial" in self._moments:
            self._moments["spatial"].update(found["spatial"])
        if self._classes is not None:
            self._classes.update(found["logits"], before + np.arange(len(images)))
        if set(self._metrics) & set(_HELD):
            self._rows.append(pool)
            self._labels.append(labels)
        if "nearest" in self._metrics:
            distances = nearest_neighbour_distances(pool, self._reference.features)
            self._nearest_sum += float(distances.sum())

    def arrays(self) -> Arrays:
        """All that has been seen."""
        parts = {name: moments.arrays() for name, moments in self._moments.items()}
        if self._classes is not None:
            parts["classes"] = self._classes.arrays()
        if self._rows:
            parts["held"] = {"rows": np.concatenate(self._rows), "labels": np.concatenate(self._labels)}
        parts["sums"] = {"nearest": np.array(self._nearest_sum), "seconds": np.array(self._seconds)}
        return joined(parts)

    def go_on_from(self, arrays: Arrays) -> None:
        """The inverse of `arrays`, in a tally of the same samples and metrics.

        Raises:
          KeyError: they are of another one.
        """
        moments = {name: Moments.of_arrays(part(arrays, name)) for name in self._moments}
        classes = None if self._classes is None else ClassScores.of_arrays(part(arrays, "classes"))
        held, sums = [], part(arrays, "sums")
        if set(self._metrics) & set(_HELD):
            held = [part(arrays, "held")]
        self._moments, self._classes = moments, classes
        self._rows, self._labels = [one["rows"] for one in held], [one["labels"] for one in held]
        self._nearest_sum, self._seconds = float(sums["nearest"]), float(sums["seconds"])

    def scores(self) -> Scores:
        """Of all `num` samples; fewer are an error."""
        whole, num = self._moments["whole"], self._num
        if whole.count != num:
            raise ValueError(f"{whole.count} images came, {num} were announced")
        first, distance, result = self._moments["first"], self._extractor.network.distance, {}
        if "frechet" in self._metrics:
            result[with_count(distance, num)] = _distance(whole, self._reference)
            if 2 <= first.count < num:
                result[with_count(distance, first.count)] = _distance(first, self._reference)
        if "spatial" in self._moments:
            result[with_count("sfid", num)] = _distance(self._moments["spatial"], self._reference, "spatial")
        if self._classes is not None and not math.isnan(self._classes.score):
            result[with_count("inception_score", num)] = self._classes.score
        if self._rows:
            held = np.concatenate(self._rows), np.concatenate(self._labels)
            result |= _of_single_images(*held, self._reference, self._metrics)
        if "nearest" in self._metrics:
            result[NEAREST] = self._nearest_sum / num
        rank_deficient = whole.rank_deficient or self._reference.rank_deficient
        return Scores(result, num, rank_deficient, self._seconds)


def evaluate_samples(blocks: Blocks, extractor: Extractor, reference: Reference, **how: Any) -> Scores:
    """Scores a stream of uint8 images, one block after another held; `how` as of `Tally`."""
    tally = Tally(extractor, reference, **how)
    for images, labels in blocks:
        tally.update(images, labels)
    return tally.scores()


def _of_single_images(
    rows: np.ndarray, labels: np.ndarray, reference: Reference, metrics: Sequence[str]
) -> dict[str, float]:
    result, num = {}, len(rows)
    if "kid" in metrics:
        result[with_count("kid", num)] = kernel_distance(rows, reference.features)
    if "precision_recall" in metrics:
        precision, recall = precision_recall(rows, reference.features)
        result |= {with_count("precision", num): precision, with_count("recall", num): recall}
    if "class_fid" in metrics:
        distance = class_distance(rows, labels, reference.features, reference.labels)
        if not math.isnan(distance):
            result[with_count("class_fid", num)] = distance
    return result


def class_distance(
    rows: np.ndarray, labels: np.ndarray, reference_rows: np.ndarray, reference_labels: np.ndarray
) -> float:
    """The mean over classes of the Frechet distance between a class's samples and its reference images.

    Classes with fewer than two images on a side are left out; NaN where all are.
    """
    distances = []
    for label in np.unique(labels):
        pair = (rows[labels == label], reference_rows[reference_labels == label])
        if min(len(part) for part in pair) >= 2:
            distances.append(frechet_distance_of_rows(*(part.astype(np.float64) for part in pair)))
    return float(np.mean(distances)) if distances else float("nan")


def floors_and_ceilings(
    extractor: Extractor,
    cache: Cache,
    *,
    reference: Reference,
    reference_images: Callable[[], Blocks],
    test: Reference | None,
    untrained_images: Callable[[], Blocks] | None = None,
    untrained_num: int = 0,
    untrained_identity: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """What other images score against the same reference; each kept in the cache.

    DISTANCE is what the network calls its Frechet distance.

    - `test_images_DISTANCE_{n}`: the n test images. Real images get no lower at that count (floor).
    - `test_images_nearest_neighbour_distance`: how far an unseen real image is from its nearest training
      image.
    - `mean_image_DISTANCE`: the training set's mean image, repeated; any count gives the same (ceiling).
    - `untrained_network_DISTANCE_{n}`: `untrained_images()`, n of them, sampled by the caller from the same
      network before training (ceiling); `untrained_identity` is what determines them.
    """
    name = extractor.network.distance
    bounds = dict(
        cache.numbers(
            {"bound": "mean image", "reference": reference.sha256},
            lambda: {f"{MEAN_IMAGE}_{name}": _mean_image_distance(extractor, reference, reference_images())},
        )
    )
    if test is not None and test.count >= 2:
        identity = {"bound": "test images", "reference": reference.sha256, "test": test.sha256}
        bounds |= cache.numbers(identity, lambda: _test_bounds(name, reference, test))
    if untrained_images is not None and untrained_num >= 2:
        identity = {"bound": "untrained network", "reference": reference.sha256, "num": untrained_num}
        bounds |= cache.numbers(
            {**identity, "images": dict(untrained_identity or {})},
            lambda: _untrained_bounds(extractor, reference, untrained_images()),
        )
    return bounds


def _distance(moments: Moments, reference: Reference, name: str = "pool") -> float:
    return frechet_distance(moments.mean, moments.covariance, *reference.moments[name])


def _mean_image_distance(extractor: Extractor, reference: Reference, blocks: Blocks) -> float:
    """All samples equal: mean their features, covariance zero."""
    total, count = 0.0, 0
    for images, _ in blocks:
        total, count = total + images.sum(axis=0, dtype=np.float64), count + len(images)
    mean_image = np.rint(total / count).astype(np.uint8)
    features = extractor(mean_image[None])["pool"][0].astype(np.float64)
    return frechet_distance(features, np.zeros((len(features), len(features))), *reference.moments["pool"])


def _test_bounds(name: str, reference: Reference, test: Reference) -> dict[str, float]:
    distance = frechet_distance(*test.moments["pool"], *reference.moments["pool"])
    bounds = {f"{TEST_IMAGES}_{with_count(name, test.count)}": distance}
    if test.features is not None and reference.features is not None:
        nearest = nearest_neighbour_distances(test.features, reference.features)
        bounds[f"{TEST_IMAGES}_{NEAREST}"] = float(nearest.mean())
    return bounds


def _untrained_bounds(extractor: Extractor, reference: Reference, blocks: Blocks) -> dict[str, float]:
    moments = Moments(extractor.network.dimensions["pool"])
    for images, _ in blocks:
        moments.update(extractor(images)["pool"])
    name = with_count(extractor.network.distance, moments.count)
    return {f"{UNTRAINED_NETWORK}_{name}": _distance(moments, reference)}
