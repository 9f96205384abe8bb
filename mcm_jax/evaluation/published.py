"""Reference statistics that others published, recognised by what is in the file (SPEC 7).

    mu, sigma                         moments of Inception's pool features; EDM's (.npz, .pkl), most others
    mu, sigma, mu_s, sigma_s, arr_0   ADM's: also moments of spatial features, and 10,000 images
    ref_mu, ref_sigma                 the same moments under other names
    fid: {mu, sigma}, ...             EDM2's, of which the Inception moments are taken

Pickles are read without running any of them.
"""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mcm_jax.evaluation import pickles
from mcm_jax.evaluation.features import Extractor
from mcm_jax.evaluation.references import Reference, checked
from mcm_jax.system import distributed
from mcm_jax.system.errors import InputError

_MOMENTS = (("mu", "sigma"), ("ref_mu", "ref_sigma"))


def read(path: Path, extractor: Extractor, *, single_images: bool = False) -> Reference:
    """The reference in a file. Distances to another file's, or to a data set's, can't be compared with its.

    Args:
      single_images: also put ADM's images through `extractor`, for metrics that compare with single ones.

    Raises:
      InputError: no such file, none of the forms, of other dimensions or not finite.
    """
    with distributed.fail_together():
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"--reference={path}: can't be read ({error.strerror})") from error
    sha256 = hashlib.sha256(content).hexdigest()
    distributed.require_same(sha256, "references")
    arrays = _arrays(path, content)
    names = [pair for pair in _MOMENTS if set(pair) <= set(arrays)]
    if not names:
        raise InputError(
            f"--reference={path} holds {', '.join(sorted(arrays)) or 'nothing'}, and neither mu and sigma "
            "nor ref_mu and ref_sigma; name a file of reference statistics"
        )
    try:
        moments = {"pool": _moments(arrays, *names[0])}
        if {"mu_s", "sigma_s"} <= set(arrays):
            moments["spatial"] = _moments(arrays, "mu_s", "sigma_s")
        images = _images(arrays["arr_0"]) if single_images and "arr_0" in arrays else None
        return checked(
            Reference(
                sha256=sha256,
                description={"file": path.name, "sha256": sha256, "count": None},
                count=None,
                moments=moments,
                features=None if images is None else extractor(images)["pool"],
            ),
            extractor,
        )
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(
            f"--reference={path} is no reference for these features ({' '.join(str(error).split())}); name "
            "one that was made with Inception"
        ) from error


def _arrays(path: Path, content: bytes) -> dict[str, Any]:
    if content.startswith(b"PK"):
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                return dict(file)
        # A damaged archive can fail in any way that zip and npy know; each means the same.
        except Exception as error:
            raise InputError(
                f"--reference={path} is damaged ({' '.join(str(error).split())}); get it again"
            ) from error
    tree = pickles.read(content, name=f"--reference={path}")
    if isinstance(tree, Mapping) and isinstance(tree.get("fid"), Mapping):
        tree = tree["fid"]
    return dict(tree) if isinstance(tree, Mapping) else {}


def _moments(arrays: Mapping[str, Any], mean: str, cov: str) -> tuple[np.ndarray, np.ndarray]:
    mu, sigma = np.asarray(arrays[mean], np.float64), np.asarray(arrays[cov], np.float64)
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape:
        raise ValueError(f"{mean} and {cov} of shapes {mu.shape} and {sigma.shape}")
    if np.abs(sigma - sigma.T).max() > 1e-6 * np.abs(sigma).max():
        raise ValueError(f"{cov} is no covariance, being not symmetric")
    return mu, sigma


def _images(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        raise ValueError(f"arr_0 holds no uint8 images [N, H, W, 3], but {array.dtype} {array.shape}")
    return array
