"""Every global name that a function reads exists. ruff's F821 would tell, but takes shapes for names."""

import builtins
import dis
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    path.relative_to(ROOT) for part in ("mcm_jax", "configs", "tests") for path in (ROOT / part).rglob("*.py")
]
OF_EVERY_MODULE = {"__file__", "__name__", "__package__", "__doc__"}


def unknown_names(code, known):
    """Globals that a code object, or one inside of it, reads and that are neither known nor built in."""
    read = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    inside = [unknown_names(part, known) for part in code.co_consts if isinstance(part, types.CodeType)]
    return (read - known - set(dir(builtins))).union(*inside)


def unknown_in(source):
    code = compile(source, "module", "exec")
    known = {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_NAME"}
    return unknown_names(code, known | OF_EVERY_MODULE)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_name_exists(path):
    assert unknown_in((ROOT / path).read_text()) == set()


def test_a_missing_name_is_seen():
    source = "import os\nclass A:\n  def f(self, x: 'B 3'):\n    return missing(os.path, x) + len(x) + A"
    assert unknown_in(source) == {"missing"}
