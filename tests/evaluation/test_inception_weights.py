"""Every form of the same weights gives the same network and the same hash; nothing else is taken for it."""

import hashlib
import io
import pickle
import re
from collections import OrderedDict

import jax
import numpy as np
import pytest
from flax import nnx

from mcm_jax.evaluation import inception_weights
from mcm_jax.system.errors import InputError
from tests.limits import refusal
from tests.system import test_pth


def capitalised(name):
    return name.replace("mixed", "Mixed").replace("conv2d", "Conv2d")


def random_layers():
    """Convolutions and batch norms as training leaves them, by our names; small numbers of every kind."""
    draw = np.random.default_rng(0)
    result = {}
    for name, shape in inception_weights._shapes().items():
        layer, _, part = name.rpartition(".")
        if layer == "fc":
            result.setdefault(layer, {})[part] = draw.normal(size=shape).astype(np.float32)
        elif part == "kernel":
            result[layer] = {
                "kernel": draw.normal(size=shape, scale=0.1).astype(np.float32),
                "scale": draw.uniform(0.5, 2, shape[-1]).astype(np.float32),
                "bias": draw.normal(size=shape[-1]).astype(np.float32),
                "mean": draw.normal(size=shape[-1]).astype(np.float32),
                "variance": draw.uniform(0.1, 3, shape[-1]).astype(np.float32),
            }
    return result


@pytest.fixture(scope="module")
def layers():
    return random_layers()


def as_pth(layers, layout):
    state, storages = OrderedDict(), {}

    def add(name, array):
        array = np.ascontiguousarray(array)
        key = str(len(storages))
        storages[key] = array.ravel()
        strides = tuple(stride // array.itemsize for stride in array.strides)
        state[name] = test_pth.tensor(test_pth._Storage(key, array.size), 0, array.shape, strides)

    for name, layer in layers.items():
        if name == "fc":
            add("fc.weight", layer["kernel"].T)
            add("fc.bias", layer["bias"])
            continue
        add(f"{capitalised(name)}.conv.weight", layer["kernel"].transpose(3, 2, 0, 1))
        for ours, theirs in (("scale", "weight"), ("bias", "bias")):
            add(f"{capitalised(name)}.bn.{theirs}", layer[ours])
        add(f"{capitalised(name)}.bn.running_mean", layer["mean"])
        add(f"{capitalised(name)}.bn.running_var", layer["variance"])
    return layout(state, storages)


def as_pickle(layers, protocol=4):
    tree = {}
    for name, layer in layers.items():
        part = tree
        for word in capitalised(name).split("."):
            part = part.setdefault(word, {})
        if name == "fc":
            part.update(layer)
            continue
        part["conv"] = {"kernel": layer["kernel"]}
        part["bn"] = {
            "scale": layer["scale"], "bias": layer["bias"], "mean": layer["mean"], "var": layer["variance"]
        }  # fmt: skip
    return pickle.dumps(tree, protocol=protocol)


# TensorFlow's scopes as the released graph has them, one of every kind of place.
SCOPES = {
    "conv2d_1a_3x3": "conv",
    "conv2d_4a_3x3": "conv_4",
    "mixed_5b.branch1x1": "mixed/conv",
    "mixed_5b.branch5x5_1": "mixed/tower/conv",
    "mixed_5c.branch5x5_2": "mixed_1/tower/conv_1",
    "mixed_5d.branch3x3dbl_3": "mixed_2/tower_1/conv_2",
    "mixed_5b.branch_pool": "mixed/tower_2/conv",
    "mixed_6a.branch3x3": "mixed_3/conv",
    "mixed_6a.branch3x3dbl_1": "mixed_3/tower/conv",
    "mixed_6a.branch3x3dbl_3": "mixed_3/tower/conv_2",
    "mixed_6b.branch1x1": "mixed_4/conv",
    "mixed_6b.branch7x7_3": "mixed_4/tower/conv_2",
    "mixed_6e.branch7x7dbl_5": "mixed_7/tower_1/conv_4",
    "mixed_6e.branch_pool": "mixed_7/tower_2/conv",
    "mixed_7a.branch3x3_1": "mixed_8/tower/conv",
    "mixed_7a.branch3x3_2": "mixed_8/tower/conv_1",
    "mixed_7a.branch7x7x3_4": "mixed_8/tower_1/conv_3",
    "mixed_7b.branch1x1": "mixed_9/conv",
    "mixed_7b.branch3x3_1": "mixed_9/tower/conv",
    "mixed_7b.branch3x3_2a": "mixed_9/tower/mixed/conv",
    "mixed_7b.branch3x3_2b": "mixed_9/tower/mixed/conv_1",
    "mixed_7c.branch3x3dbl_2": "mixed_10/tower_1/conv_1",
    "mixed_7c.branch3x3dbl_3a": "mixed_10/tower_1/mixed/conv",
    "mixed_7c.branch3x3dbl_3b": "mixed_10/tower_1/mixed/conv_1",
    "mixed_7c.branch_pool": "mixed_10/tower_2/conv",
}


@pytest.mark.parametrize("name", SCOPES)
def test_scopes_of_the_released_graph(name):
    assert inception_weights._scope(name) == SCOPES[name]


def test_no_two_layers_have_one_scope(layers):
    names = [name for name in layers if name != "fc"]
    assert len({inception_weights._scope(name) for name in names}) == len(names) == 94


def as_graph(layers):
    import tensorflow as tf

    graph = tf.compat.v1.GraphDef()

    def add(name, array):
        node = graph.node.add(name=name, op="Const")
        node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(array))

    for name, layer in layers.items():
        if name == "fc":
            add("softmax/weights", layer["kernel"])
            add("softmax/biases", layer["bias"])
            continue
        scope = inception_weights._scope(name)
        add(f"{scope}/conv2d_params", layer["kernel"])
        names = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "variance"}
        for theirs, ours in names.items():
            add(f"{scope}/batchnorm/{theirs}", layer[ours])
    graph.node.add(name="pool_3", op="AvgPool")
    return graph.SerializeToString()


FORMS = {
    "legacy .pth": lambda layers: as_pth(layers, test_pth.legacy_file),
    ".pth": lambda layers: as_pth(layers, test_pth.archive),
    "graph": as_graph,
    "pickle": as_pickle,
    "old pickle": lambda layers: as_pickle(layers, protocol=2),
    "new pickle": lambda layers: as_pickle(layers, protocol=5),
}


@pytest.fixture(scope="module")
def expected(layers):
    """Folded in float64, written out: (x * W - mean) / sqrt(variance + 1e-3) scale + bias."""
    result = {}
    for name, layer in layers.items():
        if name == "fc":
            result |= {"fc.kernel": layer["kernel"], "fc.bias": layer["bias"]}
            continue
        wide = {key: value.astype(np.float64) for key, value in layer.items()}
        deviation = (wide["variance"] + 0.001) ** 0.5
        result[f"{name}.kernel"] = wide["kernel"] * (wide["scale"] / deviation)
        result[f"{name}.bias"] = wide["bias"] - wide["scale"] * wide["mean"] / deviation
    return result


@pytest.fixture(scope="module")
def loaded(layers, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "some.file"
    path.write_bytes(as_pth(layers, test_pth.legacy_file))
    return inception_weights.load(path)


def test_folded(loaded, expected):
    assert set(loaded.params) == set(expected)
    for name, value in expected.items():
        assert loaded.params[name].dtype == np.float32
        np.testing.assert_allclose(loaded.params[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_known_by_its_content(form, layers, loaded, tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(FORMS[form](layers))
    assert inception_weights.load(path).sha256 == loaded.sha256


def test_written_and_read_again(loaded, tmp_path):
    path = tmp_path / "inception.safetensors"
    inception_weights.write(loaded, path)
    again = inception_weights.load(path)
    assert again.sha256 == loaded.sha256
    for name, value in loaded.params.items():
        np.testing.assert_array_equal(again.params[name], value)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="is damaged: its weights have changed since it was written"):
        inception_weights.load(path)
    path.write_bytes(content[:-4])
    with pytest.raises(InputError, match="or damaged"):
        inception_weights.load(path)


def test_the_network_has_them(loaded):
    network = loaded.network()
    tree = nnx.to_pure_dict(network.params)
    np.testing.assert_array_equal(
        tree["mixed_7c"]["branch_pool"]["bias"], loaded.params["mixed_7c.branch_pool.bias"]
    )
    np.testing.assert_array_equal(tree["fc"]["kernel"], loaded.params["fc.kernel"])
    # Every parameter is an array: none was left abstract.
    assert {type(leaf) for leaf in jax.tree.leaves(network.params)} == {np.ndarray}
    found = jax.eval_shape(network.apply, network.params, jax.ShapeDtypeStruct((2, 9, 7, 3), "uint8"))
    assert {name: rows.shape for name, rows in found.items()} == {
        name: (2, size) for name, size in network.dimensions.items()
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not the Inception network"),
        (b"not a network at all", "holds no Inception weights"),
        (b"\xff\xd8\xff\xe0 a picture", "holds no Inception weights"),
        (b"PK\x03\x04 a zip", r"not a \.pth"),
        (pickle.dumps({"Conv2d_1a_3x3": {}}), "is not the Inception network"),
        (pickle.dumps(print), "refers to builtins.print"),
        (pickle.dumps([1.0, None]), "is not the Inception network"),
    ],
)
def test_what_is_no_network(content, message, tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        inception_weights.load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_weights_of_another_shape_or_not_finite(layers, tmp_path):
    path = tmp_path / "weights"
    classes = layers | {
        "fc": {"kernel": np.zeros((2048, 1000), np.float32), "bias": np.zeros(1000, np.float32)}
    }
    path.write_bytes(as_pickle(classes))
    with pytest.raises(InputError, match=r"fc\.bias is \(1000,\) and should be \(1008,\)"):
        inception_weights.load(path)
    damaged = dict(layers["mixed_6a.branch3x3"])
    damaged["bias"] = np.full_like(damaged["bias"], np.nan)
    path.write_bytes(as_pickle(layers | {"mixed_6a.branch3x3": damaged}))
    with pytest.raises(InputError, match=r"is damaged: mixed_6a\.branch3x3\.bias is not finite"):
        inception_weights.load(path)


def test_a_file_that_is_not_what_its_name_says(layers, tmp_path):
    content = as_pth(layers, test_pth.archive)
    good = tmp_path / f"inception-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    good.write_bytes(content)
    inception_weights.load(good)
    bad = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    bad.write_bytes(content)
    with pytest.raises(InputError, match=r"is damaged: its sha256 begins with .*, not with 6726825d"):
        inception_weights.load(bad)


def test_without_a_file_it_says_where_to_get_one(tmp_path):
    with pytest.raises(
        InputError, match=r"get pt_inception-2015-12-05-6726825d\.pth from .*prepare --inception"
    ):
        inception_weights.load(tmp_path / "none")


def test_the_evil_pickle_is_refused(tmp_path):
    marker, file = tmp_path / "marker", io.BytesIO()

    class Evil:
        def __reduce__(self):
            import os

            return os.system, (f"touch {marker}",)

    pickle.Pickler(file).dump(Evil())
    path = tmp_path / "weights"
    path.write_bytes(file.getvalue())
    with pytest.raises(InputError, match=r"refers to posix\.system"):
        inception_weights.load(path)
    assert not marker.exists()
    pickle.loads(file.getvalue())
    assert marker.exists()


def outer_product():
    """A convolution whose product with its batch norm has 10^12 numbers."""
    norm = {name: np.ones(10**6, np.float32) for name in ("scale", "bias", "mean", "var")}
    layer = {"conv": {"kernel": np.ones((10**6, 1), np.float32)}, "bn": norm}
    return pickle.dumps({"Conv2d_1a_3x3": layer})


def repeating_graph():
    """Each constant repeats one number to a shape of a terabyte."""
    import tensorflow as tf

    graph = tf.compat.v1.GraphDef()
    for name in ("conv2d_params", "batchnorm/gamma", "batchnorm/beta"):
        tensor = graph.node.add(name=f"conv/{name}", op="Const").attr["value"].tensor
        tensor.dtype = 1
        tensor.float_val.append(1.0)
        tensor.tensor_shape.dim.add(size=10**12)
    for name in ("moving_mean", "moving_variance"):
        graph.node.add(name=f"conv/batchnorm/{name}", op="Const").CopyFrom(graph.node[-1])
        graph.node[-1].name = f"conv/batchnorm/{name}"
    return graph.SerializeToString()


BOMBS = {
    "an outer product": (outer_product, r"conv2d_1a_3x3\.bias is \(1000000,\) and should be"),
    "repeated numbers": (repeating_graph, "is not the Inception network"),
    "a graph of empty nodes": (lambda: b"\x0a\x00" * 10**7, "200,000 fields"),
    "a deep header": (lambda: (10**5).to_bytes(8, "little") + b'{"a":' + b"[" * 10**5, "levels"),
    "a long header": (lambda: (10**8).to_bytes(8, "little") + b"{" + b" " * 10**8, "a header of 100,000,000"),
    "a header of terabytes": (lambda: (10**13).to_bytes(8, "little") + b"{", "a header of 10,000,000"),
    "metadata that are a list": (
        lambda: (19).to_bytes(8, "little") + b'{"__metadata__":[]}',
        "in .safetensors",
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_one_line(bomb, tmp_path):
    make, message = BOMBS[bomb]
    path = tmp_path / "weights"
    path.write_bytes(make())
    inception_weights._shapes()  # Takes a second at first.
    found = refusal(lambda: inception_weights.load(path))
    assert found is not None and str(path) in found and re.search(message, found), found
