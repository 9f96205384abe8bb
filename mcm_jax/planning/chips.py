"""What is known of TPU generations: peak, memory, links; and how a group of chips is wired."""

import dataclasses
from collections.abc import Iterator, Sequence

from mcm_jax.system.errors import InputError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation: peak, memory and its speed as Google Cloud's documentation of TPU versions gives them.

    link_bytes_per_second: of one link in one direction, as "How to Scale Your Model" has it (jax-ml's scaling
    book). wrapped_from: what an axis of a slice must be a multiple of to be a ring and not a line.
    """

    name: str
    topology_prefix: str  # of jax's topology names
    clock_hertz: float  # of the compiler's cycles
    peak_flops: float  # a second, bfloat16
    hbm_bytes: float  # what the compiler may use
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    wrapped_from: int
    config: dict[str, str] = dataclasses.field(default_factory=dict)  # more arguments of the topology


_GIB = 2**30
# hbm_bytes: what the compiler says is available when a program needs more.
CHIPS = (
    Chip("v4", "v4:", 1.05e9, 275e12, 31.25 * _GIB, 1.2e12, 4.5e10, 4, {"chip_config_name": "megacore"}),
    Chip("v5e", "v5e:", 1.5e9, 197e12, 15.75 * _GIB, 0.81e12, 4.5e10, 16),
    Chip("v5p", "v5:", 1.75e9, 459e12, 95.74 * _GIB, 2.765e12, 9e10, 4),
    Chip("v6e", "v6e:", 1.75e9, 918e12, 31.25 * _GIB, 1.64e12, 9e10, 16),
)


def chip(name: str) -> Chip:
    """The generation of that name.

    Raises:
      InputError: there is none.
    """
    for one in CHIPS:
        if one.name == name:
            return one
    raise InputError(f"there is no TPU {name!r}; take one of {', '.join(c.name for c in CHIPS)}")


def incoming_bytes_per_second(
    one: Chip, coordinates: Sequence[Sequence[int]], bounds: Sequence[int]
) -> float:
    """How fast the worst-placed chip of a group can receive from the others, along the axes that vary.

    A ring brings data from two sides; a line has an end, which hears from one. Links that leave the group's
    axes carry nothing for it.

    Args:
      coordinates: of the group's chips.
      bounds: the slice's size along each axis.
    """
    return sum(one.link_bytes_per_second * sides for _, sides in _axes(one, coordinates, bounds))


def exchange_bytes_per_second(
    one: Chip, coordinates: Sequence[Sequence[int]], bounds: Sequence[int]
) -> float:
    """How fast every chip of a group can receive from all others at once, a part from each; else 0.

    A cut across an axis halves the group's N chips. Each of N/2 chips receives N - 1 parts, N/2 of them
    through the cut, which has one link of every line along the axis, or two of every ring. Of a group that
    fills a box of even sides, and balances what it sends around rings.
    """
    count = len(coordinates)
    cuts = (
        one.link_bytes_per_second * sides * count / length
        for length, sides in _axes(one, coordinates, bounds)
    )
    return min((cut * (count - 1) / (count / 2) ** 2 for cut in cuts), default=0.0)


def _axes(
    one: Chip, coordinates: Sequence[Sequence[int]], bounds: Sequence[int]
) -> Iterator[tuple[int, int]]:
    """(positions, sides that a chip hears from) of every axis along which a group extends."""
    for axis, size in enumerate(bounds):
        length = len({c[axis] for c in coordinates})
        if length > 1:
            # Of three axes all or none are rings.
            wrapped = min(bounds) if len(bounds) == 3 else size
            ring = wrapped >= one.wrapped_from and size % one.wrapped_from == 0 and length == size
            yield length, 2 if ring else 1
