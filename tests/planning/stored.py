"""Stores what the compiler for TPUs reports, for later runs of the tests: each program takes it seconds.

JAX's own cache can't do so: it would have to load a program for absent devices.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from mcm_jax.planning import compilation
from mcm_jax.planning.compilation import Compiled, TooLarge
from mcm_jax.system import files

_CACHE = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])


@contextlib.contextmanager
def stored() -> Iterator[None]:
    """Compiles for TPUs only what has not been compiled before, for the same devices by the same compiler."""
    plan, compile_ = compilation.plan, compilation._compiled
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")]
    names = {name for name in os.environ if name.startswith(("JAX_", "XLA_", "LIBTPU_"))}
    options = {name: os.environ[name] for name in sorted(names - {"JAX_COMPILATION_CACHE_DIR"})}

    def plan_once(function, arguments, topology, *, mesh, package):
        def compiled(lowered, topology):
            devices = [f"{device.device_kind} {device.coords}" for device in mesh.devices.flat]
            # Without source lines: those in the stored module may be old ones.
            key = json.dumps([versions, options, topology.name, devices, lowered.as_text()])
            path = _CACHE / f"plan-{hashlib.sha256(key.encode()).hexdigest()}.json.gz"
            if not path.exists():
                fields = dataclasses.asdict(compile_(lowered, topology))
                files.write_whole(path, gzip.compress(json.dumps(fields).encode(), 1))
            fields = json.loads(gzip.decompress(path.read_bytes()))
            return Compiled(**fields) if "text" in fields else TooLarge(**fields)

        with mock.patch.object(compilation, "_compiled", compiled):
            return plan(function, arguments, topology, mesh=mesh, package=package)

    with mock.patch.object(compilation, "plan", plan_once):
        yield
