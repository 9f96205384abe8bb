"""CLIP score (Hessel et al., arXiv:2104.08718): the mean cosine of CLIP's embeddings of image and caption.

As in the paper's table 6, it is not scaled by 2.5 or 100. It depends on the CLIP, whose name is part of the
metric's.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from mcm_jax.evaluation import caption_scores
from mcm_jax.records import CLIP_SCORE
from mcm_jax.system.paths import Path
from mcm_jax.text import clip_images, encoders


class ClipScore:
    """The score with one CLIP, from the user's files; see `CaptionScore`."""

    def __init__(self, directory: Path):
        """Loads both encoders.

        Raises:
          InputError: a file is missing, damaged or of another network.
        """
        self._images, self._texts = clip_images.load(directory), encoders.load(directory)

    @property
    def name(self) -> str:
        """Name of the metric, with that of the CLIP."""
        return f"{CLIP_SCORE}_{self._images.name}"

    @property
    def sha256(self) -> str:
        """A hash of both encoders."""
        return hashlib.sha256(f"{self._images.sha256} {self._texts.sha256}".encode()).hexdigest()

    def __call__(
        self, images: UInt8[np.ndarray, "N r r 3"], captions: Sequence[str]
    ) -> caption_scores.Points:
        """The cosine of each image and its caption; and 1 for each."""
        a, b = self._images.encode(images), self._texts.encode(captions).pooled
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        return np.sum(a * b, axis=1) / norms, np.ones(len(images))
