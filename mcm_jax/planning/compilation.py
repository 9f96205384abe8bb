"""Compiles a function for a topology and reads off what it needs; out of memory is an answer too."""

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
class Plan:
    """What one execution of a compiled program needs on each chip, by the compiler's estimate."""

    argument_bytes: int
    temporary_bytes: int
    total_bytes: int  # arguments, results that don't reuse them, temporaries, and the program itself
    operations: tuple[Operation, ...]
    text: str  # the compiled module
    doubts: tuple[str, ...] = ()  # what could not be read from it

    def fits(self, chip: Chip) -> bool:
        """Whether a chip has the memory; a program may compile all the same."""
        return self.total_bytes <= chip.hbm_bytes

    def seconds(self, *kinds: str) -> float:
        """Of the step: of the operations of these kinds, all if none are named, that nothing hides."""
        return math.fsum(o.exposed_seconds for o in self.operations if not kinds or o.kind in kinds)

    @property
    def flops(self) -> float:
        """Of all matrix products and convolutions on one chip, those done again for the gradient included."""
        return math.fsum(o.flops for o in self.operations)

    def collectives(self) -> dict[str, tuple[int, float, float, float]]:
        """By operation: (executions, bytes every chip receives, seconds, seconds that nothing hides)."""
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
        """The operations that take most of the step."""
        return sorted(self.operations, key=lambda o: -o.exposed_seconds)[:number]


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """The compiler's refusal: what the program would need on each chip."""

    needed_bytes: float | None  # None: the compiler did not say
    available_bytes: float

    def fits(self, chip: Chip) -> bool:
        """It does not."""
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
    """Compiles a jitted function for arguments given by shape.

    Args:
      mesh: of the topology's devices, over which the function is split.
      package: where this program's files lie, which the operations' source lines name first.

    Raises:
      jax.errors.JaxRuntimeError: the compiler refuses for another reason than memory.
    """
    lowered = function.lower(*arguments)
    try:
        with _no_cache():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refused = too_large(str(error), available=topology.chip.hbm_bytes)
        if refused is None:
            raise
        return refused
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    if memory is None or text is None:
        raise ValueError("the compiler does not say what the program needs")
    operations, doubts = cost.operations(
        hlo.parse(text),
        topology.chip,
        coordinates=[device.coords for device in mesh.devices.flat],
        bounds=topology.bounds,
        package=package,
    )
    new_results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Plan(
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        total_bytes=memory.argument_size_in_bytes
        + new_results
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
        operations=tuple(operations),
        text=text,
        doubts=tuple(doubts),
    )


@contextlib.contextmanager
def _no_cache() -> Generator[None, None, None]:
    """Without JAX's persistent cache: it stores executables for absent devices, but cannot load them."""
    enabled = jax.config.values["jax_enable_compilation_cache"]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # It remembers whether it is enabled.
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def seconds_unfused(
    compiled: Plan, attend: Callable[..., jax.Array], topology: Topology, *, dtype: jnp.dtype
) -> float | None:
    """Of the step with every kernel of attention at what `attend`, (q, k, v) -> values, compiles to alone.

    Of time alone: whether the whole step would fit so is not asked, and what overlaps what stays as it is
    with the kernels. dtype: of the queries. None where one layer alone doesn't fit.
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
    """What an error of the compiler says of memory; None where it speaks of something else."""
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
