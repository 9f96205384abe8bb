"""A record is never lost because a package, ours for one, has no metadata."""

import importlib.metadata

import jax

from mcm_jax.system import versions


def test_installed_packages_have_their_version():
    assert versions.record("jax") == {"jax": jax.__version__}


def test_missing_or_damaged_metadata_are_unknown(monkeypatch):
    assert versions.installed("no-such-package") == "unknown"
    for metadata in (None, ""):
        monkeypatch.setattr(importlib.metadata, "version", lambda _, found=metadata: found)
        assert versions.installed("jax") == "unknown"
