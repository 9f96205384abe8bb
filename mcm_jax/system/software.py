"""Identifies the running code: a hash of this package's source files, and the versions of its libraries."""

import functools
import hashlib
import platform
from pathlib import Path

from mcm_jax.system import versions

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "chex", "orbax-checkpoint", "grain", "array-record", "numpy")


def library_versions() -> dict[str, str]:
    """Versions of Python and of all libraries used in training and sampling."""
    return {"python": platform.python_version(), **versions.record(*_LIBRARIES)}


@functools.cache
def source_hash(package: Path = Path(__file__).parents[1]) -> str:
    """SHA-256 of the names and contents of all Python files in `package`; takes milliseconds."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()}\n{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()
