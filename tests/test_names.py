"""Every global name that a function reads exists. ruff's F821 would tell, but takes shapes for names."""

import builtins
import dis
import importlib
import pkgutil
import types

import pytest

import mcm_jax

MODULES = [module.name for module in pkgutil.walk_packages(mcm_jax.__path__, "mcm_jax.")]


def unknown_names(code, known):
    """Names that the code object, or one inside of it, loads from neither `known` nor the builtins."""
    loaded = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    inside = [unknown_names(part, known) for part in code.co_consts if isinstance(part, types.CodeType)]
    return (loaded - set(known) - set(dir(builtins))).union(*inside)


@pytest.mark.parametrize("name", MODULES)
def test_every_name_exists(name):
    module = importlib.import_module(name)
    with open(module.__file__) as file:
        code = compile(file.read(), module.__file__, "exec")
    # Names of classes' bodies are theirs.
    local = {n for part in code.co_consts if isinstance(part, types.CodeType) for n in part.co_names}
    functions = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    for part in functions:
        is_class = "__qualname__" in part.co_names
        known = set(vars(module)) | (local if is_class else set())
        assert unknown_names(part, known) == set(), part.co_name


def test_a_missing_name_is_seen():
    code = compile("def f(x: 'B 3'):\n    return missing(x) + len(x)", "f.py", "exec")
    assert unknown_names(code.co_consts[0] if isinstance(code.co_consts[0], types.CodeType) else code.co_consts[1], {}) == {"missing"}
