"""The Inception network: its sizes, its resize, and what sets it apart from later ones of its name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mcm_jax.evaluation import inception


@pytest.fixture(scope="module")
def abstract():
    return nnx.eval_shape(lambda: inception.Inception(rngs=nnx.Rngs(0)))


def test_layers_and_parameters(abstract):
    """94 convolutions; kernels and one bias a channel, and the classifier's 2048 x 1008 + 1008."""
    layers = [module for _, module in nnx.iter_modules(abstract) if isinstance(module, nnx.Conv)]
    assert len(layers) == 94
    channels = sum(layer.bias.shape[0] for layer in layers)
    kernels = sum(layer.kernel.size for layer in layers)
    # Those of torchvision's inception_v3 without its two classifiers, 21,785,568 parameters in all: kernels,
    # and a scale and a bias a channel.
    assert (channels, kernels) == (17_216, 21_751_136)
    assert abstract.fc.kernel.size + abstract.fc.bias.size == 2_065_392


def test_shapes(abstract):
    found = nnx.eval_shape(lambda m, x: m(x), abstract, jax.ShapeDtypeStruct((2, 9, 7, 3), jnp.uint8))
    assert (found.pool.shape, found.spatial.shape, found.logits.shape) == ((2, 2048), (2, 2023), (2, 1008))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    pool = nnx.eval_shape(lambda m, x: m.features(x), abstract, jax.ShapeDtypeStruct((2, 9, 7, 3), jnp.uint8))
    assert pool.shape == found.pool.shape


def test_work(abstract):
    """5.711 billion multiply-adds an image, as it is counted with padding, 4% of them; not here."""
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)
    lowered = nnx.jit(lambda m, x: m(x)).lower(abstract, images)
    assert 0.95 < lowered.cost_analysis()["flops"] / (2 * 5.711e9) < 0.98


@pytest.mark.parametrize("size", [1, 7, 32, 64, 127, 128, 256, 299, 333])
def test_resize_is_the_definition(size):
    """In float64, pixel by pixel; the weights differ by the rounding of float32 only."""
    expected = np.zeros((299, size))
    for j in range(299):
        source = j * size / 299
        low = int(source)
        expected[j, low] += 1 - (source - low)
        expected[j, min(low + 1, size - 1)] += source - low
    np.testing.assert_allclose(inception.resize_matrix(size), expected, atol=1e-7)


def test_the_grid_is_not_the_half_pixel_one():
    """At 64 its middle lies 1.84 output pixels away: (299 / 64 - 1) / 2 of them."""
    ramp = inception.resize_matrix(64) @ np.arange(64)
    half_pixel = (np.arange(299) + 0.5) * 64 / 299 - 0.5
    inside = slice(10, 280)
    np.testing.assert_allclose((ramp - half_pixel)[inside] * 299 / 64, 1.8359375, rtol=1e-4)


def test_an_image_of_the_networks_size_is_not_changed():
    x = jax.random.uniform(jax.random.key(0), (1, 299, 299, 1))
    np.testing.assert_array_equal(inception.resized(x), x)


def test_average_pools_do_not_count_padding_and_the_last_block_takes_maxima():
    """Through the pool branches alone, as products with one: 1 everywhere stays 1, a peak spreads whole."""
    ones = jnp.ones((1, 5, 5, 4))
    peak = jnp.zeros((1, 5, 5, 4)).at[:, 2, 2].set(9.0)

    def pooled(pool, x):
        layer = inception._conv("branch_pool", 4, 1)
        block = inception.Block(4, ((pool, (layer,)),), rngs=nnx.Rngs(0))
        block.branch_pool.kernel[...] = jnp.eye(4).reshape(1, 1, 4, 4)
        return np.asarray(block(x))[0, ..., 0]

    np.testing.assert_allclose(pooled("average", ones), np.ones((5, 5)), rtol=1e-6)
    expected = np.zeros((5, 5))
    expected[1:4, 1:4] = 1
    np.testing.assert_allclose(pooled("average", peak), expected, rtol=1e-6)
    np.testing.assert_allclose(pooled("max", peak), 9 * expected, rtol=1e-6)
    branches = {name: dict(block)["max"] for name, block in inception._BLOCKS.items() if "max" in dict(block)}
    assert list(branches) == ["mixed_7c"]


@pytest.mark.parametrize("shape", [(9, 9), (8, 8), (3, 7), (12, 5)])
def test_pools_are_the_librarys(shape):
    """Windows of both axes at once; sums of nine float32 in another order."""
    x = jax.random.normal(jax.random.key(0), (2, *shape, 3))
    expected = {
        "average": nnx.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False),
        "max": nnx.max_pool(x, (3, 3), (1, 1), "SAME"),
        "halving": nnx.max_pool(x, (3, 3), (2, 2), "VALID"),
    }
    for pool, y in expected.items():
        np.testing.assert_allclose(inception._pooled(x, pool), y, atol=1e-6)


def test_what_follows_an_average_is_one_pointwise_convolution():
    """Only then may it go first."""
    averaged = [layers for block in inception._BLOCKS.values() for pool, layers in block if pool == "average"]
    assert len(averaged) == 8 and all(len(layers) == 1 for layers in averaged)
    assert {layer.kernel for layers in averaged for layer in layers} == {(1, 1)}


def test_the_convolution_before_the_average_is_the_one_behind_it():
    x = jax.random.normal(jax.random.key(0), (2, 5, 6, 4))
    layer = inception._conv("branch_pool", 3, 1)
    block = inception.Block(4, (("average", (layer,)),), rngs=nnx.Rngs(0))
    block.branch_pool.bias[...] = jnp.array([-0.1, 0.0, 0.2])
    expected = jax.nn.relu(block.branch_pool(inception._pooled(x, "average")))
    np.testing.assert_allclose(block(x), expected, atol=1e-5)


def test_examples_do_not_meet(abstract):
    """Row i is that of image i alone, whatever stands beside it; float32 sums in another order elsewhere."""
    model = inception.Inception(rngs=nnx.Rngs(0))
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    run = nnx.jit(lambda m, x: m(x))
    both, alone = run(model, images), run(model, images[1:])
    for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(alone), strict=True):
        assert np.any(np.asarray(b))
        np.testing.assert_allclose(a[1:], b, rtol=1e-4, atol=1e-6)
