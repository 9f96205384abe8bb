"""The reader returns what a state dict holds and refuses every pickle that would do anything else."""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from mcm_jax.system import pth
from mcm_jax.system.errors import InputError
from tests.limits import refusal

MAGIC = 0x1950A86A20F9469CFC6C


class _Global:
    """Pickles as a reference to `module.name`, whether that exists here or not."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class _Writer(pickle._Pickler):
    """torch.save's legacy pickler in as many lines as the tests need, with storages by persistent id."""

    def persistent_id(self, value):
        return value.reference if isinstance(value, _Storage) else None

    def save_global_reference(self, value):
        self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())

    dispatch = dict(pickle._Pickler.dispatch) | {_Global: save_global_reference}


class _Storage:
    """The archive's references end before the view, which legacy files have."""

    view: tuple = (None,)

    def __init__(self, key: str, count: int, kind: str = "FloatStorage"):
        self._parts = ("storage", _Global("torch", kind), key, "cpu", count)

    @property
    def reference(self):
        return (*self._parts, *self.view)


class _Call:
    """Pickles as a call of `function` (a _Global) with `arguments`."""

    def __init__(self, function: _Global, *arguments):
        self.function, self.arguments = function, arguments


def _save_call(pickler, value):
    pickler.save(value.function)
    pickler.save(value.arguments)
    pickler.write(pickle.REDUCE)
    pickler.memoize(value)


_Writer.dispatch[_Call] = _save_call


def tensor(storage: _Storage, offset: int, shape: tuple, strides: tuple) -> _Call:
    rebuild = _Global("torch._utils", "_rebuild_tensor_v2")
    return _Call(rebuild, storage, offset, shape, strides, False, OrderedDict())


def legacy_file(state, storages: dict[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    for value in (MAGIC, 1001, {"little_endian": True}, state, list(storages)):
        _Writer(file, protocol=2).dump(value)
    for numbers in storages.values():
        file.write(struct.pack("<q", len(numbers)) + numbers.tobytes())
    return file.getvalue()


def archive(state, storages: dict[str, np.ndarray], *, byteorder: bytes = b"little") -> bytes:
    pickled, file = io.BytesIO(), io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Storage, "view", ())
        _Writer(pickled, protocol=2).dump(state)
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("archive/data.pkl", pickled.getvalue())
        made.writestr("archive/byteorder", byteorder)
        for key, numbers in storages.items():
            made.writestr(f"archive/data/{key}", numbers.tobytes())
        made.writestr("archive/version", "3\n")
    return file.getvalue()


LAYOUTS = pytest.mark.parametrize("layout", [legacy_file, archive])
NUMBERS = np.arange(12, dtype=np.float32)


@LAYOUTS
def test_reads_offsets_strides_scalars_and_shared_storages(layout):
    storage = _Storage("7", 12)
    counter = _Storage("8", 1, "LongStorage")
    state = OrderedDict(
        whole=tensor(storage, 0, (3, 4), (4, 1)),
        transposed=tensor(storage, 0, (4, 3), (1, 4)),
        tail=tensor(storage, 10, (2,), (1,)),
        steps=tensor(counter, 0, (), ()),
    )
    content = layout(state, {"7": NUMBERS, "8": np.array([2**40])})
    assert pth.recognises(content)
    read = pth.read(content, name="x.pth")
    np.testing.assert_array_equal(read["whole"], NUMBERS.reshape(3, 4))
    np.testing.assert_array_equal(read["transposed"], NUMBERS.reshape(3, 4).T)
    np.testing.assert_array_equal(read["tail"], [10, 11])
    assert read["steps"] == 2**40 and read["steps"].shape == ()


@LAYOUTS
@pytest.mark.parametrize(
    ("module", "name", "argument"),
    [
        ("os", "system", "touch {marker}"),
        ("posix", "system", "touch {marker}"),
        ("builtins", "eval", "open('{marker}', 'w')"),
        ("builtins", "getattr", "x"),
        ("subprocess", "getoutput", "touch {marker}"),
        ("torch", "load", "x"),
        ("torch._utils", "_rebuild_parameter", "x"),
        ("mcm_jax.system.pth", "read", "x"),
    ],
)
def test_refuses_every_name_that_a_state_dict_does_not_need(tmp_path, module, name, argument, layout):
    marker = tmp_path / "marker"
    call = _Call(_Global(module, name), argument.format(marker=marker))
    with pytest.raises(InputError, match=f"x.pth.*{module}.{name}"):
        pth.read(layout(OrderedDict(evil=call), {}), name="x.pth")
    assert not marker.exists()


def test_the_evil_pickle_is_evil(tmp_path):
    """What the test above refuses would run in Python's own unpickler."""
    marker = tmp_path / "marker"
    content = legacy_file(_Call(_Global("os", "system"), f"touch {marker}"), {})
    file = io.BytesIO(content)
    for _ in range(4):
        pickle.load(file)
    assert marker.exists()


@LAYOUTS
@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (13,), (1,)),
        (6, (7,), (1,)),
        (0, (3, 4), (5, 1)),
        (-1, (3,), (1,)),
        (4, (3,), (-1,)),
        (0, (10**9, 10**9), (0, 0)),
    ],
)
def test_refuses_a_tensor_outside_its_storage(offset, shape, strides, layout):
    state = OrderedDict(w=tensor(_Storage("7", 12), offset, shape, strides))
    with pytest.raises(InputError, match="outside its storage"):
        pth.read(layout(state, {"7": NUMBERS}), name="x.pth")


@LAYOUTS
def test_refuses_what_is_cut_off_or_no_pth_at_all(layout):
    state = OrderedDict(w=tensor(_Storage("7", 12), 0, (12,), (1,)))
    content = layout(state, {"7": NUMBERS})
    pth.read(content, name="x.pth")
    for damaged in (content[:-1], content[:50], b"", b"PK\x03\x04 a zip", b"\x80\x02K\x01."):
        with pytest.raises(InputError, match=r"not a \.pth"):
            pth.read(damaged, name="x.pth")
    with pytest.raises(InputError, match="truncated"):
        pth.read(layout(state, {"7": NUMBERS[:11]}), name="x.pth")


def test_refuses_numbers_in_another_order():
    content = archive(
        OrderedDict(w=tensor(_Storage("7", 12), 0, (12,), (1,))), {"7": NUMBERS}, byteorder=b"big"
    )
    with pytest.raises(InputError, match="big-endian"):
        pth.read(content, name="x.pth")


@pytest.mark.parametrize("content", [b"", b"\x80\x02K\x01.", pickle.dumps({"a": 1}), b"8 bytes {}"])
def test_knows_a_pth_by_its_beginning(content):
    assert not pth.recognises(content)


def test_a_zip_bomb_is_one_line():
    """The pickle inflates to gigabytes of instructions, or a storage to zeros."""
    state = OrderedDict(w=tensor(_Storage("7", 10**9), 0, (12,), (1,)))
    pickled = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Storage, "view", ())
        _Writer(pickled, protocol=2).dump(state)
    for members, message in (
        ({"a/data.pkl": b"\x80\x02](" + b"N" * 15 * 10**7}, "inflate to 150,000,004"),
        ({"a/data.pkl": b"\x80\x02](" + b"N" * 2 * 10**7}, "100,000 instructions"),
        ({"a/data.pkl": pickled.getvalue(), "a/data/7": bytes(15 * 10**7)}, "inflate to 150,000,"),
    ):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
            for name, content in members.items():
                made.writestr(name, content)
        found = refusal(lambda file=file: pth.read(file.getvalue(), name="x.pth"))
        assert found is not None and "x.pth: not a .pth" in found and message in found


@LAYOUTS
def test_storages_cannot_be_copied_any_number_of_times(layout):
    storage = _Storage("7", 10**6)
    state = OrderedDict((str(n), tensor(storage, 0, (10**6,), (1,))) for n in range(1000))
    content = layout(state, {"7": np.zeros(10**6, np.float32)})
    found = refusal(lambda: pth.read(content, name="x.pth"))
    assert found is not None and "10 times the memory of their storages" in found


@LAYOUTS
def test_names_and_keys_are_text(layout):
    """Nested tuples would take exponential time to hash or compare."""
    nested: tuple = ()
    for _ in range(60):
        nested = (nested, nested)
    key = _Storage("7", 12)
    key._parts = ("storage", _Global("torch", "FloatStorage"), nested, "cpu", 12)
    kind = _Storage("7", 12)
    kind._parts = (nested, _Global("torch", "FloatStorage"), "7", "cpu", 12)
    for state in ({"w": tensor(key, 0, (12,), (1,))}, {"w": tensor(kind, 0, (12,), (1,))}, {"w": nested}):
        found = refusal(lambda state=state: pth.read(layout(state, {}), name="x.pth"))
        assert found is None if state["w"] is nested else "damaged" in found or "views" in found
    content = legacy_file({"w": tensor(_Storage("7", 12), 0, (12,), (1,))}, {"7": NUMBERS})
    keys = pickle.dumps(["7"], 2)
    damaged = content.replace(keys, pickle.dumps([nested], 2))
    found = refusal(lambda: pth.read(damaged, name="x.pth"))
    assert damaged != content and found is not None and "not text" in found
