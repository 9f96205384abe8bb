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
import re
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from mcm_jax.planning import compilation
from mcm_jax.planning.compilation import Compiled, TooLarge
from mcm_jax.system import files

_CACHE = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
_OF_TESTS = re.compile(re.escape(f'"{Path(__file__).parents[1]}/') + r'[^"]*":[\d: to]*')


@contextlib.contextmanager
def stored() -> Iterator[None]:
    """Compiles for TPUs only what has not been compiled before, for the same devices by the same compiler."""
    plan, compile_ = compilation.plan, compilation._compiled
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")]
    options = sorted(item for item in os.environ.items() if item[0].startswith(("JAX_", "XLA_", "LIBTPU_")))

    def plan_once(function, arguments, topology, *, mesh, package):
        def compiled(lowered, topology):
            devices = [f"{device.device_kind} {device.coords}" for device in mesh.devices.flat]
            # With the source lines, which the compiled module contains, except those of tests.
            text = _OF_TESTS.sub("", lowered.as_text(debug_info=True))
            key = json.dumps([versions, options, topology.name, devices, text])
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
