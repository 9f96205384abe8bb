"""The constants are those that TensorFlow reads, and nothing that a graph declares is allocated."""

import numpy as np
import pytest
import tensorflow as tf

from mcm_jax.evaluation import frozen_graph

ARRAYS = {
    "kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "vector": np.array([1.5, -2.5], np.float32),
    "one": np.array([2.5], np.float32),
    "point": np.array(3.5, np.float32),
}


def graph(tensors):
    made = tf.compat.v1.GraphDef()
    for name, tensor in tensors.items():
        made.node.add(name=name, op="Const").attr["value"].tensor.CopyFrom(tensor)
    made.node.add(name="other", op="AvgPool", input=["kernel"]).attr["T"].type = 1
    return made.SerializeToString()


def proto(shape, numbers, dtype=1):
    made = tf.make_tensor_proto(np.zeros(2, np.float32))
    made.tensor_content, made.dtype = b"", dtype
    made.float_val.extend(numbers)
    made.tensor_shape.Clear()
    for size in shape:
        made.tensor_shape.dim.add(size=size)
    return made


def test_constants_as_tensorflow_reads_them():
    tensors = {name: tf.make_tensor_proto(array) for name, array in ARRAYS.items()}
    tensors |= {"packed": proto((3,), [1, 2, 3]), "repeated": proto((4, 2), [7]), "empty": proto((0,), [])}
    found = frozen_graph.constants(graph({**tensors, "integers": tf.make_tensor_proto([1, 2])}))
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name].array(), tf.make_ndarray(tensor))


def test_numbers_that_are_not_packed():
    """proto2 writes each repeated number with its own tag."""
    tensor = b"\x08\x01\x12\x04\x12\x02\x08\x02" + b"".join(b"\x2d" + np.float32(n).tobytes() for n in (5, 6))
    value = b"\x42" + bytes([len(tensor)]) + tensor
    attribute = b"\x0a\x05value\x12" + bytes([len(value)]) + value
    node = b"\x0a\x01w\x12\x05Const\x2a" + bytes([len(attribute)]) + attribute
    content = b"\x0a" + bytes([len(node)]) + node
    expected = tf.compat.v1.GraphDef.FromString(content).node[0].attr["value"].tensor
    found = frozen_graph.constants(content)["w"].array()
    np.testing.assert_array_equal(found, tf.make_ndarray(expected))
    np.testing.assert_array_equal(found, [5, 6])


def test_a_repeated_number_takes_no_memory():
    found = frozen_graph.constants(graph({"w": proto((10**6, 10**6), [1])}))["w"].array()
    assert found.shape == (10**6, 10**6) and found.strides == (0, 0)


@pytest.mark.parametrize("shape", [(2, 3), (2**62, 4), (10**6, 10**6)])
def test_a_shape_of_other_numbers(shape):
    constant = frozen_graph.constants(graph({"w": proto(shape, [1, 2])}))["w"]
    with pytest.raises(ValueError, match=r"reshape|size"):
        constant.array()
