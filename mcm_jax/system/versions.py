"""Versions of installed packages, as records of results and data sets state them."""

import importlib.metadata

UNKNOWN = "unknown"


def installed(package: str) -> str:
    """The version of `package`; "unknown" where its metadata are missing or damaged.

    Code that lies on PYTHONPATH without being installed has no metadata, and a result must not be lost for
    that.
    """
    try:
        return importlib.metadata.version(package) or UNKNOWN
    except (importlib.metadata.PackageNotFoundError, KeyError):
        return UNKNOWN


def record(*packages: str) -> dict[str, str]:
    """`installed` of each package by its name."""
    return {package: installed(package) for package in packages}
