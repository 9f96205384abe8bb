"""The mesh and the shardings on it: the batch over `data` and `fsdp`, parameters over `fsdp`."""

import dataclasses
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Literal, Protocol, runtime_checkable

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from mcm_jax.fields import Affects, setting
from mcm_jax.system.errors import InputError

# Smaller arrays are replicated, because gathering them costs more than storing them.
_SMALLEST_SHARDED = 2**14


@runtime_checkable
class Device(Protocol):
    """A JAX device; type checkers do not see JAX's own class."""

    id: int
    platform: str
    device_kind: str


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """The arrangement of devices in a mesh."""

    data: int = setting(
        -1,
        "devices over which only the batch is sharded; -1: all remaining devices",
        low=-1,
        affects=Affects.NOTHING,
    )
    fsdp: int = setting(
        1,
        "devices over which the parameters are sharded too; `gather` sets when they are gathered",
        low=1,
        affects=Affects.NOTHING,
    )
    gather: Literal["all", "blocks"] = setting(
        "all",
        "which parameters sharded over fsdp a device gathers at once: all, before each part of a batch, or "
        "those of one block, before it runs (less memory, more communication)",
        affects=Affects.NOTHING,
    )


def fitted(settings: MeshSettings, devices: Sequence[Device] | None = None) -> MeshSettings:
    """Changes fsdp to all devices of a slice, with a note on stderr, if it does not divide their number.

    A config row has the number of chips that it was planned for. It is not changed if `data` is given too.
    """
    chosen = jax.devices() if devices is None else list(devices)
    slices = len({getattr(device, "slice_index", 0) for device in chosen})
    count = len(chosen) // slices
    if settings.data != -1 or count % settings.fsdp == 0:
        return settings
    if jax.process_index() == 0:
        where = "available" if slices == 1 else "of each slice"
        print(
            f"note: config.mesh.fsdp={settings.fsdp} does not divide the {count} devices {where}; "
            f"using fsdp={count}",
            file=sys.stderr,
            flush=True,
        )
    return dataclasses.replace(settings, fsdp=count)


def make_mesh(*, data: int, fsdp: int, devices: Sequence[Device] | None = None) -> Mesh:
    """Makes a (data, fsdp) mesh over `devices`, by default all; data=-1 uses all devices left by fsdp.

    With several slices (TPU slices or nodes of GPUs), fsdp stays within each slice: the network between
    slices is slow, and only gradients are summed over `data`.
    """
    chosen = jax.devices() if devices is None else list(devices)
    count = len(chosen)
    if data == -1:
        data = count // fsdp
    if data * fsdp != count:
        raise InputError(
            f"config.mesh: data={data} x fsdp={fsdp} is not the {count} devices available; "
            "use data=-1 and an fsdp that divides them"
        )
    # Auto: the compiler propagates shardings; Explicit axes would forbid constraints on activations.
    names, types = ("data", "fsdp"), (AxisType.Auto,) * 2
    slices = len({getattr(device, "slice_index", 0) for device in chosen})
    if slices == 1:
        return jax.make_mesh((data, fsdp), names, axis_types=types, devices=chosen)
    if data % slices:
        raise InputError(
            f"config.mesh.fsdp={fsdp} does not divide the {count // slices} devices of each of the {slices} "
            "slices; use an fsdp that does"
        )
    arranged = mesh_utils.create_hybrid_device_mesh(
        (data // slices, fsdp), (slices, 1), chosen, allow_split_physical_axes=True
    )
    return Mesh(arranged, names, axis_types=types)


def kernel_platform(mesh: Mesh) -> str:
    """The platform for which kernels are chosen: "cuda" for NVIDIA GPUs since Ampere, else JAX's name.

    JAX calls all GPUs "gpu", those of AMD too.
    """
    device = mesh.devices.flat[0]
    # Devices of a described topology have no client.
    version = getattr(getattr(device, "client", None), "platform_version", "")
    if device.platform == "gpu" and "cuda" in version and float(device.compute_capability) >= 8:
        return "cuda"
    return device.platform


def description(mesh: Mesh) -> str:
    """The devices of a mesh in words.

    Examples:
      >>> description(make_mesh(data=1, fsdp=1, devices=jax.devices()[:1]))
      '1 x cpu'
    """
    parts = [f"{mesh.size} x {mesh.devices.flat[0].device_kind}"]
    if jax.process_count() > 1:
        parts.append(f"{jax.process_count()} processes")
    if mesh.size > 1:
        parts.append(f"mesh data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}")
    return ", ".join(parts)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of the leading axis over all devices."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """Replication on all devices."""
    return NamedSharding(mesh, P())


def params_sharding(mesh: Mesh, abstract: PyTree) -> PyTree:
    """Shards the largest axis divisible by fsdp, the last one only as a fallback; replicates small arrays.

    The last axis is laid out along a TPU's lanes, so joining its shards moves all data. Kernels of layers
    named `columns` are sharded along it where possible, since they are never gathered.
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


def gathered(mesh: Mesh, params: PyTree, *, without: Collection[str] = ()) -> PyTree:
    """Gathers `params` on all devices, except those sharded by column.

    The gradient is summed over devices and sharded like the original parameters.

    Args:
      without: names of subtrees that stay sharded.
    """

    def stays(path: tuple[object, ...]) -> bool:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return _by_column(path) or not set(names).isdisjoint(without)

    @jax.custom_vjp
    def gather(params: PyTree) -> PyTree:
        own = params_sharding(mesh, params)
        shardings = jax.tree.map_with_path(
            lambda path, sharding: sharding if stays(path) else replicated(mesh), own
        )
        return jax.lax.with_sharding_constraint(params, shardings)

    def back(_: None, gradient: PyTree) -> tuple[PyTree]:
        return (jax.lax.with_sharding_constraint(gradient, params_sharding(mesh, gradient)),)

    gather.defvjp(lambda params: (gather(params), None), back)
    return gather(params)


def by_column(mesh: Mesh, layer: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Computes layer(x), sharded by row like x, for a layer whose weights are sharded by column.

    Sends all rows of x and their gradient over fsdp instead of all weights, which is less data for a layer
    with many columns and one row per example.
    """
    x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("data")))
    y = jax.lax.with_sharding_constraint(layer(x), NamedSharding(mesh, P("data", "fsdp")))
    return jax.lax.with_sharding_constraint(y, batch_sharding(mesh))


def _by_column(path: tuple[object, ...]) -> bool:
    """Whether a parameter, by its name, is the kernel of a layer computed with `by_column`."""
    return jax.tree_util.keystr(path[-2:], simple=True, separator="/") == "columns/kernel"


def check_batch(mesh: Mesh, *, batch_size: int, accumulation_steps: int = 1) -> None:
    """Raises InputError unless every device gets the same number of images in every part of the batch."""
    if batch_size % (mesh.size * accumulation_steps):
        parts = f" in {accumulation_steps} parts" if accumulation_steps > 1 else ""
        raise InputError(
            f"config.training.batch_size={batch_size} can't be divided over {mesh.size} devices{parts}; "
            f"use a multiple of {mesh.size * accumulation_steps}"
        )


def global_batch(mesh: Mesh, local: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Assembles the global batch from each process's `local` part.

    The rows of `local` are placed on this process's devices; the mesh determines their position in the batch.
    """
    sharding = batch_sharding(mesh)
    # With several processes, the training loop's transfer guard would reject these transfers.
    with jax.transfer_guard_host_to_device("allow"):
        return {
            name: jax.make_array_from_process_local_data(sharding, array) for name, array in local.items()
        }


def split(mesh: Mesh, whole: np.ndarray) -> jax.Array:
    """Shards the leading axis of `whole`, which all processes have in full, over all devices."""
    sharding = batch_sharding(mesh)
    if not mesh.is_multi_process:
        return jax.device_put(whole, sharding)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def replicate(mesh: Mesh, tree: PyTree) -> PyTree:
    """Replicates `tree`, which is the same in all processes, on all devices."""
    if not mesh.is_multi_process:
        return jax.device_put(tree, replicated(mesh))
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(tree)


def gather(array: jax.Array) -> np.ndarray:
    """Returns the full array in every process."""
    return multihost_utils.process_allgather(array, tiled=True)
