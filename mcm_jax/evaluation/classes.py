"""Per-class Frechet distances, and a check that samples and reference number their classes alike."""

import numpy as np
import scipy.optimize
import scipy.spatial.distance
from jaxtyping import Float, Int

from mcm_jax.evaluation.frechet import frechet_distance_of_rows


def class_distance(
    rows: np.ndarray, labels: np.ndarray, reference_rows: np.ndarray, reference_labels: np.ndarray
) -> float:
    """The mean over classes of the Frechet distance between a class's samples and its reference images.

    Classes with fewer than two samples or fewer than two reference images are omitted; NaN if none remain.
    """
    distances = []
    for label in _compared_classes(labels, reference_labels):
        pair = (rows[labels == label], reference_rows[reference_labels == label])
        distances.append(frechet_distance_of_rows(*(part.astype(np.float64) for part in pair)))
    return float(np.mean(distances)) if distances else float("nan")


def class_notes(
    rows: Float[np.ndarray, "N D"],
    labels: Int[np.ndarray, " N"],
    reference_rows: Float[np.ndarray, "M D"],
    reference_labels: Int[np.ndarray, " M"],
) -> list[str]:
    """Warnings to readers of `class_distance`: omitted classes, and labels that look permuted.

    Each class's mean feature is compared with those of all reference classes. If renumbering the samples'
    classes would remove more than half of the distance, the two sides probably number their classes
    differently: in text order, for example, or from 1. Random differences never have that effect.
    """
    compared = _compared_classes(labels, reference_labels)
    classes = np.union1d(labels, reference_labels)
    notes = []
    if len(compared) < len(classes):
        notes.append(
            f"class_fid is over {len(compared)} of {len(classes)} classes; the others have fewer than two "
            "samples or reference images"
        )
    if len(compared) < 2:
        return notes
    theirs = _repeated(reference_labels)
    means, noise = _class_means(rows, labels, compared)
    their_means, their_noise = _class_means(reference_rows, reference_labels, theirs)
    squares = scipy.spatial.distance.cdist(means, their_means, "sqeuclidean")
    # The part that exceeds random differences between means of few images.
    excess = np.maximum(squares - noise[:, None] - their_noise, 0.0)
    own = np.searchsorted(theirs, compared)
    _, best = scipy.optimize.linear_sum_assignment(excess)
    places = np.arange(len(compared))
    if (excess[places, own] - excess[places, best]).sum() > 0.5 * squares[places, own].sum():
        pairs = [(int(a), int(b)) for a, b in zip(compared, theirs[best], strict=True) if a != b]
        shown = ", ".join(f"{a} like {b}" for a, b in pairs[:5]) + (", ..." if len(pairs) > 5 else "")
        notes.append(
            f"classes of the samples look like other classes of the reference ({shown}): check that both "
            "number their classes alike; otherwise class_fid is meaningless"
        )
    return notes


def _repeated(labels: np.ndarray) -> np.ndarray:
    """The classes with two images or more."""
    classes, counts = np.unique(labels, return_counts=True)
    return classes[counts >= 2]


def _compared_classes(labels: np.ndarray, reference_labels: np.ndarray) -> np.ndarray:
    return np.intersect1d(_repeated(labels), _repeated(reference_labels))


def _class_means(rows: np.ndarray, labels: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (mean of each class, expected squared error of that mean)."""
    of_classes = [rows[labels == label].astype(np.float64) for label in classes]
    means = np.stack([one.mean(axis=0) for one in of_classes])
    return means, np.array([one.var(axis=0, ddof=1).sum() / len(one) for one in of_classes])
