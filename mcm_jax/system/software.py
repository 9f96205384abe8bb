"""Which code runs: this package's source files, and the versions of the libraries that it computes with."""

import functools
import hashlib
import platform
from pathlib import Path

from mcm_jax.system import versions

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "chex", "orbax-checkpoint", "grain", "array-record", "numpy")


def library_versions() -> dict[str, str]:
    """The versions of Python and of every library whose code takes part in training and sampling."""
    return {"python": platform.python_version(), **versions.record(*_LIBRARIES)}


@functools.cache
def source_hash(package: Path = Path(__file__).parents[1]) -> str:
    """SHA-256 of the names and contents of all Python files below `package`; takes milliseconds."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()}\n{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()
