"""TPU topologies to compile for on a machine without a TPU; needs the package libtpu."""

import dataclasses
import importlib.util
import math
import os
import re

from mcm_jax.planning.chips import CHIPS, Chip, get_chip
from mcm_jax.system.errors import InputError
from mcm_jax.system.sharding import Device

# The slices that Google Cloud offers; libtpu supports more.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
SLICES = {"v4": _DEEP, "v5e": _FLAT, "v5p": _DEEP, "v6e": _FLAT}

# Otherwise libtpu becomes JAX's default backend, queries a metadata server that only TPU machines have, lets
# only one process at a time load it, and warns on stderr about an unknown machine. Any machine name works.
_WITHOUT_TPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A TPU slice and its devices."""

    name: str
    chip: Chip
    bounds: tuple[int, ...]
    devices: tuple[Device, ...]  # JAX devices that can be compiled for, but cannot run

    @property
    def num_chips(self) -> int:
        """Number of chips in the slice."""
        return math.prod(self.bounds)


def names() -> list[str]:
    """All names that `describe` accepts."""
    return [f"{generation.name}:{shape}" for generation in CHIPS for shape in SLICES[generation.name]]


def describe(name: str) -> Topology:
    """Returns the slice with this name, such as v5e:8x8.

    Raises:
      InputError: there is no such slice, or libtpu is not installed.
    """
    if name not in names():
        raise InputError(f"--topology={name} does not exist; available: {', '.join(names())}")
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "planning for a TPU needs its compiler, libtpu: pip install -e '.[plan]' (on Linux, x86-64)"
        )
    generation, _, shape = name.partition(":")
    chip = get_chip(generation)
    for variable, value in _WITHOUT_TPU.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    bounds = tuple(int(n) for n in re.split("x", shape))
    # Hosts have four chips by default.
    host = {"chips_per_host_bounds": [1, 1, 1]} if math.prod(bounds) == 1 else {}
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=chip.topology_prefix + shape, **chip.config, **host
    )
    return Topology(name, chip, bounds, tuple(described.devices))
