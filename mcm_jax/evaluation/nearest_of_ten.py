"""Scores whether a sample looks more like its caption's own picture than like nine others of its class.

For `emoji`, whose classes are designs: does a sample of 'grinning face, Noto style' look like that picture,
which the model has not seen, or like another one in Noto style? Chance is one in ten. Images look alike if
their features, those of the other distances of `evaluate`, are near each other.
"""

import hashlib
import json
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int, UInt8

from mcm_jax.data import layout, pipeline
from mcm_jax.evaluation import caption_scores
from mcm_jax.evaluation.features import Extractor
from mcm_jax.records import NEAREST_OF_TEN

DATASET = "emoji"
_CHOICES = 10
_SPLITS = ("test", layout.HELD_OUT)


class NearestOfTen:
    """The score for the captions of the splits that no model is trained on; see `CaptionScore`."""

    def __init__(self, info: layout.DatasetInfo, extractor: Extractor):
        """Computes the features of all pictures of these splits."""
        self._extractor = extractor
        captions = None if info.encoding is None else info.encoding.captions_sha256
        identity = [captions, *(info.fingerprints[split] for split in _SPLITS)]
        features = extractor.network.description
        self._sha256 = hashlib.sha256(json.dumps([identity, features], sort_keys=True).encode()).hexdigest()
        # For each caption, the features of its own picture, and then of the others.
        self._pictures: dict[str, Float32[np.ndarray, "_ D"]] = {}
        for split in _SPLITS:
            source = caption_scores.open_split(info, split)
            images, labels = pipeline.load_arrays(source)
            rows, captions = extractor(images)["pool"], source.captions(np.arange(len(source)))
            for index, caption in enumerate(captions):
                self._pictures[caption] = rows[_chosen(index, caption, labels)]

    @property
    def name(self) -> str:
        """Name of the metric."""
        return NEAREST_OF_TEN

    @property
    def sha256(self) -> str:
        """A hash of the pictures and of the feature network."""
        return self._sha256

    def __call__(
        self, images: UInt8[np.ndarray, "N r r 3"], captions: Sequence[str]
    ) -> caption_scores.Points:
        """1 for each image whose own picture is the nearest one, otherwise 0; and 1 for each.

        Both are 0 for captions of a class that has fewer than ten pictures in the split.
        """
        points, most = np.zeros(len(images)), np.zeros(len(images))
        for n, (row, caption) in enumerate(zip(self._extractor(images)["pool"], captions, strict=True)):
            distances = np.square(self._pictures[caption] - row).sum(axis=1)
            if len(distances) == _CHOICES:
                points[n], most[n] = distances[0] < distances[1:].min(), 1
        return points, most


def _chosen(index: int, caption: str, labels: Int[np.ndarray, " N"]) -> Int[np.ndarray, " _"]:
    """The picture's index, and the indices of nine random others with its label, or of as many as exist."""
    others = np.flatnonzero(labels == labels[index])
    others = others[others != index]
    rng = np.random.default_rng(zlib.crc32(caption.encode()))
    return np.append(index, rng.permutation(others)[: _CHOICES - 1])
