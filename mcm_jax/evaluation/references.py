"""Computes statistics of reference images once and caches them under a hash of everything they depend on."""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from jaxtyping import Float32, Float64, Int, UInt8

from mcm_jax.evaluation.features import Extractor
from mcm_jax.evaluation.frechet import checked_moments
from mcm_jax.evaluation.metrics import Moments
from mcm_jax.evaluation.unfinished import Arrays, Unfinished, joined, part, read_saved
from mcm_jax.records import JsonObject
from mcm_jax.system import archives, distributed, json_text
from mcm_jax.system.errors import InputError
from mcm_jax.system.files import read_bytes, reading, require_writable, write_whole
from mcm_jax.system.paths import Path, as_path

# Part of every cache key: increment it whenever the numbers computed here or by a network change.
VERSION = 3
# Features of single images are stored only up to this many images (at most 2,048 floats each: 410 MB at the
# limit). Beyond it, metrics that compare samples with single images are unavailable.
MAX_STORED_FEATURES = 50_000


# Blocks of (images, labels).
Blocks = Iterable[tuple[UInt8[np.ndarray, "_ H W 3"], Int[np.ndarray, " _"]]]


@dataclasses.dataclass(frozen=True)
class Reference:
    """What samples are compared with: moments of image features and, for small sets, the features themselves.

    Attributes:
      sha256: identifies the reference; distances to references with equal hashes are comparable.
      description: what a result must state about the reference.
      count: number of images behind the moments; None if unknown.
      moments: (mean, covariance) by name of the features; always includes "pool".
      features: "pool" features of all images or some of them; None if not available.
      labels: classes of the images in `features`; None if unknown.
    """

    sha256: str
    description: JsonObject
    count: int | None
    moments: dict[str, tuple[Float64[np.ndarray, " D"], Float64[np.ndarray, "D D"]]]
    features: Float32[np.ndarray, "N D"] | None = None
    labels: Int[np.ndarray, " N"] | None = None

    @property
    def rank_deficient(self) -> bool:
        """Whether the number of images is known to be too small for a covariance of full rank."""
        mean, _ = self.moments["pool"]
        return self.count is not None and self.count <= len(mean)

    def require_features(self) -> Float32[np.ndarray, "N D"]:
        """The features, for metrics that need them; raises ValueError if there are none."""
        if self.features is None:
            raise ValueError("the reference has no features of single images")
        return self.features

    def require_labels(self) -> Int[np.ndarray, " N"]:
        """The labels, for metrics that need them; raises ValueError if there are none."""
        if self.labels is None:
            raise ValueError("the reference's images have no labels")
        return self.labels


class Cache:
    """A directory of results by content hash. A damaged file is recomputed, with a note on stderr.

    Several processes share the directory: all of them compute, but only the first one writes.
    """

    def __init__(self, directory: str | Path):
        self.directory = as_path(directory)
        with distributed.fail_together():
            require_writable(self.directory, "--cache_dir")
        distributed.require_shared(self.directory, "--cache_dir")

    def reference(
        self,
        extractor: Extractor,
        *,
        split: str,
        identity: Mapping[str, object],
        images: Callable[[], Blocks],
    ) -> Reference:
        """The statistics of `images()`, which is called only if they are not cached yet.

        Args:
          identity: everything that determines the images, above all their fingerprint. The cache key adds
            the features and the code's version.
        """
        key = content_hash({"version": VERSION, "split": split, **extractor.network.description, **identity})
        path = self.directory / f"reference_{key}.npz"
        cached = read_saved(path, lambda: _load_reference(path, extractor, split=split, key=key))
        if cached is not None:
            return cached
        unfinished = Unfinished(self.directory / f"unfinished_{key}.npz")
        reference = _compute_reference(extractor, images(), unfinished, split=split, key=key)
        arrays = {"count": np.array(reference.count, np.int64)}
        for name, (mean, cov) in reference.moments.items():
            arrays |= {f"mean_{name}": mean, f"cov_{name}": cov}
        if reference.features is not None:
            arrays |= {"features": reference.features, "labels": reference.require_labels()}
        if distributed.is_first():
            write_whole(path, lambda file: np.savez(file, allow_pickle=False, **arrays))
        unfinished.finish()
        return reference

    def numbers(
        self, identity: Mapping[str, object], compute: Callable[[], dict[str, float]]
    ) -> dict[str, float]:
        """`compute()`, or its cached result for the same identity."""
        path = self.directory / f"numbers_{content_hash({'version': VERSION, **identity})}.json"
        cached = read_saved(path, lambda: _load_numbers(path))
        if cached is not None:
            return cached
        numbers = compute()
        content = {"numbers": numbers, "sha256": content_hash(numbers)}
        if distributed.is_first():
            write_whole(path, json.dumps(content, allow_nan=False))
        return numbers


def content_hash(fields: Mapping[str, object]) -> str:
    """sha256 of the fields as canonical JSON."""
    text = json.dumps(dict(fields), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _load_reference(path: Path, extractor: Extractor, *, split: str, key: str) -> Reference:
    with reading(path) as file:
        arrays = archives.read_npz(file)
    sizes, features, labels = extractor.network.dimensions, arrays.get("features"), arrays.get("labels")
    moments = {
        name: checked_moments(arrays[f"mean_{name}"], arrays[f"cov_{name}"], size=sizes[name])
        for name in _moment_names(extractor)
    }
    if features is not None:
        if features.ndim != 2 or features.shape[1] != sizes["pool"] or not np.isfinite(features).all():
            raise ValueError(f"features of shape {features.shape} or not finite")
        if labels is None or labels.shape != features.shape[:1]:
            raise ValueError("not one label for each image")
    return Reference(
        sha256=key,
        description=_description(split, int(arrays["count"]), key),
        count=int(arrays["count"]),
        moments=moments,
        features=features,
        labels=labels,
    )


def _moment_names(extractor: Extractor) -> list[str]:
    """The features whose distributions are compared: all except logits."""
    return [name for name in extractor.network.dimensions if name != "logits"]


def _description(split: str, count: int, key: str) -> JsonObject:
    return {"split": split, "count": count, "sha256": key}


def _load_numbers(path: Path) -> dict[str, float]:
    content = json_text.loads(read_bytes(path))
    if content["sha256"] != content_hash(content["numbers"]):
        raise ValueError("its checksum is wrong")
    return content["numbers"]


class _Sums:
    """Accumulates a reference's statistics block by block."""

    def __init__(self, extractor: Extractor):
        sizes = extractor.network.dimensions
        self._extractor = extractor
        self._moments = {name: Moments(sizes[name]) for name in _moment_names(extractor)}
        self._rows: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._differ = False

    @property
    def count(self) -> int:
        return self._moments["pool"].count

    def update(self, images: np.ndarray, labels: np.ndarray) -> None:
        found = self._extractor(images)
        self._differ = self._differ or bool((images != images[:1]).any())
        for name, seen in self._moments.items():
            seen.update(found[name])
        if self.count <= MAX_STORED_FEATURES:
            self._rows.append(found["pool"])
            self._labels.append(labels)
        else:
            self._rows, self._labels = [], []

    def arrays(self) -> Arrays:
        return {
            "differ": np.array(self._differ),
            "rows": np.concatenate(self._rows) if self._rows else np.zeros((0, 0), np.float32),
            "labels": np.concatenate(self._labels) if self._labels else np.zeros(0, np.int32),
            **joined({name: seen.arrays() for name, seen in self._moments.items()}),
        }

    def restore(self, arrays: Arrays) -> None:
        """Restores the state from `arrays`; raises KeyError if they belong to other features."""
        self._moments = {name: Moments.from_arrays(part(arrays, name)) for name in self._moments}
        self._rows = [arrays["rows"]] if len(arrays["rows"]) else []
        self._labels = [arrays["labels"]] if len(arrays["rows"]) else []
        self._differ = bool(arrays["differ"])

    def reference(self, *, split: str, key: str) -> Reference:
        if self._differ and not np.diag(self._moments["pool"].covariance).any():
            raise InputError(
                f"the features of all {self.count} images of the reference are equal although the images "
                "differ, so these are not the network's weights; use the right ones"
            )
        return Reference(
            sha256=key,
            description=_description(split, self.count, key),
            count=self.count,
            moments={name: (seen.mean, seen.covariance) for name, seen in self._moments.items()},
            features=np.concatenate(self._rows) if self._rows else None,
            labels=np.concatenate(self._labels) if self._rows else None,
        )


def _compute_reference(
    extractor: Extractor, blocks: Blocks, unfinished: Unfinished, *, split: str, key: str
) -> Reference:
    sums = _Sums(extractor)
    arrays = unfinished.read(copy.copy(sums).restore)
    if arrays is not None:
        sums.restore(arrays)
        distributed.say(f"continuing after the first {sums.count} images of split {split}")
    del arrays  # Frees as much memory as all features take.
    done, seen = sums.count, 0
    for images, labels in blocks:
        fresh = slice(max(done - seen, 0), None)  # Images that an interrupted computation has not processed.
        seen += len(images)
        if seen > done:
            sums.update(images[fresh], labels[fresh])
            unfinished.save_if_due(sums.arrays)
    return sums.reference(split=split, key=key)
