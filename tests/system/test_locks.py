"""Only one process uses a directory, and the one that is refused learns who does."""

import errno
import os

import pytest

from mcm_jax.system import locks
from mcm_jax.system.errors import InputError


def test_a_lock_is_held_once_and_says_by_whom(tmp_path):
    with locks.locked(tmp_path / "lock", "--workdir=run"):
        expected = rf"--workdir=run is in use by process {os.getpid()} on \S+ since 20.*; stop that one"
        with pytest.raises(InputError, match=expected), locks.locked(tmp_path / "lock", "--workdir=run"):
            pass
        with locks.locked(tmp_path / "another", "--workdir=run"):
            pass
    with locks.locked(tmp_path / "lock", "--workdir=run"):
        assert len((tmp_path / "lock").read_text().splitlines()) == 1


def test_where_there_are_no_locks_none_is_needed(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", fail)
    with locks.locked(tmp_path / "lock", "x"), locks.locked(tmp_path / "lock", "x"):
        pass
