"""The interface of scores that compare samples with their captions, and their bounds."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8

from mcm_jax.data import layout, pipeline
from mcm_jax.records import OTHER_CAPTIONS, with_count

# The most images of a split from which bounds are computed.
_BOUND_IMAGES = 2_000

Points = tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]


@runtime_checkable
class CaptionScore(Protocol):
    """A score of images by their captions."""

    @property
    def name(self) -> str:
        """Name of the metric, without the number of samples."""
        ...

    @property
    def sha256(self) -> str:
        """A hash of everything that the score depends on."""
        ...

    def __call__(self, images: UInt8[np.ndarray, "N r r 3"], captions: Sequence[str]) -> Points:
        """(points, highest number of points) of each image; the score is the ratio of their sums."""
        ...


def bounds(score: CaptionScore, info: layout.DatasetInfo, split: str) -> dict[str, float]:
    """The scores of a split's own images, with their captions and with those of other images.

    The first one is about the best that samples can reach; the second one is what images reach by chance.
    """
    source = open_split(info, split)
    # Stored order is not random: neighbours may be of one class.
    chosen = np.random.default_rng(0).permutation(pipeline.random_indices(source, _BOUND_IMAGES))
    (images, _), own = source.gather(chosen), source.captions(chosen)
    named = {f"{split}_images": own, OTHER_CAPTIONS: [*own[1:], own[0]]}
    scores = {}
    for name, captions in named.items():
        points, most = score(images, captions)
        if most.any():
            scores[f"{name}_{with_count(score.name, len(images))}"] = float(points.sum() / most.sum())
    return scores


def open_split(info: layout.DatasetInfo, split: str) -> pipeline.RecordSource:
    """A split of a data set with captions, read on demand."""
    source = pipeline.open_split(
        data_dir=info.path.parents[2],
        dataset=info.dataset,
        resolution=info.resolution,
        split=split,
        in_memory_limit_bytes=0,
    )
    assert isinstance(source, pipeline.RecordSource)
    return source
