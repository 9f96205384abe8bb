"""Compiles a function for a topology and reports its memory and time, or by how much it does not fit."""

import collections
import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from mcm_jax.planning import cost, hlo
from mcm_jax.planning.chips import Chip
from mcm_jax.planning.cost import Operation
from mcm_jax.planning.topologies import Topology


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler reports: the memory that a program needs on each chip, and its module."""

    argument_bytes: int
    temporary_bytes: int
    total_bytes: int  # arguments, results that don't reuse their buffers, temporaries, and the program
    text: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory and time that one execution of a compiled program needs on each chip, by estimate."""

    argument_bytes: int
    temporary_bytes: int
    total_bytes: int  # as in `Compiled`
    operations: tuple[Operation, ...]
    text: str  # the compiled module
    doubts: tuple[str, ...] = ()  # messages about what could not be read from the module

    def fits(self, chip: Chip) -> bool:
        """Whether the program fits in a chip's memory; it may compile even if it does not."""
        return self.total_bytes <= chip.hbm_bytes

    def seconds(self, *kinds: str) -> float:
        """Non-overlapped time of the operations of these kinds, or of all kinds if none is given."""
        return math.fsum(o.exposed_seconds for o in self.operations if not kinds or o.kind in kinds)

    @property
    def flops(self) -> float:
        """FLOPs of all matrix products and convolutions on one chip, recomputation included."""
        return math.fsum(o.flops for o in self.operations)

    def collectives(self) -> dict[str, tuple[int, float, float, float]]:
        """By opcode: (executions, bytes that each chip receives, seconds, non-overlapped seconds)."""
        totals: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0, 0.0])
        for o in self.operations:
            if o.kind == "collective":
                parts = (o.count, o.num_bytes, o.seconds, o.exposed_seconds)
                totals[o.opcode] = [a + b for a, b in zip(totals[o.opcode], parts, strict=True)]
        return {
            name: (int(count), num_bytes, seconds, exposed)
            for name, (count, num_bytes, seconds, exposed) in sorted(totals.items())
        }

    def costliest(self, number: int) -> Sequence[Operation]:
        """The `number` operations with the most non-overlapped time, in descending order."""
        return sorted(self.operations, key=lambda o: -o.exposed_seconds)[:number]


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """A program that the compiler rejected because it does not fit in a chip's memory."""

    needed_bytes: float | None  # None: not reported
    available_bytes: float

    def fits(self, chip: Chip) -> bool:
        """Always False."""
        del chip
        return False


def plan(
    function: jax.stages.Wrapped,
    arguments: Sequence[PyTree],
    topology: Topology,
    *,
    mesh: Mesh,
    package: Path,
) -> Plan | TooLarge:
    """Compiles a jitted function for abstract arguments (shapes and dtypes).

    Args:
      mesh: mesh of the topology's devices, over which the function is sharded.
      package: directory of this package's files, preferred in the operations' source lines.

    Raises:
      jax.errors.JaxRuntimeError: compilation fails for a reason other than memory.
    """
    compiled = _compiled(function.lower(*arguments), topology)
    if isinstance(compiled, TooLarge):
        return compiled
    operations, doubts = cost.operations(
        hlo.parse(compiled.text),
        topology.chip,
        coordinates=[device.coords for device in mesh.devices.flat],
        bounds=topology.bounds,
        package=package,
    )
    return Plan(
        argument_bytes=compiled.argument_bytes,
        temporary_bytes=compiled.temporary_bytes,
        total_bytes=compiled.total_bytes,
        operations=tuple(operations),
        text=compiled.text,
        doubts=tuple(doubts),
    )


def _compiled(lowered: jax.stages.Lowered, topology: Topology) -> Compiled | TooLarge:
    """Compiles a program for the topology; raises as `plan`."""
    try:
        with _no_cache():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refused = too_large(str(error), available=topology.chip.hbm_bytes)
        if refused is None:
            raise
        return refused
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if memory is None or text is None:
        raise ValueError("the compiler does not report the program's memory or text")
    new_results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        total_bytes=memory.argument_size_in_bytes
        + new_results
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
        text=text,
    )


@contextlib.contextmanager
def _no_cache() -> Generator[None, None, None]:
    """Disables JAX's persistent cache: it stores executables for absent devices, but cannot load them."""
    enabled = jax.config.values["jax_enable_compilation_cache"]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # Otherwise JAX remembers that it is enabled.
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def seconds_unfused(
    compiled: Plan, attend: Callable[..., jax.Array], topology: Topology, *, dtype: jnp.dtype
) -> float | None:
    """Estimated time of the step if `attend` replaced the attention kernels.

    Each kernel's time is replaced by that of `attend`, (q, k, v) -> values, compiled alone. Overlap
    remains as in the step with kernels, and whether such a step fits in memory is not checked. None if a
    single layer does not fit.

    Args:
      dtype: dtype of the queries.
    """
    mesh = Mesh(topology.devices[:1], "chip")

    def alone(function: Callable[..., PyTree], sizes: tuple[int, ...], number: int) -> float:
        array = jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, PartitionSpec()))
        found = plan(jax.jit(function), (array,) * number, topology, mesh=mesh, package=Path(__file__).parent)
        return math.nan if isinstance(found, TooLarge) else found.seconds()

    def with_gradient(q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array) -> PyTree:
        values, back = jax.vjp(attend, q, k, v)
        return values, back(gradient)

    @functools.cache
    def unfused(kernel: str, sizes: tuple[int, ...]) -> float:
        if kernel == cost.FORWARD:
            return alone(attend, sizes, 3)
        return alone(with_gradient, sizes, 4) - unfused(cost.FORWARD, sizes)

    total = math.fsum(
        o.count * unfused(cost.attention_kernel(o.name), o.attention) if o.attention else o.exposed_seconds
        for o in compiled.operations
    )
    return None if math.isnan(total) else total


def too_large(message: str, *, available: float) -> TooLarge | None:
    """Parses a compiler error; None unless it reports that the program needs too much memory."""
    if "RESOURCE_EXHAUSTED" not in message or "hbm" not in message.lower():
        return None
    found = re.search(r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm", message)
    found = found or re.search(r"\(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)", message)
    if found is None:
        return TooLarge(None, available)
    return TooLarge(*(_bytes(part) for part in found.groups()))


def _bytes(text: str) -> float:
    unit = text[-1] if text[-1] in "KMGT" else ""
    return float(text.removesuffix(unit)) * 1024 ** " KMGT".index(unit or " ")
