"""The Frechet distance of two Gaussians (Dowson & Landau 1982; Heusel et al., arXiv:1706.08500, eq. 6)."""

import numpy as np
import scipy.linalg
from jaxtyping import Float64


def frechet_distance(
    mean_1: Float64[np.ndarray, " D"],
    cov_1: Float64[np.ndarray, "D D"],
    mean_2: Float64[np.ndarray, " D"],
    cov_2: Float64[np.ndarray, "D D"],
) -> float:
    """||mean_1 - mean_2||^2 + tr(cov_1 + cov_2 - 2 (cov_1 cov_2)^(1/2)), the squared 2-Wasserstein distance.

    With cov_1 = F F^T the trace of the root is sum sqrt(eig(F^T cov_2 F)): symmetric eigenvalues only, so
    that singular covariances are fine and nothing complex appears. All in float64. The result is clamped at
    0, below which only rounding leads. Estimated from samples it is biased upwards, the more the fewer they
    are: compare equal counts only.
    """
    factor = _factor(cov_1)
    root_trace = np.sum(np.sqrt(_eigenvalues(factor.T @ cov_2 @ factor)))
    difference = mean_1 - mean_2
    return float(max(difference @ difference + np.trace(cov_1) + np.trace(cov_2) - 2.0 * root_trace, 0.0))


def frechet_distance_of_rows(rows: Float64[np.ndarray, "N D"], others: Float64[np.ndarray, "M D"]) -> float:
    """`frechet_distance` of the moments of two sets of vectors, without their D x D covariances.

    With centred rows A and B, divided by sqrt(n - 1), cov_1 = A^T A and cov_2 = B^T B, and the trace of the
    root is the sum of the singular values of A B^T: an N x M matrix, small where there are few rows.
    """
    mean_1, mean_2 = rows.mean(axis=0), others.mean(axis=0)
    a, b = (rows - mean_1) / np.sqrt(len(rows) - 1), (others - mean_2) / np.sqrt(len(others) - 1)
    root_trace = np.sum(scipy.linalg.svdvals(a @ b.T))
    difference = mean_1 - mean_2
    return float(max(difference @ difference + np.sum(a**2) + np.sum(b**2) - 2.0 * root_trace, 0.0))


def _factor(cov: Float64[np.ndarray, "D D"]) -> Float64[np.ndarray, "D R"]:
    """F of shape [D, rank] with F F^T = cov, by Cholesky's factorisation with pivots.

    It stops where the largest pivot left is rounding (D eps times the largest variance): that is the rank. An
    eigendecomposition gives as good a factor 3 to 10 times more slowly.
    """
    lower, pivots, rank, _ = scipy.linalg.lapack.dpstrf(cov, lower=1)
    factor = np.empty((len(cov), rank))
    factor[pivots - 1] = np.tril(lower)[:, :rank]
    return factor


def _eigenvalues(matrix: Float64[np.ndarray, "R R"]) -> Float64[np.ndarray, " K"]:
    """Eigenvalues of a positive semidefinite matrix, those that are rounding left out."""
    values = scipy.linalg.eigvalsh((matrix + matrix.T) / 2.0) if matrix.size else np.zeros(0)
    return values[values > _rounding(values)]


def _rounding(values: Float64[np.ndarray, " D"]) -> float:
    """eigh's error, D eps max|value|: what a zero eigenvalue can come out as, on either side of zero.

    Left in, each would add the square root of its rounding (1e-8 instead of 1e-16) to the trace.
    """
    return len(values) * np.finfo(np.float64).eps * np.max(np.abs(values), initial=0.0)
