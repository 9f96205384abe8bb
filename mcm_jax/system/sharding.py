"""Where arrays lie on the mesh: the batch over `data` and `fsdp`, parameters over `fsdp`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from mcm_jax.fields import Affects, setting
from mcm_jax.system.errors import InputError

# Smaller arrays cost more to gather than to keep everywhere.
_SMALLEST_SHARDED = 2**14


@runtime_checkable
class Device(Protocol):
    """One of JAX's devices, whose own class type checkers do not see."""

    id: int
    platform: str


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """How devices are arranged."""

    data: int = setting(
        -1,
        "devices over which the batch alone is split; -1: all that are left",
        low=-1,
        affects=Affects.NOTHING,
    )
    fsdp: int = setting(
        1,
        "devices over which the parameters are split too; each gathers them whole for every part of a batch",
        low=1,
        affects=Affects.NOTHING,
    )


def make_mesh(*, data: int, fsdp: int, devices: Sequence[Device] | None = None) -> Mesh:
    """A (data, fsdp) mesh over `devices`, by default all there are; data = -1 takes what fsdp leaves.

    Of several slices of devices (TPU, or nodes of GPUs) fsdp stays within each: between slices the
    network is slow, and only gradients are summed over `data`.
    """
    chosen = jax.devices() if devices is None else list(devices)
    count = len(chosen)
    if data == -1:
        data = count // fsdp
    if data * fsdp != count:
        raise InputError(
            f"config.mesh: data={data} x fsdp={fsdp} is not the {count} devices there are; "
            "take data=-1 and an fsdp that divides them"
        )
    # Auto: the compiler propagates shardings; Explicit axes would forbid constraints on activations.
    names, types = ("data", "fsdp"), (AxisType.Auto,) * 2
    slices = len({getattr(device, "slice_index", 0) for device in chosen})
    if slices == 1:
        return jax.make_mesh((data, fsdp), names, axis_types=types, devices=chosen)
    if data % slices:
        raise InputError(
            f"config.mesh.fsdp={fsdp} does not divide the {count // slices} devices of each of the {slices} "
            "slices; take an fsdp that does"
        )
    arranged = mesh_utils.create_hybrid_device_mesh(
        (data // slices, fsdp), (slices, 1), chosen, allow_split_physical_axes=True
    )
    return Mesh(arranged, names, axis_types=types)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over all devices."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same everywhere."""
    return NamedSharding(mesh, P())


def params_sharding(mesh: Mesh, abstract: PyTree) -> PyTree:
    """Shards the largest axis divisible by fsdp, the last one only as a fallback; replicates small arrays.

    The last axis lies along a TPU's lanes: its parts can't be joined without moving all of it. Kernels of
    layers named `columns` are split along it where possible, since they are never joined.
    """

    def rule(path: tuple[object, ...], leaf: jax.ShapeDtypeStruct | jax.Array) -> NamedSharding:
        divisible = [axis for axis, size in enumerate(leaf.shape) if size % mesh.shape["fsdp"] == 0]
        if mesh.shape["fsdp"] == 1 or not divisible or np.prod(leaf.shape) < _SMALLEST_SHARDED:
            return replicated(mesh)
        last = len(leaf.shape) - 1
        axis = max(divisible, key=lambda axis: (axis < last, leaf.shape[axis]))
        if _by_column(path) and last in divisible:
            axis = last
        return NamedSharding(mesh, P(*(None,) * axis, "fsdp"))

    return jax.tree.map_with_path(rule, abstract)


def gathered(mesh: Mesh, params: PyTree) -> PyTree:
    """`params` on every device, except for those split by column; their gradient goes back to where they lie.

    It is summed on the way.
    """

    @jax.custom_vjp
    def gather(params: PyTree) -> PyTree:
        own = params_sharding(mesh, params)
        shardings = jax.tree.map_with_path(
            lambda path, sharding: sharding if _by_column(path) else replicated(mesh), own
        )
        return jax.lax.with_sharding_constraint(params, shardings)

    def back(_: None, gradient: PyTree) -> tuple[PyTree]:
        return (jax.lax.with_sharding_constraint(gradient, params_sharding(mesh, gradient)),)

    gather.defvjp(lambda params: (gather(params), None), back)
    return gather(params)


def by_column(mesh: Mesh, layer: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """layer(x), split by row as x is, where the layer's weights lie split by column: rows go to the weights.

    All rows of x, and the gradient of them, are sent over fsdp in place of all weights: less where a layer of
    many columns sees one row an example.
    """
    x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("data")))
    y = jax.lax.with_sharding_constraint(layer(x), NamedSharding(mesh, P("data", "fsdp")))
    return jax.lax.with_sharding_constraint(y, batch_sharding(mesh))


def _by_column(path: tuple[object, ...]) -> bool:
    """Whether a parameter is the kernel of a layer that is computed by `by_column`, by its name."""
    return jax.tree_util.keystr(path[-2:], simple=True, separator="/") == "columns/kernel"


def check_batch(mesh: Mesh, *, batch_size: int, accumulation_steps: int = 1) -> None:
    """Raises InputError unless every device gets the same number of images in every part of the batch."""
    if batch_size % (mesh.size * accumulation_steps):
        parts = f" in {accumulation_steps} parts" if accumulation_steps > 1 else ""
        raise InputError(
            f"config.training.batch_size={batch_size} can't be divided over {mesh.size} devices{parts}; "
            f"take a multiple of {mesh.size * accumulation_steps}"
        )


def global_batch(mesh: Mesh, local: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The global batch of which this process holds `local`.

    Its rows lie on the process's devices; where in the batch that is, the mesh says.
    """
    sharding = batch_sharding(mesh)
    # The loop's guard takes these transfers for mistakes where there are several processes.
    with jax.transfer_guard_host_to_device("allow"):
        return {
            name: jax.make_array_from_process_local_data(sharding, array) for name, array in local.items()
        }


def split(mesh: Mesh, whole: np.ndarray) -> jax.Array:
    """`whole`, of which every process holds all, with its leading axis over all devices."""
    sharding = batch_sharding(mesh)
    if not mesh.is_multi_process:
        return jax.device_put(whole, sharding)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def replicate(mesh: Mesh, tree: PyTree) -> PyTree:
    """`tree`, which is the same in every process, on every device."""
    if not mesh.is_multi_process:
        return jax.device_put(tree, replicated(mesh))
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(tree)


def gather(array: jax.Array) -> np.ndarray:
    """All of an array, in every process."""
    return multihost_utils.process_allgather(array, tiled=True)
