"""Each kind makes exactly its mutants; the program kills, reports, and forgives what is listed."""

import textwrap

import pytest

from tests import forks, mutants, mutations

MATHS = "mcm_jax/objectives/example.py"


def mutated(source, kind):
    """What the mutants of one kind are changed to, in order."""
    return [m.after for m in mutations.mutants_of(MATHS, textwrap.dedent(source)) if m.kind == kind]


@pytest.mark.parametrize(
    ("kind", "source", "expected"),
    [
        ("sign", "a + b - c", ["a + b + c", "a - b - c"]),
        ("sign", "-a", ["a"]),
        ("product", "a * b / c", ["a * b * c", "a / b / c"]),
        ("exponent", "a ** 3", ["a"]),
        ("exponent", "jnp.sqrt(a)", ["a"]),
        ("exponent", "jnp.square(a)", ["a"]),
        ("exponent", "jnp.expm1(a - b)", ["jnp.expm1(2 * (a - b))"]),
        ("exponent", "f(a) * b", ["f(a) * b ** 2"]),
        ("axis", "a.max(axis=1)", ["a.max()", "jnp.full_like(a.max(axis=1), jnp.mean(a.max(axis=1)))"]),
        ("axis", "mean_square(a)", ["jnp.full_like(mean_square(a), jnp.mean(mean_square(a)))"]),
        ("mean", "jnp.mean(a)", ["jnp.sum(a)"]),
        ("mean", "a.sum()", ["a.mean()"]),
        (
            "constant",
            "f(0, 1, 2)",
            ["f(-1, 1, 2)", "f(0, 0, 2)", "f(0, 1, 3)", "f(0, 1, 4)", "f(0, 2, 2)", "f(1, 1, 2)"],
        ),
        ("constant", "x: float = setting(1.0, 'doc', low=0)", []),
        ("constant", "0.5", ["0.25", "1.5"]),
        ("constant", "f(True, 'a', None)", ["f(False, 'a', None)"]),
        ("choice", "a if kind == 'x' else b", ["a if kind != 'x' else b"]),
        ("choice", "n < 2", ["n <= 2"]),
        ("choice", "a is None or b", ["a is None and b", "a is not None or b"]),
        ("choice", "jnp.where(c, a, b)", ["jnp.where(c, b, a)"]),
        ("choice", "jnp.clip(a, b, c)", ["jnp.maximum(a, b)", "jnp.minimum(a, c)"]),
        ("choice", "min(a, b)", ["max(a, b)"]),
        ("choice", "process.alpha(a)", ["process.sigma(a)"]),
    ],
)
def test_expressions(kind, source, expected):
    assert sorted(mutated(source, kind)) == expected


def test_a_time_becomes_the_others_of_its_kind_in_the_function():
    source = """
        def f(x_t, x_s, y_t):
            x_step = g(x_t, y_t)
            return times.t_step * times.s

        def other(x_u):
            return x_u
        """
    assert sorted(mutated(source, "time")) == [
        "return times.s * times.s",
        "return times.t_step * times.t_step",
        "x_step = g(x_s, y_t)",
        "x_step = g(x_step, y_t)",
    ]


def test_the_keywords_of_two_times_are_exchanged():
    assert mutated("f(x, t=a, s=b, u_t=c)", "time") == ["f(x, s=a, t=b, u_t=c)"]


def test_a_key_is_used_twice():
    source = """
        def f(key):
            key_t, key_eps = split(key)
            return g(key_t), g(key_eps)
        """
    assert mutated(source, "key") == ["return (g(key_eps), g(key_eps))", "return (g(key_t), g(key_t))"]


GRADIENTS = """
def loss(model_fn, x: Float[Array, "B"], n: int) -> Float[Array, "B"]:
    x_ref = stop_gradient(model_fn(x))
    return model_fn(x) - x_ref

def count(x) -> Int[Array, "B"]:
    return x + 1
"""


def test_gradients_are_let_through_and_stopped():
    assert mutated(GRADIENTS, "gradient") == [
        "x_ref = model_fn(x)",
        "return stop_gradient(model_fn(x) - x_ref)",
        "return stop_gradient(model_fn(x)) - x_ref",
    ]


def test_nothing_is_stopped_where_nothing_is_differentiated():
    kinds = {m.kind for m in mutations.mutants_of("mcm_jax/diffusion/sampling.py", GRADIENTS)}
    assert kinds == {"sign", "constant"}


def test_what_is_no_computation_is_left_alone():
    source = '''
        """Doc + string."""
        from a import b

        def f(x: Float[Array, "1 + 2"] | g(1)) -> h(2):
            """1 + 2."""
            raise ValueError(1 + 2)
        '''
    assert mutations.mutants_of(MATHS, textwrap.dedent(source)) == []


def test_a_mutant_says_where_it_is():
    source = "def f(*, epsilon: float = 0.5):\n\n    def g(x):\n        if x > 2:\n            return x\n"
    first, _, *rest = mutations.mutants_of(MATHS, source)
    assert (first.function, first.line) == ("f", 1)
    assert (first.before, first.after) == ("epsilon=0.5", "epsilon=1.5")
    assert first.source.startswith("def f(*, epsilon: float=1.5):")
    assert {(m.function, m.line, m.before) for m in rest} == {("f.g", 4, "x > 2")}


def test_the_widest_short_context_is_shown():
    long = " + ".join(f"variable_{n}" for n in range(12))
    assert mutated(f"x = f({long}, g(h(a * b)))", "product") == ["g(h(a / b))"]


@pytest.fixture
def checkout(tmp_path):
    """A package of one function, with a test that sees a wrong factor, but no wrong power of x."""
    files = {
        "setup.cfg": "[tool:pytest]\npythonpath = .\naddopts = --import-mode=importlib\n",
        "pyproject.toml": "",
        "mcm_jax/__init__.py": "",
        "mcm_jax/diffusion/__init__.py": "",
        "mcm_jax/diffusion/twice.py": "def twice(x):\n    return 2 * x\n",
        "tests/diffusion/test_twice.py": """
            from mcm_jax.diffusion import twice

            def test_twice():
                assert twice.twice(1) == 2
            """,
        "tests/equivalent_mutants.toml": "",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return tmp_path


# Imported before the children are forked, which otherwise import pytest's plugins again for every mutant.
LIBRARIES = "import hypothesis, pytest, xdist.plugin"


def run(checkout, *flags):
    """Exit code and output of the program, which here need not import the libraries of the real tests."""
    program = f"{LIBRARIES}, sys; from tests import mutants; mutants.LIBRARIES = (); sys.exit(mutants.main())"
    done = forks.run(program, f"--root={checkout}", *flags)
    return done.returncode, done.stdout + done.stderr


def equivalent(after, why="A power of x is not tested."):
    entry = {"path": "mcm_jax/diffusion/twice.py", "function": "twice", "before": "return 2 * x"}
    entry |= {"kind": "product" if "/" in after else "exponent", "after": after, "why": why}
    return "\n".join(["[[equivalent]]", *(f'{name} = "{value}"' for name, value in entry.items()), ""])


def test_survivors_are_reported(checkout):
    code, output = run(checkout, "--verbose")
    assert code == 1
    assert "2 killed, 2 survived" in output
    killed = "  - return 2 * x\n  + return 3 * x\n  killed by tests/diffusion/test_twice.py::test_twice"
    survived = "twice.py:2 twice, product\n  - return 2 * x\n  + return 2 / x\n  SURVIVED"
    assert killed in output
    assert survived in output
    assert (checkout / "mcm_jax/diffusion/twice.py").read_text() == "def twice(x):\n    return 2 * x\n"
    assert not list(checkout.rglob("__pycache__"))


def test_equivalent_mutants_are_no_survivors(checkout):
    listed = [equivalent(f"return 2 {after}") for after in ("/ x", "* x ** 2", "/ gone")]
    (checkout / "tests/equivalent_mutants.toml").write_text("".join(listed))
    code, output = run(checkout)
    assert code == 0
    assert "2 killed, 0 survived" in output
    assert "a mutant that no longer exists: mcm_jax/diffusion/twice.py" in output
    assert output.count("/ gone") == 1
    code, output = run(checkout, "--equivalent")
    assert code == 0
    assert "0 killed, 2 survived" in output


def test_an_equivalent_mutant_has_a_reason(checkout):
    (checkout / "tests/equivalent_mutants.toml").write_text(equivalent("return 2 / x", why=""))
    with pytest.raises(SystemExit, match="give a reason"):
        mutants.main([f"--root={checkout}"])


def test_a_test_that_fails_anyway_kills_nothing(checkout):
    (checkout / "tests/diffusion/test_twice.py").write_text("def test_wrong():\n    assert 1 == 2\n")
    code, output = run(checkout)
    assert code == 2
    assert "assert 1 == 2" in output
    assert "killed" not in output


def test_a_mutant_that_hangs_is_killed(checkout):
    path, source = (
        "mcm_jax/diffusion/twice.py",
        "def twice(x):\n    while x < 1:\n        pass\n    return 2 * x\n",
    )
    # In a process of its own: this one may have started JAX's threads, and then it must not fork.
    program = f"""
{LIBRARIES}
from pathlib import Path
from tests import mutants, mutations
[mutant] = [m for m in mutations.mutants_of({path!r}, {source!r}) if m.after == "x < 2"]
[outcome] = mutants.run([mutant], root=Path({str(checkout)!r}), limit_seconds=2)
print(outcome.killer)
"""
    done = forks.run(program)
    assert done.stdout == "out of time\n", done.stderr


def test_choosing(checkout, capsys):
    def chosen(*flags):
        code = mutants.main([f"--root={checkout}", *flags])
        return code, capsys.readouterr().out.count(" twice, ")

    assert chosen("--list", "--kinds=product,sign") == (0, 1)
    assert chosen("--list", "--only=mcm_jax/diffusion/twice.py:twice") == (0, 4)
    assert chosen("--only=mcm_jax/other.py") == (2, 0)
    with pytest.raises(SystemExit) as exit_:
        chosen("--kinds=product,sing")
    assert exit_.value.code == 2
    assert "sing is not one of sign" in capsys.readouterr().err
