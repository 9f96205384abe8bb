"""Statistics of reference images, computed once and kept under a hash of everything they depend on."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int, UInt8

from mcm_jax import distributed
from mcm_jax.errors import InputError
from mcm_jax.evaluation.features import Extractor
from mcm_jax.evaluation.metrics import Moments
from mcm_jax.files import require_writable, write_whole

# Part of every key: raise it whenever the numbers computed here or by a network change.
VERSION = 3
# Above this many images their features are not kept (2,048 floats each at most: 410 MB at the limit), and
# nothing is reported that compares samples with single images.
MAX_KEPT_FEATURES = 50_000


# Images with their labels, in blocks.
Blocks = Iterable[tuple[UInt8[np.ndarray, "_ H W 3"], Int[np.ndarray, "_"]]]


@dataclasses.dataclass(frozen=True)
class Reference:
    """What samples are compared with: moments of images' features, and of a small set the features too.

    Attributes:
      sha256: names it; equal hashes mean comparable distances.
      description: what a result must say about it.
      count: images behind the moments; None: unknown.
      moments: (mean, covariance) by name of the features, "pool" at least.
      features: "pool" of every image, or of some of them.
      labels: of these.
    """

    sha256: str
    description: dict[str, Any]
    count: int | None
    moments: dict[str, tuple[Float64[np.ndarray, " D"], Float64[np.ndarray, "D D"]]]
    features: Float32[np.ndarray, "N D"] | None = None
    labels: Int[np.ndarray, " N"] | None = None

    @property
    def rank_deficient(self) -> bool:
        """Whether the count is known to be too small for a covariance of full rank."""
        mean, _ = self.moments["pool"]
        return self.count is not None and self.count <= len(mean)


class Cache:
    """A directory of results by content hash. A damaged file is computed again, with a note on stderr.

    Several processes share it: all compute, the first one writes.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        with distributed.together():
            require_writable(self.directory, "--cache_dir")
        distributed.require_shared(self.directory, "--cache_dir")

    def reference(
        self,
        extractor: Extractor,
        *,
        split: str,
        identity: Mapping[str, Any],
        images: Callable[[], Blocks],
    ) -> Reference:
        """The statistics of `images()`, called only when they are not here yet.

        identity is what determines the images, their fingerprint first; features and code version are added
        to it.
        """
        key = content_hash({"version": VERSION, "split": split, **extractor.network.description, **identity})
        path = self.directory / f"reference_{key}.npz"
        kept = _read(path, lambda: _load_reference(path, extractor, split=split, key=key))
        if kept is not None:
            return kept
        reference = _compute_reference(extractor, images(), split=split, key=key)
        arrays: dict[str, Any] = {"count": np.int64(reference.count)}
        for name, (mean, cov) in reference.moments.items():
            arrays |= {f"mean_{name}": mean, f"cov_{name}": cov}
        if reference.features is not None:
            arrays |= {"features": reference.features, "labels": reference.labels}
        if distributed.is_first():
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
        if distributed.is_first():
            write_whole(path, json.dumps(content, allow_nan=False))
        return numbers


def content_hash(fields: Mapping[str, Any]) -> str:
    """sha256 of the fields as canonical JSON."""
    text = json.dumps(dict(fields), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path, load: Callable[[], Any]) -> Any | None:
    """What `load` reads from `path`; None where there is no such file or it is damaged."""
    if not distributed.exists(path):
        return None
    kept = None
    try:
        kept = load()
    # A damaged file can fail in any way that zip, npy and JSON know; each means the same.
    except Exception as error:
        reason = " ".join(str(error).split())
        print(f"note: {path} is damaged ({reason}); computing it again", file=sys.stderr)
    # Computing is the work of all.
    return kept if distributed.all_answer(kept is not None) else None


def _load_reference(path: Path, extractor: Extractor, *, split: str, key: str) -> Reference:
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    names = _moment_names(extractor)
    return checked(
        Reference(
            sha256=key,
            description=_description(split, int(arrays["count"]), key),
            count=int(arrays["count"]),
            moments={name: (arrays[f"mean_{name}"], arrays[f"cov_{name}"]) for name in names},
            features=arrays.get("features"),
            labels=arrays.get("labels"),
        ),
        extractor,
    )


def checked(reference: Reference, extractor: Extractor) -> Reference:
    """The reference itself, if its arrays are finite and of the extractor's dimensions.

    Raises:
      ValueError: naming the array.
    """
    for name, (mean, cov) in reference.moments.items():
        size = extractor.network.dimensions[name]
        if mean.shape != (size,) or cov.shape != (size, size):
            raise ValueError(
                f"{name}: moments of shapes {mean.shape} and {cov.shape}, not of {size} features"
            )
        if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
            raise ValueError(f"{name}: moments that are not finite")
    if reference.features is not None:
        size = extractor.network.dimensions["pool"]
        if reference.features.ndim != 2 or reference.features.shape[1] != size:
            raise ValueError(f"features of shape {reference.features.shape}, not [N, {size}]")
    return reference


def _moment_names(extractor: Extractor) -> list[str]:
    """Features whose distribution is compared, which class scores are not."""
    return [name for name in extractor.network.dimensions if name != "logits"]


def _description(split: str, count: int, key: str) -> dict[str, Any]:
    return {"split": split, "count": count, "sha256": key}


def _load_numbers(path: Path) -> dict[str, float]:
    content = json.loads(path.read_text())
    if content["sha256"] != content_hash(content["numbers"]):
        raise ValueError("its checksum is wrong")
    return content["numbers"]


def _compute_reference(extractor: Extractor, blocks: Blocks, *, split: str, key: str) -> Reference:
    sizes = extractor.network.dimensions
    moments = {name: Moments(sizes[name]) for name in _moment_names(extractor)}
    rows, labels, differ = [], [], False
    for images, of_images in blocks:
        found = extractor(images)
        differ = differ or bool((images != images[:1]).any())
        for name, seen in moments.items():
            seen.update(found[name])
        if moments["pool"].count <= MAX_KEPT_FEATURES:
            rows.append(found["pool"])
            labels.append(of_images)
    count = moments["pool"].count
    if differ and not np.diag(moments["pool"].covariance).any():
        raise InputError(
            f"the features of all {count} images of the reference are equal, though the images differ, and "
            "every distance would be 0: give the right weights"
        )
    kept = count <= MAX_KEPT_FEATURES
    return Reference(
        sha256=key,
        description=_description(split, count, key),
        count=count,
        moments={name: (seen.mean, seen.covariance) for name, seen in moments.items()},
        features=np.concatenate(rows) if kept else None,
        labels=np.concatenate(labels) if kept else None,
    )
