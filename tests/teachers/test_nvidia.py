"""The reader returns the tensors of a network, and never runs code from its file."""

import io
import pickle
from collections import OrderedDict

import numpy as np
import pytest

from mcm_jax.system.errors import InputError
from mcm_jax.teachers import nvidia
from tests.system.test_pth import _Call, _Global, _Storage, _Writer, legacy_file
from tests.teachers import golden

NUMBERS = np.arange(6, dtype=np.float16)


def storage(count: int | None = None, *, numbers=NUMBERS) -> _Call:
    """A storage: an old torch file inside a byte string."""
    content = legacy_file(_Storage("0", count or len(numbers), "HalfStorage"), {"0": numbers})
    return _Call(_Global("torch.storage", "_load_from_bytes"), content)


def parameter(shape=(2, 3), strides=(3, 1), *, of=None) -> _Call:
    rebuild = _Global("torch._utils", "_rebuild_tensor_v2")
    tensor = _Call(rebuild, of or storage(), 0, shape, strides, False, OrderedDict())
    return _Call(_Global("torch._utils", "_rebuild_parameter"), tensor, True, OrderedDict())


def module(parameters=None, modules=None, **attributes) -> _Call:
    state = {"_parameters": parameters or {}, "_buffers": {"absent": None}, "_modules": modules or {}}
    meta = {
        "type": "class",
        "module_src": "raise SystemExit",
        "class_name": "Block",
        "state": state | attributes,
    }
    return _Call(_Global("torch_utils.persistence", "_reconstruct_persistent_obj"), meta)


def content(network, **others) -> bytes:
    file = io.BytesIO()
    _Writer(file, protocol=4).dump({"ema": network, **others})
    return file.getvalue()


def network() -> bytes:
    """A module with a part."""
    return content(module({"w": parameter()}, {"enc": module({"b": parameter((6,), (1,))}, num_heads=2)}))


def refused(network, reason: str) -> None:
    with pytest.raises(InputError, match=rf"x\.pkl: not a network of EDM or EDM2 \(.*{reason}"):
        nvidia.read(content(network), name="x.pkl")


def test_reads_parameters_and_numbers_by_path():
    tensors, numbers = nvidia.read(network(), name="x")
    assert list(tensors) == ["w", "enc.b"]
    np.testing.assert_array_equal(tensors["w"], NUMBERS.reshape(2, 3))
    assert tensors["enc.b"].dtype == np.float16
    assert numbers == {"enc.num_heads": 2}


@pytest.mark.parametrize("name", ["edm2-img64", "edm-imagenet64-adm"])
def test_reads_the_files_of_the_authors(name):
    """Names and values: each tensor follows from its name and shape."""
    tensors, _ = nvidia.read(golden.file(name), name=name)
    assert len(tensors) == {"edm2-img64": 159, "edm-imagenet64-adm": 305}[name]
    edm2 = name == "edm2-img64"
    for key, tensor in tensors.items():
        # EDM's narrow network is rounded to 8 significant bits, as its file then compresses.
        expected = golden.formula(key, tensor.shape, edm2=edm2)
        np.testing.assert_allclose(np.float32(tensor), expected, rtol=0 if edm2 else 2**-8, err_msg=key)


@pytest.mark.parametrize(("source", "name"), [("os", "system"), ("builtins", "eval"), ("torch", "load")])
def test_refuses_every_other_name(source, name, tmp_path):
    evil = _Call(_Global(source, name), f"touch {tmp_path}/marker")
    refused(module({"w": evil}), f"{source}.{name}")
    assert not list(tmp_path.iterdir())
    file = pickle.dumps({"ema": module}, protocol=4)
    with pytest.raises(InputError, match="not a network"):
        nvidia.read(file, name="x.pkl")


def test_refuses_damaged_tensors():
    refused(module({"w": parameter((7,), (1,))}), "outside its storage")
    refused(module({"w": parameter((2,), (-1,))}), "outside its storage")
    refused(module({"w": parameter(("2",), (1,))}), "description of a tensor")
    refused(module({"w": storage(5)}), "truncated")
    refused(module({"w": 1.0}), "w is not a tensor")
    refused(module(modules={"enc": {}}), "enc. is not a module")
    refused({}, "ema is not a module")


def test_refuses_more_modules_or_bytes_than_its_file_may_have():
    shared = module()
    for _ in range(25):
        shared = module(modules={"a": shared})
    refused(shared, "levels")
    part = module()
    for _ in range(15):  # 2^15 modules by reference.
        part = module(modules={"a": part, "b": part})
    refused(part, "modules")
    many = {f"part{n}": module() for n in range(20)}
    refused(module(modules={"a" * 600: module(modules=many)}), "a path of over 500 characters")
    numbers = np.zeros(10_000, np.float16)
    whole = module({"w": parameter((10_000,), (1,), of=storage(numbers=numbers))})
    refused(module(modules={f"part{n}": whole for n in range(20)}), "more than 10 times the memory")
