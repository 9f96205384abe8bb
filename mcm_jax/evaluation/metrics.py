"""Moments of features, and all metrics but the Frechet distance: Inception score, KID, nearest neighbours."""

from collections.abc import Iterator, Mapping

import numpy as np
import scipy.special
from jaxtyping import Bool, Float, Float64, Int

from mcm_jax.system.errors import InputError

# The k-th nearest neighbour gives the radius in precision and recall; k = 3 is the usual choice.
NEIGHBOURS = 3


class Moments:
    """Count, mean and covariance of vectors that arrive in chunks, in float64 (Chan, Golub & LeVeque 1979).

    However the vectors are split into chunks or merged from parts, the moments agree up to rounding.
    """

    def __init__(self, dimension: int):
        self.count = 0
        self.mean = np.zeros(dimension)
        self._scatter = np.zeros((dimension, dimension))

    def update(self, features: Float[np.ndarray, "N D"], mask: Bool[np.ndarray, " N"] | None = None) -> None:
        """Adds the rows of `features`, or only those where `mask` is True (the others are padding)."""
        rows = (features if mask is None else features[mask]).astype(np.float64)
        if not len(rows):
            return
        chunk = Moments(len(self.mean))
        chunk.count, chunk.mean = len(rows), rows.mean(axis=0)
        centred = rows - chunk.mean
        chunk._scatter = centred.T @ centred
        self.merge(chunk)

    def merge(self, other: "Moments") -> None:
        """Adds the rows of `other`: S = S_1 + S_2 + (n_1 n_2 / n) d d^T with d = mean_2 - mean_1."""
        count = self.count + other.count
        if count == 0:
            return
        difference = other.mean - self.mean
        self._scatter = self._scatter + other._scatter
        self._scatter += (self.count * other.count / count) * np.outer(difference, difference)
        self.mean = self.mean + difference * (other.count / count)
        self.count = count

    def arrays(self) -> dict[str, np.ndarray]:
        """The state, for `from_arrays`."""
        return {"count": np.array(self.count), "mean": self.mean, "scatter": self._scatter}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Moments":
        """Restores an object from its `arrays`."""
        moments = cls(len(arrays["mean"]))
        moments.count, moments.mean = int(arrays["count"]), arrays["mean"]
        moments._scatter = arrays["scatter"]
        return moments

    @property
    def covariance(self) -> Float64[np.ndarray, "D D"]:
        """The unbiased covariance, S / (n - 1)."""
        if self.count < 2:
            raise InputError(f"a covariance needs at least 2 images, but there are {self.count}; add more")
        return self._scatter / (self.count - 1)

    @property
    def rank_deficient(self) -> bool:
        """Whether there are too few rows for the covariance to have full rank (n - 1 < D)."""
        return self.count <= len(self.mean)


class ClassScores:
    """The Inception score (Salimans et al., arXiv:1606.03498), accumulated over images in a known order.

    exp(E_x KL(p(y | x) || p(y))) = exp(E_x sum_y p log p - sum_y p(y) log p(y)) is computed for each of ten
    equal consecutive parts of the images; the score is their mean. It lies between 1 (all images look alike)
    and the number of classes.
    """

    PARTS = 10

    def __init__(self, num: int, classes: int):
        """num: total number of images."""
        self._ends = np.arange(1, self.PARTS + 1) * num // self.PARTS
        self._counts = np.zeros(self.PARTS)
        self._probabilities = np.zeros((self.PARTS, classes))
        self._entropies = np.zeros(self.PARTS)

    def update(self, logits: Float[np.ndarray, "N classes"], indices: Int[np.ndarray, " N"]) -> None:
        """Adds images; `indices` are their positions among all images, in any order."""
        log_p = scipy.special.log_softmax(logits.astype(np.float64), axis=1)
        p = np.exp(log_p)
        part = np.searchsorted(self._ends, indices, side="right")
        np.add.at(self._counts, part, 1)
        np.add.at(self._probabilities, part, p)
        np.add.at(self._entropies, part, np.sum(p * log_p, axis=1))

    def arrays(self) -> dict[str, np.ndarray]:
        """The state, for `from_arrays`."""
        sums = {"counts": self._counts, "probabilities": self._probabilities, "entropies": self._entropies}
        return {"ends": self._ends, **sums}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "ClassScores":
        """Restores an object from its `arrays`."""
        scores = cls(int(arrays["ends"][-1]), arrays["probabilities"].shape[1])
        scores._counts, scores._entropies = arrays["counts"], arrays["entropies"]
        scores._probabilities = arrays["probabilities"]
        return scores

    def merge(self, other: "ClassScores") -> None:
        """Adds the images of `other`, which must be different images of the same set."""
        self._counts = self._counts + other._counts
        self._probabilities = self._probabilities + other._probabilities
        self._entropies = self._entropies + other._entropies

    @property
    def score(self) -> float:
        """The score of all images; NaN if there are fewer images than parts."""
        if not np.all(self._counts):
            return float("nan")
        marginal = self._probabilities / self._counts[:, None]
        information = self._entropies / self._counts - np.sum(scipy.special.xlogy(marginal, marginal), axis=1)
        return float(np.mean(np.exp(information)))


def kernel_distance(
    features: Float[np.ndarray, "N D"], reference_features: Float[np.ndarray, "M D"], *, chunk: int = 1024
) -> float:
    """KID (Binkowski et al., arXiv:1801.01401): unbiased estimate of MMD^2, k(x, y) = (x.y / D + 1)^3.

    The estimate uses all rows at once, in float64, and can be negative. Many evaluators report the mean over
    random subsets, which has the same expectation but a larger variance.
    """

    def total(rows: np.ndarray, others: np.ndarray) -> float:
        return sum(
            float(np.sum((x @ y.T / x.shape[1] + 1.0) ** 3))
            for x in _chunks(rows, chunk)
            for y in _chunks(others, chunk)
        )

    def among(rows: np.ndarray) -> float:
        diagonal = sum(
            float(np.sum((np.sum(x**2, axis=1) / x.shape[1] + 1.0) ** 3)) for x in _chunks(rows, chunk)
        )
        return (total(rows, rows) - diagonal) / (len(rows) * (len(rows) - 1))

    between = total(features, reference_features) / (len(features) * len(reference_features))
    return among(features) + among(reference_features) - 2.0 * between


def precision_recall(
    features: Float[np.ndarray, "N D"],
    reference_features: Float[np.ndarray, "M D"],
    *,
    neighbours: int = NEIGHBOURS,
    chunk: int = 1024,
) -> tuple[float, float]:
    """Returns (precision, recall) of Kynkaanniemi et al., arXiv:1904.06991.

    Each row is the centre of a ball that reaches to its k-th nearest neighbour in its own set (k =
    `neighbours`). Precision is the fraction of samples inside a ball of the reference, recall the fraction of
    reference images inside a ball of the samples. Both depend on both counts: compare only equal counts.
    """
    for rows in (features, reference_features):
        if len(rows) <= neighbours:
            raise InputError(
                f"precision and recall need more than {neighbours} images on both sides, but there "
                f"are {len(rows)}; add more"
            )
    balls = _neighbour_distances(features, neighbours, chunk)
    reference_balls = _neighbour_distances(reference_features, neighbours, chunk)
    precision = _share_within(features, reference_features, reference_balls, chunk)
    return precision, _share_within(reference_features, features, balls, chunk)


def _neighbour_distances(rows: np.ndarray, neighbours: int, chunk: int) -> Float64[np.ndarray, " N"]:
    """Squared distance from each row to its `neighbours`-th nearest other row."""
    result = []
    for first, x in zip(range(0, len(rows), chunk), _chunks(rows, chunk), strict=True):
        nearest = np.zeros((len(x), 0))
        for begin, y in zip(range(0, len(rows), chunk), _chunks(rows, chunk), strict=True):
            squares = _squared_distances(x, y)
            own = np.arange(max(first, begin), min(first + len(x), begin + len(y)))
            squares[own - first, own - begin] = np.inf
            nearest = np.concatenate([nearest, squares], axis=1)
            kept = min(neighbours, nearest.shape[1])
            nearest = np.partition(nearest, kept - 1, axis=1)[:, :kept]
        result.append(nearest.max(axis=1))
    return np.concatenate(result)


def _share_within(rows: np.ndarray, centres: np.ndarray, balls: np.ndarray, chunk: int) -> float:
    """The fraction of rows inside at least one ball; `balls` are the squared radii."""
    found = 0
    for x in _chunks(rows, chunk):
        within = np.zeros(len(x), bool)
        for begin, y in zip(range(0, len(centres), chunk), _chunks(centres, chunk), strict=True):
            within |= np.any(_squared_distances(x, y) <= balls[begin : begin + len(y)], axis=1)
        found += int(within.sum())
    return found / len(rows)


def nearest_neighbour_distances(
    features: Float[np.ndarray, "N D"], reference_features: Float[np.ndarray, "M D"], *, chunk: int = 1024
) -> Float64[np.ndarray, " N"]:
    """min_j ||h_i - r_j|| for each row i, in float64; both arguments are processed in chunks.

    Computed as |h|^2 - 2 h.r + |r|^2, clamped at 0: an exact copy gives 0 up to about 1e-7 |h|. If the mean
    over samples is near 0, or far below the mean over unseen real images, the samples are copies.
    """
    nearest = []
    for x in _chunks(features, chunk):
        squares = [_squared_distances(x, y).min(axis=1) for y in _chunks(reference_features, chunk)]
        nearest.append(np.min(squares, axis=0))
    return np.sqrt(np.concatenate(nearest)) if nearest else np.zeros(0)


def _chunks(rows: np.ndarray, size: int) -> Iterator[Float64[np.ndarray, "_ D"]]:
    for begin in range(0, len(rows), size):
        yield rows[begin : begin + size].astype(np.float64)


def _squared_distances(x: np.ndarray, y: np.ndarray) -> Float64[np.ndarray, "N M"]:
    squares = np.sum(x**2, axis=1)[:, None] - 2.0 * x @ y.T + np.sum(y**2, axis=1)
    return np.maximum(squares, 0.0)
