"""Reads published reference statistics; the format is detected from the file's content (SPEC 7).

    mu, sigma                         moments of Inception's pool features: EDM's (.npz, .pkl) and most others
    mu, sigma, mu_s, sigma_s, arr_0   ADM's: also moments of spatial features, and 10,000 images
    ref_mu, ref_sigma                 the same moments under other names
    fid: {mu, sigma}, fd_dinov2: ...  EDM2's: moments of the features of each distance
    arr_0                             images only; their moments are computed here, as in ADM's evaluator

arr_1, if present, holds the labels of arr_0. Pickles are read without running any of their code.
"""

import dataclasses
import hashlib
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from mcm_jax.data.pixels import lacks_scaling
from mcm_jax.evaluation.features import Extractor
from mcm_jax.evaluation.frechet import checked_moments
from mcm_jax.evaluation.references import Blocks, Cache, Reference
from mcm_jax.records import DISTANCES
from mcm_jax.system import archives, distributed, pickles, progress
from mcm_jax.system.errors import InputError, reason, shortened
from mcm_jax.system.files import read_bytes
from mcm_jax.system.paths import Path

_MOMENTS = (("mu", "sigma"), ("ref_mu", "ref_sigma"))
_BLOCK = 1024


def read(path: Path, extractor: Extractor, cache: Cache, *, single_images: bool = False) -> Reference:
    """Reads the reference in a file; distances to it can't be compared with distances to other references.

    Args:
      cache: stores the moments of a file that holds only images.
      single_images: also extract features of ADM's images, for metrics that compare with single images.

    Raises:
      InputError: the file does not exist, has none of the formats, or its moments don't match the features.
    """
    with distributed.fail_together():
        content, tree = _load(path)
        arrays = _statistics(path, tree, extractor.network.distance)
    sha256 = hashlib.sha256(content).hexdigest()
    distributed.require_same(sha256, "references")
    names = [pair for pair in _MOMENTS if set(pair) <= set(arrays)]
    if not names and "arr_0" not in arrays:
        found = shortened(", ".join(sorted(arrays))) or "nothing"
        raise InputError(
            f"--reference={path} holds {found}, but neither mu and sigma nor ref_mu and ref_sigma nor images "
            "(arr_0); give a file of reference statistics"
        )
    with_images = "arr_0" in arrays and (single_images or not names)
    try:
        moments = _all_moments(arrays, *names[0], extractor) if names else {}
        images, labels = _labelled_images(arrays) if with_images else (None, None)
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(
            f"--reference={path} can't be used with these features ({reason(error)}); give a "
            f"file that was made with {extractor.network.description.get('network')}"
        ) from error
    if moments or images is None:
        features = None if images is None else extractor(images)["pool"]
        reference = Reference(sha256=sha256, description={}, count=None, moments=moments, features=features)
    else:
        reference = cache.reference(
            extractor,
            split="arr_0",
            identity={"file": sha256},
            images=lambda: _blocks(images, labels, description=f"features of {path.name}"),
        )
    description = {"file": path.name, "sha256": sha256, "count": reference.count}
    labels = None if reference.features is None else labels
    return dataclasses.replace(reference, sha256=sha256, description=description, labels=labels)


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a reference file by name, without EDM2's moments.

    Raises:
      InputError: the file does not exist or is damaged.
    """
    return _arrays(_load(path)[1])


def _load(path: Path) -> tuple[bytes, Mapping[str, Any]]:
    """The file's bytes, and what it holds by name."""
    try:
        content = read_bytes(path)
    except OSError as error:
        raise InputError(f"--reference={path}: can't be read ({reason(error)})") from error
    if content.startswith(b"PK"):
        try:
            return content, archives.read_npz(io.BytesIO(content))
        except ValueError as error:
            raise InputError(f"--reference={path} is damaged ({error}); download it again") from error
    tree = pickles.read(content, name=f"--reference={path}")
    return content, tree if isinstance(tree, Mapping) else {}


def _arrays(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    # A list could need any memory as an array.
    return {name: value for name, value in tree.items() if isinstance(value, np.ndarray)}


def _statistics(path: Path, tree: Mapping[str, Any], distance: str) -> dict[str, np.ndarray]:
    """The arrays for a distance: its own in EDM2's form, else all.

    Raises:
      InputError: the file is of EDM2's form, and has none for this distance.
    """
    named = [name for name in DISTANCES.values() if isinstance(tree.get(name), Mapping)]
    if not named:
        return _arrays(tree)
    if distance not in named:
        raise InputError(
            f"--reference={path} has statistics of {' and '.join(named)}, but none of {distance}; use a file "
            "that has them, or the --features that this one was made with"
        )
    return _arrays(tree[distance])


def _all_moments(
    arrays: Mapping[str, np.ndarray], mean: str, cov: str, extractor: Extractor
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    sources = {"pool": (mean, cov)}
    if {"mu_s", "sigma_s"} <= set(arrays):
        sources["spatial"] = ("mu_s", "sigma_s")
    moments = {}
    for features, names in sources.items():
        try:
            size = extractor.network.dimensions[features]
            moments[features] = checked_moments(*(arrays[name] for name in names), size=size)
        except ValueError as error:
            raise ValueError(f"{' and '.join(names)}: {error}") from error
    return moments


def _labelled_images(
    arrays: Mapping[str, np.ndarray],
) -> tuple[UInt8[np.ndarray, "N H W 3"], Int[np.ndarray, " N"] | None]:
    """Validates and returns arr_0, and arr_1 if present."""
    images, labels = np.asarray(arrays["arr_0"]), arrays.get("arr_1")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"arr_0 holds {images.dtype} {images.shape} instead of uint8 images [N, H, W, 3]")
    if len(images) < 2:
        raise ValueError(f"arr_0 holds {len(images)} images, but moments need 2 or more")
    if lacks_scaling(images):
        raise ValueError(
            "arr_0 holds bytes of 0 and 1 only: floats in [0, 1] must be multiplied by 255 first"
        )
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            raise ValueError(f"arr_1 holds {labels.dtype} {labels.shape} instead of {len(images)} labels")
        labels = labels.astype(np.int32)
    return images, labels


def _blocks(images: np.ndarray, labels: np.ndarray | None, *, description: str) -> Blocks:
    labels = np.zeros(len(images), np.int32) if labels is None else labels
    for start in progress.bar(range(0, len(images), _BLOCK), description):
        yield images[start : start + _BLOCK], labels[start : start + _BLOCK]
