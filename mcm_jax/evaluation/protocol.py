"""Computes a result's metrics from images (SPEC 7), with floors and ceilings to compare them with.

With Inception features of 50,000 samples, the Frechet distance is the standard FID, and with DINOv2's it is
FD-DINOv2. With EfficientNet-Lite0 features it is a proxy that ranks models of one data set and can't be
compared with any FID. All are biased upwards with few samples, so every name ends in the count: `fid_50k`,
`fid_2048`, `fd_dinov2_50k`, `fd_effnet_lite0_2048`.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

from mcm_jax.evaluation.caption_scores import CaptionScore
from mcm_jax.evaluation.classes import class_distance, class_notes
from mcm_jax.evaluation.features import Extractor, FeatureNetwork
from mcm_jax.evaluation.frechet import frechet_distance
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
from mcm_jax.records import (
    CAPTION_SCORES,
    DISTANCES,
    EFFICIENTNET,
    MEAN_IMAGE,
    NEAREST,
    TEST_IMAGES,
    UNTRAINED_NETWORK,
    with_count,
)
from mcm_jax.system import distributed
from mcm_jax.system.errors import InputError

# All metrics that can be requested, in the order in which results list them.
METRICS = (
    *("frechet", "nearest", "sfid", "inception_score", "kid", "precision_recall", "class_fid"),
    *CAPTION_SCORES,
)
# Defined for features of any network, or not of features; the other metrics only for Inception's.
_ANY_FEATURES = ("frechet", "nearest", *CAPTION_SCORES)
# Need the features of all samples at once.
_HELD = ("kid", "precision_recall", "class_fid")
# Compare samples with single images of the reference, so they need its features.
OF_SINGLE_IMAGES = ("nearest", *_HELD)

Images = UInt8[np.ndarray, "N H W 3"]


@dataclasses.dataclass(frozen=True)
class Scores:
    """`metrics` by name; `rank_deficient`: one side has too few images for a covariance of full rank."""

    metrics: dict[str, float]
    num_samples: int
    rank_deficient: bool
    features_seconds: float


_FEWEST = {"inception_score": ClassScores.PARTS, "precision_recall": NEIGHBOURS + 1}
# Frechet distance -> the features whose covariance it needs.
_COVARIANCES = {"frechet": "pool", "sfid": "spatial"}


def check_metrics(
    metrics: Sequence[str], network: FeatureNetwork, *, num: int, allow_singular: bool = False
) -> None:
    """Raises InputError for an unknown metric, or one that these features or this few samples do not support.

    The proxy distance is always accepted: its name has the count, and it is compared only at equal counts.

    Args:
      allow_singular: accept FID, sFID and FD-DINOv2 even if there are no more samples than features, so
        that the covariance is singular.
    """
    for metric in metrics:
        if metric not in METRICS:
            raise InputError(f"--metrics={metric} is not one of {', '.join(METRICS)}")
        if metric not in _ANY_FEATURES and network.distance != "fid":
            raise InputError(
                f"--metrics={metric} is defined only for Inception's features; add --features=inception"
            )
        fewest = _FEWEST.get(metric, 2)
        if num < fewest:
            raise InputError(f"--metrics={metric} needs at least {fewest} images, but there are {num}")
        size = network.dimensions.get(_COVARIANCES.get(metric, ""), 0)
        is_proxy = network.distance == DISTANCES[EFFICIENTNET]
        if num <= size and not is_proxy and not allow_singular:
            raise InputError(
                f"--metrics={metric} needs more than {size} images for a covariance of full rank, but there "
                f"are {num}; use more (50000 is usual), or add --allow_singular to compute it anyway"
            )


def unavailable_reason(metric: str, reference: Reference, *, labelled: bool = True) -> str | None:
    """Why a metric can't be computed with this reference or without sample labels; None if it can."""
    if metric == "sfid" and "spatial" not in reference.moments:
        return "the reference has no moments of spatial features"
    if metric in OF_SINGLE_IMAGES:
        if reference.features is None:
            return "the reference has no features of single images"
        if metric == "precision_recall" and len(reference.features) <= NEIGHBOURS:
            return f"the reference has no more than {NEIGHBOURS} images"
    if metric == "class_fid" and reference.labels is None:
        return "the reference's images have no labels"
    if metric == "class_fid" and not labelled:
        return "the images have no labels"
    return None


class Tally:
    """Accumulates what the metrics of a stream of samples need; its state can be saved and restored."""

    def __init__(
        self,
        extractor: Extractor,
        reference: Reference,
        *,
        num: int,
        metrics: Sequence[str] = ("frechet", "nearest"),
        also_first: int = 0,
        caption_scores: Sequence[CaptionScore] = (),
    ):
        """Metrics with an `unavailable_reason`, or with too few samples, are omitted.

        Args:
          num: total number of samples.
          metrics: names from METRICS.
          also_first: if there are more samples than this, also compute the Frechet distance of the first
            `also_first` of them, to compare with another set of that size.
          caption_scores: further metrics, for which `update` needs captions.
        """
        sizes = extractor.network.dimensions
        self._extractor, self._reference = extractor, reference
        self._num, self._also_first = num, also_first
        self._metrics = [
            name for name in METRICS if name in metrics and not unavailable_reason(name, reference)
        ]
        self._moments = {"whole": Moments(sizes["pool"]), "first": Moments(sizes["pool"])}
        if "sfid" in self._metrics:
            self._moments["spatial"] = Moments(sizes["spatial"])
        self._classes = ClassScores(num, sizes["logits"]) if "inception_score" in self._metrics else None
        self._rows: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._nearest_sum, self._seconds = 0.0, 0.0
        # By name: points, and their highest number.
        self._points = {score.name: np.zeros(2) for score in caption_scores}
        self._caption_scores = caption_scores

    @property
    def count(self) -> int:
        """Number of samples so far."""
        return self._moments["whole"].count

    @property
    def needs_captions(self) -> bool:
        """Whether `update` needs the captions."""
        return bool(self._caption_scores)

    def update(self, images: Images, labels: np.ndarray, captions: Sequence[str] | None = None) -> None:
        """Adds a block of samples."""
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
            distances = nearest_neighbour_distances(pool, self._reference.require_features())
            self._nearest_sum += float(distances.sum())
        for score in self._caption_scores:
            if captions is None:
                raise ValueError(f"{score.name} needs captions")
            self._points[score.name] += [part.sum() for part in score(images, captions)]

    def arrays(self) -> Arrays:
        """The state, for `restore`."""
        parts = {name: moments.arrays() for name, moments in self._moments.items()}
        if self._classes is not None:
            parts["classes"] = self._classes.arrays()
        if self._rows:
            parts["held"] = {"rows": np.concatenate(self._rows), "labels": np.concatenate(self._labels)}
        parts["sums"] = {
            "nearest": np.array(self._nearest_sum),
            "seconds": np.array(self._seconds),
            **{f"points_{name}": points for name, points in self._points.items()},
        }
        return joined(parts)

    def restore(self, arrays: Arrays) -> None:
        """Restores the state from the `arrays` of a tally with the same samples and metrics.

        Raises:
          KeyError: the arrays come from a tally with other samples or metrics.
        """
        moments = {name: Moments.from_arrays(part(arrays, name)) for name in self._moments}
        classes = None if self._classes is None else ClassScores.from_arrays(part(arrays, "classes"))
        held, sums = [], part(arrays, "sums")
        if set(self._metrics) & set(_HELD):
            held = [part(arrays, "held")]
        self._moments, self._classes = moments, classes
        self._rows, self._labels = [one["rows"] for one in held], [one["labels"] for one in held]
        self._nearest_sum, self._seconds = float(sums["nearest"]), float(sums["seconds"])
        self._points = {name: sums[f"points_{name}"].copy() for name in self._points}

    def scores(self) -> Scores:
        """The metrics of all `num` samples.

        Raises:
          ValueError: fewer samples were added.
        """
        whole, num = self._moments["whole"], self._num
        if whole.count != num:
            raise ValueError(f"{whole.count} of {num} images were added")
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
            result |= _single_image_metrics(*held, self._reference, self._metrics)
            if "class_fid" in self._metrics:
                reference = self._reference
                for note in class_notes(*held, reference.require_features(), reference.require_labels()):
                    distributed.say(f"note: {note}")
        if "nearest" in self._metrics:
            result[NEAREST] = self._nearest_sum / num
        for name, (points, most) in self._points.items():
            if most:
                result[with_count(name, num)] = float(points / most)
        rank_deficient = whole.rank_deficient or self._reference.rank_deficient
        return Scores(result, num, rank_deficient, self._seconds)


def evaluate_samples(
    blocks: Blocks,
    extractor: Extractor,
    reference: Reference,
    *,
    num: int,
    metrics: Sequence[str] = ("frechet", "nearest"),
    also_first: int = 0,
) -> Scores:
    """Scores a stream of uint8 images, with one block in memory at a time; see `Tally`."""
    tally = Tally(extractor, reference, num=num, metrics=metrics, also_first=also_first)
    for images, labels in blocks:
        tally.update(images, labels)
    return tally.scores()


def _single_image_metrics(
    rows: np.ndarray, labels: np.ndarray, reference: Reference, metrics: Sequence[str]
) -> dict[str, float]:
    result, num = {}, len(rows)
    if "kid" in metrics:
        result[with_count("kid", num)] = kernel_distance(rows, reference.require_features())
    if "precision_recall" in metrics:
        precision, recall = precision_recall(rows, reference.require_features())
        result |= {with_count("precision", num): precision, with_count("recall", num): recall}
    if "class_fid" in metrics:
        others = reference.require_features(), reference.require_labels()
        distance = class_distance(rows, labels, *others)
        if not math.isnan(distance):
            result[with_count("class_fid", num)] = distance
    return result


def floors_and_ceilings(
    extractor: Extractor,
    cache: Cache,
    *,
    reference: Reference,
    reference_images: Callable[[], Blocks],
    test: Reference | None,
    untrained_images: Callable[[], Blocks] | None = None,
    untrained_num: int = 0,
    untrained_identity: Mapping[str, object] | None = None,
) -> dict[str, float]:
    """Scores of other images against the same reference; each number is cached.

    DISTANCE is the network's name for its Frechet distance.

    - `test_images_DISTANCE_{n}`: score of the n test images; real images score no lower at that n (floor).
    - `test_images_nearest_neighbour_distance`: mean distance from an unseen real image to its nearest
      training image.
    - `mean_image_DISTANCE`: score of the mean training image, repeated; the same for any count (ceiling).
    - `untrained_network_DISTANCE_{n}`: score of `untrained_images()`, n images that the caller sampled from
      the same network before training (ceiling); `untrained_identity` is everything that determines them.
    """
    name = extractor.network.distance
    bounds = dict(
        cache.numbers(
            {"bound": "mean image", "reference": reference.sha256},
            lambda: {f"{MEAN_IMAGE}_{name}": _mean_image_distance(extractor, reference, reference_images())},
        )
    )
    if test is not None and (count := test.count or 0) >= 2:
        identity = {"bound": "test images", "reference": reference.sha256, "test": test.sha256}
        bounds |= cache.numbers(identity, lambda: _test_bounds(name, reference, test, count))
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
    """The distance for samples that all equal the mean image: mean = its features, covariance = 0."""
    total, count = 0.0, 0
    for images, _ in blocks:
        total, count = total + images.sum(axis=0, dtype=np.float64), count + len(images)
    mean_image = np.rint(total / count).astype(np.uint8)
    features = extractor(mean_image[None])["pool"][0].astype(np.float64)
    return frechet_distance(features, np.zeros((len(features), len(features))), *reference.moments["pool"])


def _test_bounds(name: str, reference: Reference, test: Reference, count: int) -> dict[str, float]:
    distance = frechet_distance(*test.moments["pool"], *reference.moments["pool"])
    bounds = {f"{TEST_IMAGES}_{with_count(name, count)}": distance}
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
