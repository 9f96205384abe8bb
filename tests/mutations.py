"""Generates the mutants of a module, each with one changed expression; tests/mutants.py tests them.

`places` finds the expressions, the functions in `KINDS` yield replacements, and `mutants_of` combines both.
"""

import ast
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator

# A change is printed, and identified in the list of equivalent mutants, by the widest short node of these
# types around it.
CONTEXT_CHARACTERS = 100
CONTEXTS = (ast.expr, ast.keyword, ast.comprehension, ast.Return, ast.Assign, ast.AnnAssign, ast.Expr)


@dataclasses.dataclass(frozen=True)
class Place:
    """An expression, its ancestors (outermost first), and the slots (node, field, index) that hold it."""

    node: ast.expr
    ancestors: tuple[ast.AST, ...]
    slots: tuple[tuple[ast.AST, str, int | None], ...]

    def put(self, node: ast.expr) -> None:
        for parent, field, index in self.slots:
            if index is None:
                setattr(parent, field, node)
            else:
                getattr(parent, field)[index] = node

    @property
    def context(self) -> ast.AST | None:
        """The widest short expression or simple statement around the node; None directly under an `if`."""
        around = list(itertools.takewhile(lambda a: isinstance(a, CONTEXTS), reversed(self.ancestors)))
        short = itertools.takewhile(lambda a: len(ast.unparse(a)) <= CONTEXT_CHARACTERS, around)
        return [*around[:1], *short][-1] if around else None

    @property
    def function(self) -> str:
        names = [a.name for a in self.ancestors if isinstance(a, ast.FunctionDef | ast.ClassDef)]
        return ".".join(names) or "<module>"

    @property
    def scope(self) -> list[ast.AST]:
        """All nodes of the outermost function around this place."""
        functions = [a for a in self.ancestors if isinstance(a, ast.FunctionDef)]
        return list(ast.walk(functions[0])) if functions else []

    @property
    def names(self) -> list[str]:
        """The names of arguments and variables in the scope."""
        names = [a.arg for a in self.scope if isinstance(a, ast.arg)]
        names += [a.id for a in self.scope if isinstance(a, ast.Name) and isinstance(a.ctx, ast.Store)]
        return list(dict.fromkeys(names))


def places(node: ast.AST, ancestors: tuple[ast.AST, ...] = ()) -> Iterator[Place]:
    """Yields each expression below `node`, except in annotations, imports, raise statements and declarations.

    Declarations are `setting(...)` and `dataclass(...)`: defaults and ranges of settings are no mathematics.
    """
    for field, value in ast.iter_fields(node):
        for n, child in enumerate(value if isinstance(value, list) else [value]):
            if field in ("annotation", "returns") or not isinstance(child, ast.AST):
                continue
            if isinstance(child, ast.Import | ast.ImportFrom | ast.Raise):
                continue
            if called(child) in ("setting", "dataclass"):
                continue
            around, slots = (*ancestors, node), ((node, field, n if isinstance(value, list) else None),)
            if field in ("defaults", "kw_defaults"):  # printed as name=default, like a keyword
                arguments = node.kwonlyargs if field == "kw_defaults" else [*node.posonlyargs, *node.args]
                keyword = ast.keyword(arguments[n - len(value)].arg, child)
                around, slots = (*around, keyword), (*slots, (keyword, "value", None))
            if isinstance(child, ast.expr):
                yield Place(child, around, slots)
            yield from places(child, around)


# Replacements: one generator of new expressions per kind of mutant.

# Imports that the new expressions need, for modules that do not have them.
EPILOGUE = "\nimport jax.numpy as jnp\nfrom jax.lax import stop_gradient\n"
# Training differentiates these modules, but not schedules, times and samplers.
DIFFERENTIATED = ("mcm_jax/diffusion/process.py", "mcm_jax/diffusion/steps.py", "mcm_jax/objectives/")
# Matches the beginning of annotations of float arrays.
FLOATS = r"Float\[|Image|PerExample"
OPPOSITE_COMPARISONS = {
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn},
    **{ast.NotIn: ast.In, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
}
OPPOSITE_NAMES = {"min": "max", "minimum": "maximum", "alpha": "sigma"}
OPPOSITE_NAMES |= {b: a for a, b in OPPOSITE_NAMES.items()}


def called(node: ast.AST) -> str:
    """The function's name in a call, `f` for `f(x)` and for `module.f(x)`; otherwise empty."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "attr", getattr(function, "id", ""))


def renamed(node: ast.expr, name: str) -> ast.expr:
    """The same name, attribute or call with another name."""
    if isinstance(node, ast.Call):
        return ast.Call(renamed(node.func, name), node.args, node.keywords)
    return ast.Name(name) if isinstance(node, ast.Name) else ast.Attribute(node.value, name)


def call(name: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.parse(name, mode="eval").body, list(arguments), [])


def are_times(name: str, other: str) -> bool:
    """Whether two names differ only in their time, such as logsnr_t and logsnr_step, or t and t_step."""
    stems = [re.fullmatch(r"(|\w+?_)(?:t|s|u|step|t_step)", n) for n in (name, other)]
    return name != other and all(stems) and stems[0][1] == stems[1][1]


def sign(place: Place) -> Iterator[ast.expr]:
    match place.node:
        case ast.BinOp(left, ast.Add(), right):
            yield ast.BinOp(left, ast.Sub(), right)
        case ast.BinOp(left, ast.Sub(), right):
            yield ast.BinOp(left, ast.Add(), right)
        case ast.UnaryOp(ast.USub(), operand):
            yield operand


def product(place: Place) -> Iterator[ast.expr]:
    match place.node:
        case ast.BinOp(left, ast.Mult(), right):
            yield ast.BinOp(left, ast.Div(), right)
        case ast.BinOp(left, ast.Div(), right):
            yield ast.BinOp(left, ast.Mult(), right)


def time_index(place: Place) -> Iterator[ast.expr]:
    """The same quantity at another time that the function uses; two time keywords swapped."""
    match place.node:
        case ast.Name(name, ast.Load()):
            yield from (ast.Name(other) for other in place.names if are_times(name, other))
        case ast.Attribute(value, name):
            owner = ast.unparse(value)
            attributes = [a for a in place.scope if isinstance(a, ast.Attribute)]
            others = dict.fromkeys(a.attr for a in attributes if ast.unparse(a.value) == owner)
            yield from (ast.Attribute(value, other) for other in others if are_times(name, other))
        case ast.Call(function, arguments, keywords):
            for a, b in itertools.combinations([k.arg or "" for k in keywords], 2):
                if are_times(a, b):
                    swapped = [ast.keyword({a: b, b: a}.get(k.arg, k.arg), k.value) for k in keywords]
                    yield ast.Call(function, arguments, swapped)


def key(place: Place) -> Iterator[ast.expr]:
    """Another key of the function, so that randomness is used twice."""
    match place.node:
        case ast.Name(name, ast.Load()) if name.startswith("key_"):
            others = [other for other in place.names if other.startswith("key_")]
            yield from (ast.Name(other) for other in others if other != name)


def exponent(place: Place) -> Iterator[ast.expr]:
    match place.node:
        case ast.BinOp(base, ast.Pow(), _):
            yield base
        case ast.Call(_, [argument]) if called(place.node) in ("sqrt", "square"):
            yield argument
        case ast.Call(function, [argument]) if called(place.node) in ("exp", "expm1"):
            yield ast.Call(function, [ast.BinOp(ast.Constant(2), ast.Mult(), argument)], [])
        case ast.BinOp(left, ast.Mult(), ast.Name() as right):
            yield ast.BinOp(left, ast.Mult(), ast.BinOp(right, ast.Pow(), ast.Constant(2)))


def gradient(place: Place) -> Iterator[ast.expr]:
    """An existing stop-gradient removed; one added around a network call or a returned float array."""
    node, parent = place.node, place.ancestors[-1]
    functions = [a for a in place.ancestors if isinstance(a, ast.FunctionDef)]
    networks = [name for name in place.names if name.endswith("_fn")]
    networks += [a.name for a in place.scope[1:] if isinstance(a, ast.FunctionDef)]
    returned = functions[-1].returns if isinstance(parent, ast.Return) else None
    is_network = isinstance(node, ast.Call) and (
        called(node) in networks or ast.unparse(node.func) in ("networks.student", "networks.teacher")
    )
    is_float = is_network or (returned and re.match(FLOATS, ast.unparse(returned)))
    if called(node) == "stop_gradient":
        yield node.args[0]
    elif is_float and called(parent) != "stop_gradient":
        yield call("stop_gradient", node)


def axis(place: Place) -> Iterator[ast.expr]:
    """The axis dropped, which changes the shape; a mean over the batch too, which preserves the shape."""
    match place.node:
        case ast.Call(function, arguments, keywords) if any(k.arg == "axis" for k in keywords):
            yield ast.Call(function, arguments, [k for k in keywords if k.arg != "axis"])
            yield call("jnp.full_like", place.node, call("jnp.mean", place.node))
        case ast.Call() if called(place.node) == "mean_square":
            yield call("jnp.full_like", place.node, call("jnp.mean", place.node))


def mean(place: Place) -> Iterator[ast.expr]:
    """A sum instead of a mean, and a mean instead of a sum."""
    other = {"mean": "sum", "sum": "mean"}.get(called(place.node))
    if other:
        yield renamed(place.node, other)


def constant(place: Place) -> Iterator[ast.expr]:
    """n + 1, and n / 2 for a float or 2 n for an integer (n - 1 for 0 and 1); the other truth value."""
    value = getattr(place.node, "value", None) if isinstance(place.node, ast.Constant) else None
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, int):
        yield from (ast.Constant(value + 1), ast.Constant(2 * value if value > 1 else value - 1))
    elif isinstance(value, float):
        yield from (ast.Constant(value + 1), ast.Constant(value / 2))


def choice(place: Place) -> Iterator[ast.expr]:
    """The opposite comparison, and / or, `where` branch or function; only one of the two bounds of `clip`."""
    match place.node:
        case ast.Compare(left, [operator], [right]):
            yield ast.Compare(left, [OPPOSITE_COMPARISONS[type(operator)]()], [right])
        case ast.BoolOp(operator, values):
            yield ast.BoolOp(ast.And() if isinstance(operator, ast.Or) else ast.Or(), values)
        case ast.Call(function, [condition, yes, no]) if called(place.node) == "where":
            yield ast.Call(function, [condition, no, yes], [])
        case ast.Call(_, [array, low, high]) if called(place.node) == "clip":
            yield from (call("jnp.minimum", array, high), call("jnp.maximum", array, low))
        case ast.Name(name) | ast.Attribute(_, name) if name in OPPOSITE_NAMES:
            yield renamed(place.node, OPPOSITE_NAMES[name])


KINDS: dict[str, Callable[[Place], Iterator[ast.expr]]] = {
    **{"sign": sign, "product": product, "time": time_index, "key": key, "exponent": exponent},
    **{"gradient": gradient, "axis": axis, "mean": mean, "constant": constant, "choice": choice},
}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """What is changed where; line numbers do not count in comparisons."""

    path: str
    function: str
    kind: str
    before: str
    after: str
    line: int = dataclasses.field(compare=False)
    source: str = dataclasses.field(compare=False, repr=False)

    def __str__(self):
        return f"{self.path}:{self.line} {self.function}, {self.kind}\n  - {self.before}\n  + {self.after}"


def mutants_of(path: str, source: str) -> list[Mutant]:
    """All mutants of one module, without duplicate sources."""
    tree = ast.parse(source)
    mutants = {ast.unparse(tree): None}
    for place in places(tree):
        context, line = place.context, place.node.lineno
        before = ast.unparse(context or place.node)
        for kind, mutate in KINDS.items():
            if kind == "gradient" and not path.startswith(DIFFERENTIATED):
                continue
            for node in mutate(place):
                place.put(node)
                after, text = ast.unparse(context or node), ast.unparse(tree)
                place.put(place.node)
                mutant = Mutant(path, place.function, kind, before, after, line, text + EPILOGUE)
                mutants.setdefault(text, mutant)
    return sorted(filter(None, mutants.values()), key=lambda mutant: mutant.line)
