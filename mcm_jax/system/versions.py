"""Versions of installed packages, for the records of results and data sets."""

import importlib.metadata

UNKNOWN = "unknown"


def installed(package: str) -> str:
    """The version of `package`; "unknown" if its metadata are missing or damaged.

    Code on PYTHONPATH that is not installed has no metadata, but its results must still be stored.
    """
    try:
        return importlib.metadata.version(package) or UNKNOWN
    except (importlib.metadata.PackageNotFoundError, KeyError):
        return UNKNOWN


def record(*packages: str) -> dict[str, str]:
    """Maps each package to its installed version."""
    return {package: installed(package) for package in packages}
