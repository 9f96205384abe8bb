"""The reader returns what a state dict holds and refuses every pickle that would do anything else."""

import io
import pickle
import struct
from collections import OrderedDict

import numpy as np
import pytest

from mcm_jax.errors import InputError
from mcm_jax.evaluation import legacy_pth

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
    def __init__(self, key: str, count: int, kind: str = "FloatStorage"):
        self.reference = ("storage", _Global("torch", kind), key, "cpu", count, None)


class _Call:
    """Pickles as a call of `function` (a _Global) with `arguments`."""

    def __init__(self, function: _Global, *arguments):
        self.function, self.arguments = function, arguments


def _save_call(pickler, value):
    pickler.save(value.function)
    pickler.save(value.arguments)
    pickler.write(pickle.REDUCE)


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


NUMBERS = np.arange(12, dtype=np.float32)


def test_reads_offsets_strides_scalars_and_shared_storages():
    storage = _Storage("7", 12)
    counter = _Storage("8", 1, "LongStorage")
    state = OrderedDict(
        whole=tensor(storage, 0, (3, 4), (4, 1)),
        transposed=tensor(storage, 0, (4, 3), (1, 4)),
        tail=tensor(storage, 10, (2,), (1,)),
        steps=tensor(counter, 0, (), ()),
    )
    read = legacy_pth.read(legacy_file(state, {"7": NUMBERS, "8": np.array([2**40])}), name="x.pth")
    np.testing.assert_array_equal(read["whole"], NUMBERS.reshape(3, 4))
    np.testing.assert_array_equal(read["transposed"], NUMBERS.reshape(3, 4).T)
    np.testing.assert_array_equal(read["tail"], [10, 11])
    assert read["steps"] == 2**40 and read["steps"].shape == ()


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
        ("mcm_jax.evaluation.legacy_pth", "read", "x"),
    ],
)
def test_refuses_every_name_that_a_state_dict_does_not_need(tmp_path, module, name, argument):
    marker = tmp_path / "marker"
    call = _Call(_Global(module, name), argument.format(marker=marker))
    with pytest.raises(InputError, match=f"x.pth.*{module}.{name}"):
        legacy_pth.read(legacy_file(OrderedDict(evil=call), {}), name="x.pth")
    assert not marker.exists()


def test_the_evil_pickle_is_evil(tmp_path):
    """What the test above refuses would run in Python's own unpickler."""
    marker = tmp_path / "marker"
    content = legacy_file(_Call(_Global("os", "system"), f"touch {marker}"), {})
    file = io.BytesIO(content)
    for _ in range(4):
        pickle.load(file)
    assert marker.exists()


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
def test_refuses_a_tensor_outside_its_storage(offset, shape, strides):
    state = OrderedDict(w=tensor(_Storage("7", 12), offset, shape, strides))
    with pytest.raises(InputError, match="outside its storage"):
        legacy_pth.read(legacy_file(state, {"7": NUMBERS}), name="x.pth")


def test_refuses_what_is_cut_off_or_no_pth_at_all():
    content = legacy_file(OrderedDict(w=tensor(_Storage("7", 12), 0, (12,), (1,))), {"7": NUMBERS})
    legacy_pth.read(content, name="x.pth")
    for damaged in (content[:-1], content[:50], b"", b"PK\x03\x04 a zip", b"\x80\x02K\x01."):
        with pytest.raises(InputError, match="not a legacy"):
            legacy_pth.read(damaged, name="x.pth")
    with pytest.raises(InputError, match="cut off"):
        legacy_pth.read(content[:-4], name="x.pth")
