"""Computes features of images with a network, in padded batches of fixed size over all devices of a mesh."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree, UInt8

from mcm_jax.records import JsonObject
from mcm_jax.system import sharding
from mcm_jax.system.errors import InputError

BATCH_PER_DEVICE = 64
# Activations of 8 images stay in the CPU's caches; 64 images at once are a quarter slower (on 2 cores).
_CPU_MICRO_BATCH = 8


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """A network whose features are used by metrics.

    Attributes:
      params: the pytree that `apply` takes.
      apply: (params, uint8 images [B, H, W, 3]) -> {name: [B, D]}; images don't influence each other.
      dimensions: D by name: "pool", and for Inception also "spatial" and "logits".
      distance: the name under which results report the Frechet distance of "pool".
      description: what a result must state about its features.
    """

    params: PyTree
    apply: Callable[[PyTree, Array], dict[str, Array]]
    dimensions: dict[str, int]
    distance: str
    description: JsonObject


def program(network: FeatureNetwork, mesh: Mesh) -> jax.stages.Wrapped:
    """Returns a jitted function (params, images) -> features that splits the images over the devices."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"

    def on_one_device(params: PyTree, images: Array) -> dict[str, Array]:
        """Loops over parts that fit the caches on a CPU; processes all images at once elsewhere."""
        if not on_cpu or len(images) % _CPU_MICRO_BATCH:
            return network.apply(params, images)
        parts = images.reshape(-1, _CPU_MICRO_BATCH, *images.shape[1:])
        found = lax.map(lambda x: network.apply(params, x), parts)
        return jax.tree.map(lambda rows: rows.reshape(len(images), -1), found)

    over_batch = sharding.batch_sharding(mesh).spec
    return jax.jit(
        jax.shard_map(
            on_one_device,
            mesh=mesh,
            in_specs=(jax.sharding.PartitionSpec(), over_batch),
            out_specs=over_batch,
            check_vma=False,
        )
    )


class Extractor:
    """Extracts features by name from images; compiled once per image size.

    Every batch is padded to the same size, so an image's features do not depend on the number of images in
    the call; features of padding are dropped. With several processes, each one gets all features.
    """

    def __init__(
        self, network: FeatureNetwork, *, mesh: Mesh | None = None, batch_per_device: int = BATCH_PER_DEVICE
    ):
        """mesh: default: all devices."""
        self.network = network
        self._mesh = mesh or sharding.make_mesh(data=-1, fsdp=1)
        self._batch = batch_per_device * self._mesh.size
        self._params = sharding.replicate(self._mesh, network.params)
        self._run = program(network, self._mesh)

    def __call__(self, images: UInt8[np.ndarray, "N H W 3"]) -> dict[str, np.ndarray]:
        """Returns float32 features [N, D] by name.

        Raises:
          InputError: a feature is not finite.
        """
        parts = [{name: np.zeros((0, size), np.float32) for name, size in self.network.dimensions.items()}]
        for start in range(0, len(images), self._batch):
            batch = images[start : start + self._batch]
            padded = np.pad(batch, ((0, self._batch - len(batch)), (0, 0), (0, 0), (0, 0)))
            found = self._run(self._params, sharding.split(self._mesh, padded))
            parts.append({name: sharding.gather(rows)[: len(batch)] for name, rows in found.items()})
        features = {name: np.concatenate([part[name] for part in parts]) for name in self.network.dimensions}
        for name, rows in features.items():
            if not np.isfinite(rows).all():
                raise InputError(
                    f"{name} features of {self.network.description.get('network')} are not finite, so its "
                    "weights are damaged; download them again"
                )
        return features
