"""The Frechet distance of two Gaussians (Dowson & Landau 1982; Heusel et al., arXiv:1706.08500, eq. 6)."""

import numpy as np
import scipy.linalg
from jaxtyping import Float64

# Generated when scipy is built, so type checkers don't see them.
_dpotrf = scipy.linalg.lapack.dpotrf  # pyright: ignore[reportAttributeAccessIssue]
_dpstrf = scipy.linalg.lapack.dpstrf  # pyright: ignore[reportAttributeAccessIssue]


def frechet_distance(
    mean_1: Float64[np.ndarray, " D"],
    cov_1: Float64[np.ndarray, "D D"],
    mean_2: Float64[np.ndarray, " D"],
    cov_2: Float64[np.ndarray, "D D"],
) -> float:
    """||mean_1 - mean_2||^2 + tr(cov_1 + cov_2 - 2 (cov_1 cov_2)^(1/2)), the squared 2-Wasserstein distance.

    With cov_1 = F F^T, the trace of the root is sum sqrt(eig(F^T cov_2 F)). Only a symmetric eigenproblem is
    solved, so singular covariances are fine and no complex numbers appear. Everything is in float64. The
    result is clamped at 0, as for valid covariances only rounding can make it negative (`checked_moments`
    rejects other matrices). An estimate from samples is biased upwards, more so for fewer samples: compare
    only equal counts.
    """
    factor = _factor(cov_1)
    root_trace = np.sum(np.sqrt(_eigenvalues(factor.T @ cov_2 @ factor)))
    difference = mean_1 - mean_2
    return float(max(difference @ difference + np.trace(cov_1) + np.trace(cov_2) - 2.0 * root_trace, 0.0))


def frechet_distance_of_rows(rows: Float64[np.ndarray, "N D"], others: Float64[np.ndarray, "M D"]) -> float:
    """`frechet_distance` of the moments of two sets of vectors, without their D x D covariances.

    With centred rows A and B, each divided by sqrt(n - 1), cov_1 = A^T A and cov_2 = B^T B. The trace of the
    root is the sum of the singular values of the N x M matrix A B^T, which is small for few rows.
    """
    mean_1, mean_2 = rows.mean(axis=0), others.mean(axis=0)
    a, b = (rows - mean_1) / np.sqrt(len(rows) - 1), (others - mean_2) / np.sqrt(len(others) - 1)
    root_trace = np.sum(scipy.linalg.svdvals(a @ b.T))
    difference = mean_1 - mean_2
    return float(max(difference @ difference + np.sum(a**2) + np.sum(b**2) - 2.0 * root_trace, 0.0))


def checked_moments(
    mean: object, cov: object, *, size: int
) -> tuple[Float64[np.ndarray, " D"], Float64[np.ndarray, "D D"]]:
    """Validates a mean and a covariance of `size` features read from a file; returns them in float64.

    The check tolerates rounding in the arrays' own dtype and in float32 sums.

    Raises:
      ValueError: they are not real, finite and of that size, or the matrix is not a covariance, so that the
        distance would be meaningless (for a negative definite matrix it would be 0, the best value).
    """
    mean, cov = np.asarray(mean), np.asarray(cov)
    for name, array in (("mean", mean), ("covariance", cov)):
        if array.dtype.kind not in "fiu":
            raise ValueError(f"a {name} of dtype {array.dtype} instead of real numbers")
    if mean.shape != (size,) or cov.shape != (size, size):
        raise ValueError(f"moments of shapes {mean.shape} and {cov.shape} instead of {size} features")
    rounding = max(1e-4, np.sqrt(size) * np.finfo(np.promote_types(cov.dtype, np.float16)).eps)
    mean, cov = mean.astype(np.float64), cov.astype(np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError("moments that are not finite")
    scale = np.abs(cov).max(initial=0.0)
    if np.abs(cov - cov.T).max(initial=0.0) > 1e-6 * scale:
        raise ValueError("a covariance that is not symmetric")
    # Cholesky succeeds if all eigenvalues exceed -rounding * scale, and is much faster than computing them.
    _, failed = _dpotrf(cov + rounding * scale * np.eye(size), lower=1)
    if failed and scale:
        raise ValueError("a covariance with negative eigenvalues")
    return mean, cov


def _factor(cov: Float64[np.ndarray, "D D"]) -> Float64[np.ndarray, "D R"]:
    """F of shape [D, rank] with F F^T = cov, by pivoted Cholesky factorisation.

    The factorisation stops when the largest remaining pivot is mere rounding (D eps times the largest
    variance), which defines the rank. An eigendecomposition gives an equally good factor 3 to 10 times more
    slowly.
    """
    lower, pivots, rank, _ = _dpstrf(cov, lower=1)
    factor = np.empty((len(cov), rank))
    factor[pivots - 1] = np.tril(lower)[:, :rank]
    return factor


def _eigenvalues(matrix: Float64[np.ndarray, "R R"]) -> Float64[np.ndarray, " K"]:
    """Eigenvalues of a positive semidefinite matrix, except those that are mere rounding."""
    values = scipy.linalg.eigvalsh((matrix + matrix.T) / 2.0) if matrix.size else np.zeros(0)
    return values[values > _rounding(values)]


def _rounding(values: Float64[np.ndarray, " D"]) -> float:
    """eigh's error bound D eps max|value|: a zero eigenvalue can be computed as anything up to this size.

    Each such eigenvalue would add the square root of its rounding error (1e-8 instead of 1e-16) to the trace.
    """
    return len(values) * np.finfo(np.float64).eps * np.max(np.abs(values), initial=0.0)
