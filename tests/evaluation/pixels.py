"""The pixels as features: no network, no compilation."""

import dataclasses

import numpy as np

from mcm_jax import records
from mcm_jax.evaluation.features import Extractor, FeatureNetwork


def network(
    dimensions=(("pool", 48),), *, distance="fd_effnet_lite0", sha256="f00d", input_resolution=96
) -> FeatureNetwork:
    """In place of the network that has this distance: the first pixels of an image, over 255; else zero."""
    name = {distance: name for name, distance in records.DISTANCES.items()}[distance]
    description = {"network": name, "sha256": sha256, "input_resolution": input_resolution}
    return FeatureNetwork(None, lambda *_: {}, dict(dimensions), distance, description)


def jax_network() -> FeatureNetwork:
    """As `network`, for a program: its features are twelve pixels of an image."""
    numpy_network = network((("pool", 12),))

    def features(_, images):
        return {"pool": images[:, ::4, ::4].reshape(len(images), -1)[:, :12] / 255}

    return dataclasses.replace(numpy_network, params={}, apply=features)


# Code that gives a program these features. The compilation of a real network takes longer than all else.
IN_A_PROGRAM = """
from mcm_jax.evaluation import scoring
from tests.evaluation import pixels
scoring._feature_network = lambda options: pixels.jax_network()
"""


class PixelExtractor(Extractor):
    """`Extractor` by numpy."""

    def __init__(self, of: FeatureNetwork | None = None):
        self.network = of or network()

    def __call__(self, images):
        pixels = images.reshape(len(images), -1).astype(np.float32) / 255
        return {
            name: np.pad(pixels, ((0, 0), (0, max(size - pixels.shape[1], 0))))[:, :size]
            for name, size in self.network.dimensions.items()
        }
