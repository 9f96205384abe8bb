"""Where arrays lie on the mesh: the batch over `data` and `fsdp`, parameters over `fsdp`."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mcm_jax.errors import InputError

# Smaller arrays cost more to gather than to keep everywhere.
_SMALLEST_SHARDED = 2**14


def make_mesh(*, data: int, fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp) mesh; data = -1 takes what fsdp leaves. devices: default all there are."""
    count = jax.device_count() if devices is None else len(devices)
    if data == -1:
        data = count // fsdp
    if data * fsdp != count:
        raise InputError(
            f"config.mesh: data={data} x fsdp={fsdp} is not the {count} devices there are; "
            "take data=-1 and an fsdp that divides them"
        )
    # Auto: the compiler propagates shardings; Explicit axes would forbid constraints on activations.
    axis_types = (AxisType.Auto,) * 2
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=axis_types, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over all devices."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same everywhere."""
    return NamedSharding(mesh, P())


def params_sharding(mesh: Mesh, abstract: Any) -> Any:
    """The largest axis that fsdp divides is split over it; small arrays are replicated."""
    fsdp = mesh.shape["fsdp"]

    def rule(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        divisible = [axis for axis, size in enumerate(leaf.shape) if size % fsdp == 0]
        if fsdp == 1 or not divisible or np.prod(leaf.shape) < _SMALLEST_SHARDED:
            return replicated(mesh)
        axis = max(divisible, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, P(*(None,) * axis, "fsdp"))

    return jax.tree.map(rule, abstract)


def check_batch(mesh: Mesh, *, batch_size: int, accumulation_steps: int = 1) -> None:
    """Raises InputError unless every device gets the same number of images in every part of the batch."""
    if batch_size % (mesh.size * accumulation_steps):
        parts = f" in {accumulation_steps} parts" if accumulation_steps > 1 else ""
        raise InputError(
            f"config.training.batch_size={batch_size} can't be divided over {mesh.size} devices{parts}; "
            f"take a multiple of {mesh.size * accumulation_steps}"
        )


def global_batch(mesh: Mesh, local: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The global batch of which this process holds `local`."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in local.items()}
