"""What is accumulated over features: their moments, and how close each comes to a reference set."""

import numpy as np
from jaxtyping import Bool, Float, Float64

from mcm_jax.errors import InputError


class Moments:
    """Count, mean and covariance of vectors that arrive in chunks, in float64 (Chan, Golub & LeVeque 1979).

    Any split into chunks, and any merge of parts, gives the moments of the whole to rounding.
    """

    def __init__(self, dimension: int):
        self.count = 0
        self.mean = np.zeros(dimension)
        self._scatter = np.zeros((dimension, dimension))

    def update(self, features: Float[np.ndarray, "N D"], mask: Bool[np.ndarray, " N"] | None = None) -> None:
        """Adds the rows of `features`; with a mask only those where it is True (the rest is padding)."""
        rows = (features if mask is None else features[mask]).astype(np.float64)
        if not len(rows):
            return
        chunk = Moments(len(self.mean))
        chunk.count, chunk.mean = len(rows), rows.mean(axis=0)
        centred = rows - chunk.mean
        chunk._scatter = centred.T @ centred
        self.merge(chunk)

    def merge(self, other: "Moments") -> None:
        """Adds what `other` has seen: S = S_1 + S_2 + (n_1 n_2 / n) d d^T, d the difference of the means."""
        count = self.count + other.count
        if count == 0:
            return
        difference = other.mean - self.mean
        self._scatter = self._scatter + other._scatter
        self._scatter += (self.count * other.count / count) * np.outer(difference, difference)
        self.mean = self.mean + difference * (other.count / count)
        self.count = count

    @property
    def covariance(self) -> Float64[np.ndarray, "D D"]:
        """The unbiased covariance, S / (n - 1)."""
        if self.count < 2:
            raise InputError(f"a covariance needs at least 2 images, there are {self.count}: give more")
        return self._scatter / (self.count - 1)

    @property
    def rank_deficient(self) -> bool:
        """Whether there are too few rows for the covariance to have full rank (n - 1 < D)."""
        return self.count <= len(self.mean)


def nearest_neighbour_distances(
    features: Float[np.ndarray, "N D"], reference_features: Float[np.ndarray, "M D"], *, chunk: int = 1024
) -> Float64[np.ndarray, " N"]:
    """min_j ||h_i - r_j|| for each row i, chunk by chunk in both, in float64.

    Computed as |h|^2 - 2 h.r + |r|^2, clamped at 0: an exact copy comes out as 0 to about 1e-7 |h|.
    The mean over samples near 0, or far below the mean over unseen real images, says that samples are copies.
    """
    nearest = np.full(len(features), np.inf)
    for start in range(0, len(reference_features), chunk):
        reference = reference_features[start : start + chunk].astype(np.float64)
        reference_norms = np.sum(reference**2, axis=1)
        for begin in range(0, len(features), chunk):
            rows = features[begin : begin + chunk].astype(np.float64)
            squares = np.sum(rows**2, axis=1)[:, None] - 2.0 * rows @ reference.T + reference_norms
            part = nearest[begin : begin + chunk]
            np.minimum(part, squares.min(axis=1), out=part)
    return np.sqrt(np.maximum(nearest, 0.0))
