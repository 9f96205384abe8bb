"""The Frechet distance of two Gaussians against the same by scipy's sqrtm, as most evaluators compute it.

    python tests/benchmarks/frechet.py

Both take turns on the same moments, 2048 numbers of 50,000 images as they come: the covariances' eigenvalues
fall by a power law. Prints a table and, last, one line of JSON; a ratio above 1 means that ours is faster.
"""

import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import scipy.linalg
from absl import app, flags

from mcm_jax.evaluation.frechet import frechet_distance

_DIMENSION = flags.DEFINE_integer("dimension", 2048, "Of the vectors.", lower_bound=2)
_TURNS = flags.DEFINE_integer("turns", 5, "How often each is timed.", lower_bound=1)


def main(_: list[str]) -> None:
    """Times both, and compares what they give."""
    draw = np.random.default_rng(0)
    arguments = (*_moments(draw), *_moments(draw))
    functions = {"mcm_jax": frechet_distance, "scipy.linalg.sqrtm": by_sqrtm}
    found = {name: function(*arguments) for name, function in functions.items()}  # Warms up too.
    np.testing.assert_allclose(found["mcm_jax"], found["scipy.linalg.sqrtm"], rtol=1e-6)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(_TURNS.value):
        for name in functions if turn % 2 else reversed(functions):
            seconds[name].append(_timed(functions[name], arguments))
    ratios = [theirs / ours for ours, theirs in zip(*seconds.values(), strict=True)]
    for name, times in seconds.items():
        print(f"{name:<20}{statistics.median(times):>8.2f} s   distance {found[name]:.9f}")
    print(f"sqrtm / ours: {statistics.median(ratios):.1f} ({min(ratios):.1f}, {max(ratios):.1f})")
    print(json.dumps({"dimension": _DIMENSION.value, "seconds": seconds, "ratio": statistics.median(ratios)}))


def by_sqrtm(mean_1: np.ndarray, cov_1: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray) -> float:
    """||mean_1 - mean_2||^2 + tr(cov_1 + cov_2) - 2 tr((cov_1 cov_2)^(1/2)), the root of a general matrix."""
    root = scipy.linalg.sqrtm(cov_1 @ cov_2)
    difference = mean_1 - mean_2
    return float(difference @ difference + np.trace(cov_1) + np.trace(cov_2) - 2 * np.trace(root).real)


def _moments(draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    size = _DIMENSION.value
    axes, _ = np.linalg.qr(draw.normal(size=(size, size)))
    return draw.normal(size=size) / 10, (axes * np.arange(1, size + 1) ** -1.5) @ axes.T


def _timed(function: Callable[..., float], arguments: tuple[np.ndarray, ...]) -> float:
    begin = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begin


if __name__ == "__main__":
    app.run(main)
