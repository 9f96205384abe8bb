"""TPU topologies that can be compiled for where there is no TPU; needs the package libtpu."""

import dataclasses
import importlib.util
import math
import os
import re

from mcm_jax.planning.chips import CHIPS, Chip, chip
from mcm_jax.system.errors import InputError
from mcm_jax.system.sharding import Device

# The slices that Google Cloud offers; libtpu knows more.
_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
SLICES = {"v4": _DEEP, "v5e": _FLAT, "v5p": _DEEP, "v6e": _FLAT}

# libtpu would become the default device, asks a metadata server that only a TPU machine has, lets one process
# at a time load it, and complains on stderr that it knows of no machine. Which one is named does not matter.
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
    """A slice: its chips in the order of jax's devices."""

    name: str
    chip: Chip
    bounds: tuple[int, ...]
    devices: tuple[Device, ...]  # jax devices that compile and don't run

    @property
    def num_chips(self) -> int:
        """In the slice."""
        return math.prod(self.bounds)


def names() -> list[str]:
    """All that `describe` takes."""
    return [f"{generation.name}:{shape}" for generation in CHIPS for shape in SLICES[generation.name]]


def describe(name: str) -> Topology:
    """The slice of that name, such as v5e:8x8.

    Raises:
      InputError: there is none, or libtpu is not installed.
    """
    if name not in names():
        raise InputError(f"--topology={name} does not exist; there are {', '.join(names())}")
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "planning for a TPU needs its compiler, libtpu: pip install -e '.[plan]' (on Linux, x86-64)"
        )
    generation, _, shape = name.partition(":")
    one = chip(generation)
    for variable, value in _WITHOUT_TPU.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    described = topologies.get_topology_desc(
        platform="tpu", topology_name=one.topology_prefix + shape, **one.config
    )
    bounds = tuple(int(n) for n in re.split("x", shape))
    return Topology(name, one, bounds, tuple(described.devices))
