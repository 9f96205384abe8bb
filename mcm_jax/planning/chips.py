"""Specifications of TPU generations (peak FLOPs, memory, links) and bandwidths within a group of chips."""

import dataclasses
from collections.abc import Iterator, Sequence

from mcm_jax.system.errors import InputError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU generation.

    Peak FLOPs and memory bandwidth are those in Google Cloud's documentation of TPU versions.
    link_bytes_per_second is for one link in one direction, from "How to Scale Your Model" (jax-ml's scaling
    book). An axis of a slice is a ring if its size is a multiple of wrapped_from, otherwise a line.
    """

    name: str
    topology_prefix: str  # start of JAX's topology names
    clock_hertz: float  # converts the compiler's cycles to seconds
    peak_flops: float  # per second, in bfloat16
    hbm_bytes: float  # available to the compiler
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    wrapped_from: int
    config: dict[str, str] = dataclasses.field(default_factory=dict)  # extra arguments of the topology


_GIB = 2**30
# hbm_bytes: the available memory that the compiler reports when a program needs more.
CHIPS = (
    Chip("v4", "v4:", 1.05e9, 275e12, 31.25 * _GIB, 1.2e12, 4.5e10, 4, {"chip_config_name": "megacore"}),
    Chip("v5e", "v5e:", 1.5e9, 197e12, 15.75 * _GIB, 0.81e12, 4.5e10, 16),
    Chip("v5p", "v5:", 1.75e9, 459e12, 95.74 * _GIB, 2.765e12, 9e10, 4),
    Chip("v6e", "v6e:", 1.75e9, 918e12, 31.25 * _GIB, 1.64e12, 9e10, 16),
)


def get_chip(name: str) -> Chip:
    """Returns the generation with this name.

    Raises:
      InputError: there is no such generation.
    """
    for one in CHIPS:
        if one.name == name:
            return one
    raise InputError(f"there is no TPU {name!r}; choose one of {', '.join(c.name for c in CHIPS)}")


def incoming_bytes_per_second(
    chip: Chip, coordinates: Sequence[Sequence[int]], bounds: Sequence[int]
) -> float:
    """Bytes per second that the worst-placed chip of a group can receive from the other chips.

    Counts only links along the axes on which the group extends. Along a ring, each chip receives from two
    sides; along a line, the chips at its ends receive from one.

    Args:
      coordinates: coordinates of the group's chips.
      bounds: the slice's size along each axis.
    """
    return sum(chip.link_bytes_per_second * sides for _, sides in _axes(chip, coordinates, bounds))


def exchange_bytes_per_second(
    chip: Chip, coordinates: Sequence[Sequence[int]], bounds: Sequence[int]
) -> float:
    """Bytes per second that each chip receives in an all-to-all within the group; 0 for a single chip.

    A cut across an axis halves the group's N chips. Each chip receives N - 1 parts, N/2 of them through the
    cut, which crosses one link of each line along the axis, or two of each ring. Assumes that the group
    fills a box with even sides and that traffic is balanced in both directions around rings.
    """
    count = len(coordinates)
    cuts = (
        chip.link_bytes_per_second * sides * count / length
        for length, sides in _axes(chip, coordinates, bounds)
    )
    return min((cut * (count - 1) / (count / 2) ** 2 for cut in cuts), default=0.0)


def _axes(
    chip: Chip, coordinates: Sequence[Sequence[int]], bounds: Sequence[int]
) -> Iterator[tuple[int, int]]:
    """Yields (length, sides that a chip receives from) for each axis along which the group extends."""
    for axis, size in enumerate(bounds):
        length = len({c[axis] for c in coordinates})
        if length > 1:
            # With three axes, either all are rings or none is.
            wrapped = min(bounds) if len(bounds) == 3 else size
            ring = wrapped >= chip.wrapped_from and size % chip.wrapped_from == 0 and length == size
            yield length, 2 if ring else 1
