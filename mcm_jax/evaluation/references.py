"""Statistics of reference images, computed once and kept under a hash of everything they depend on."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, UInt8

from mcm_jax.evaluation.efficientnet import FEATURES, Extractor
from mcm_jax.evaluation.metrics import Moments
from mcm_jax.files import require_writable, write_whole

# Part of every key: raise it whenever the numbers computed here or in efficientnet.py change.
VERSION = 1
# Above this many images their features are not kept (1,280 floats each: 100 MB at the limit), and no
# distances to nearest neighbours are reported.
MAX_KEPT_FEATURES = 20_000
_BLOCK = 1024


@dataclasses.dataclass(frozen=True)
class Reference:
    """Moments of one split's features. `sha256` names it: equal hashes mean comparable distances."""

    split: str
    sha256: str
    count: int
    mean: Float64[np.ndarray, " D"]
    cov: Float64[np.ndarray, "D D"]
    features: Float32[np.ndarray, "N D"] | None

    @property
    def rank_deficient(self) -> bool:
        """Whether the count is too small for a covariance of full rank."""
        return self.count <= len(self.mean)

    @property
    def description(self) -> dict[str, Any]:
        """What a result must say about its reference."""
        return {"split": self.split, "count": self.count, "sha256": self.sha256}


class Cache:
    """A directory of results by content hash. A damaged file is computed again, with a note on stderr."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        require_writable(self.directory, "--cache_dir")

    def reference(
        self,
        extractor: Extractor,
        *,
        split: str,
        identity: Mapping[str, Any],
        images: Callable[[], UInt8[np.ndarray, "N H W 3"]],
    ) -> Reference:
        """The statistics of `images()`, called only when they are not here yet.

        identity is what determines the images, their fingerprint first; features and code version are added
        to it.
        """
        key = content_hash({"version": VERSION, "split": split, **extractor.description, **identity})
        path = self.directory / f"reference_{key}.npz"
        kept = _read(path, lambda: _load_reference(path, split=split, key=key))
        if kept is not None:
            return kept
        reference = _compute_reference(extractor, images(), split=split, key=key)
        arrays = {"mean": reference.mean, "cov": reference.cov, "count": np.int64(reference.count)}
        if reference.features is not None:
            arrays["features"] = reference.features
        write_whole(path, lambda file: np.savez(file, allow_pickle=False, **arrays))
        return reference

    def numbers(
        self, identity: Mapping[str, Any], compute: Callable[[], dict[str, float]]
    ) -> dict[str, float]:
        """`compute()`, or what it gave for the same identity before."""
        path = self.directory / f"numbers_{content_hash({'version': VERSION, **identity})}.json"
        kept = _read(path, lambda: _load_numbers(path))
        if kept is not None:
            return kept
        numbers = compute()
        content = {"numbers": numbers, "sha256": content_hash(numbers)}
        write_whole(path, json.dumps(content, allow_nan=False))
        return numbers


def content_hash(fields: Mapping[str, Any]) -> str:
    """sha256 of the fields as canonical JSON."""
    text = json.dumps(dict(fields), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path, load: Callable[[], Any]) -> Any | None:
    """What `load` reads from `path`; None where there is no such file or it is damaged."""
    if not path.exists():
        return None
    try:
        return load()
    # A damaged file can fail in any way that zip, npy and JSON know; each means the same.
    except Exception as error:
        reason = " ".join(str(error).split())
        print(f"note: {path} is damaged ({reason}); computing it again", file=sys.stderr)
        return None


def _load_reference(path: Path, *, split: str, key: str) -> Reference:
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    reference = Reference(
        split=split,
        sha256=key,
        count=int(arrays["count"]),
        mean=arrays["mean"],
        cov=arrays["cov"],
        features=arrays.get("features"),
    )
    if reference.mean.shape != (FEATURES,) or reference.cov.shape != (FEATURES, FEATURES):
        raise ValueError(f"shapes {reference.mean.shape} and {reference.cov.shape}")
    if reference.features is not None and reference.features.shape != (reference.count, FEATURES):
        raise ValueError(f"features of shape {reference.features.shape} for {reference.count} images")
    if not (np.isfinite(reference.mean).all() and np.isfinite(reference.cov).all()):
        raise ValueError("not finite")
    return reference


def _load_numbers(path: Path) -> dict[str, float]:
    content = json.loads(path.read_text())
    if content["sha256"] != content_hash(content["numbers"]):
        raise ValueError("its checksum is wrong")
    return content["numbers"]


def _compute_reference(
    extractor: Extractor, images: UInt8[np.ndarray, "N H W 3"], *, split: str, key: str
) -> Reference:
    moments = Moments(FEATURES)
    kept = [] if len(images) <= MAX_KEPT_FEATURES else None
    for start in range(0, len(images), _BLOCK):
        block = extractor(images[start : start + _BLOCK])
        moments.update(block)
        if kept is not None:
            kept.append(block)
    return Reference(
        split=split,
        sha256=key,
        count=moments.count,
        mean=moments.mean,
        cov=moments.covariance,
        features=np.concatenate(kept) if kept else None,
    )
