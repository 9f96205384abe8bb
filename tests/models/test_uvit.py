import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mcm_jax.models import attention, blocks, embeddings, uvit
from mcm_jax.models.conditions import Classes
from mcm_jax.models.network import Network
from mcm_jax.models.placement import Placement
from mcm_jax.models.uvit import UViTSettings

UVIT = UViTSettings(
    kinds=("resnet", "transformer", "transformer"),
    widths=(8, 16, 16),
    blocks=(1, 1, 3),
    dropouts=(0.0, 0.0, 0.5),
    embedding_width=16,
    head_width=8,
    mlp_factor=2,
    saved=(),
)
TWO_STAGES = dataclasses.replace(
    UVIT, kinds=("resnet", "transformer"), widths=(8, 16), blocks=(1, 3), dropouts=(0.0, 0.5)
)


def network_of(settings=UVIT, **placement):
    return Network(settings, (8, 8, 3), condition=Classes(5), **placement)


Z = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 3)), jnp.float32)
LOGSNR = jnp.array([-4.0, 0.0, 2.0, 9.0])
LABEL = jnp.array([0, 1, 4, 5])


@pytest.fixture(scope="module")
def fresh():
    return jax.device_get(jax.jit(network_of().init)(jax.random.key(1)))


def moved(params):
    """Away from the initial zeros, so that every part of the network matters.

    In NumPy: JAX would compile each operation for each shape.
    """
    draw = np.random.default_rng(2)
    return jax.tree.map(lambda a: a + 0.1 * draw.normal(size=a.shape).astype(np.float32), params)


@pytest.fixture(scope="module")
def params(fresh):
    return moved(fresh)


@pytest.fixture(scope="module")
def apply():
    function = jax.jit(network_of().apply)
    return lambda *arguments: jax.device_get(function(*arguments))


def test_a_fresh_network_predicts_nothing(fresh, apply):
    """The last convolution starts at zero: v_hat = 0, so x_hat = alpha_t z_t."""
    np.testing.assert_array_equal(apply(fresh, Z, LOGSNR, LABEL, None), 0)


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_the_scale_of_a_stage_matters_only_where_nothing_normalises_it(norm):
    """Both norms undo a scaling of all of their inputs, up to the 1e-6 beside the variance."""
    network = network_of(dataclasses.replace(TWO_STAGES, resnet_norm=norm))
    params = moved(jax.device_get(jax.jit(network.init)(jax.random.key(1))))
    scaled = jax.tree.map(lambda a: a, params)
    block = params["down_stages"][0]["blocks"][0]["conv_1"]
    scaled["down_stages"][0]["blocks"][0]["conv_1"] = jax.tree.map(lambda a: 7 * a, block)
    # Seven times the first convolution's result, which the second norm divides out.
    apply = jax.jit(network.apply)
    found, expected = (apply(p, Z, LOGSNR, LABEL, None) for p in (scaled, params))
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert np.abs(expected).max() > 0.1


def test_parameters_are_float32():
    for dtype in ("float32", "bfloat16"):
        network = network_of(dataclasses.replace(UVIT, dtype=dtype))
        assert network.abstract_params == jax.eval_shape(network.init, jax.random.key(0))
        leaves = jax.tree.leaves(network.abstract_params)
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


def test_everything_it_is_told_matters(params, apply):
    v = apply(params, Z, LOGSNR, LABEL, None)
    for changed in (
        (Z + 0.1, LOGSNR, LABEL),
        (Z, LOGSNR + 0.3, LABEL),
        (Z, LOGSNR, (LABEL + 1) % 6),
    ):
        other = apply(params, *changed, None)
        assert np.all(np.max(np.abs(v - other), axis=(1, 2, 3)) > 1e-4)


def test_every_parameter_has_a_gradient(params):
    def loss(p):
        v = network_of().apply(p, Z, LOGSNR, LABEL, None)
        return jnp.sum(v * jnp.sin(jnp.arange(v.size).reshape(v.shape)))

    gradient = jax.device_get(jax.jit(jax.grad(loss))(params))
    flat = jax.tree_util.tree_flatten_with_path(gradient)[0]
    dead = [jax.tree_util.keystr(path) for path, g in flat if not np.any(g != 0)]
    assert dead == []


def test_examples_do_not_influence_each_other(params, apply):
    whole = apply(params, Z, LOGSNR, LABEL, None)
    disturbed = apply(params, Z.at[1:].add(1.0), LOGSNR.at[1:].add(1.0), LABEL.at[1:].set(3), None)
    np.testing.assert_array_equal(whole[0], disturbed[0])
    assert not np.allclose(whole[1], disturbed[1])


def test_dropout_is_a_function_of_its_key(params, apply):
    one, same, other = (apply(params, Z, LOGSNR, LABEL, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other)
    assert not np.allclose(one, apply(params, Z, LOGSNR, LABEL, None))


def test_scanned_blocks_differ(fresh, params, apply):
    """Each layer of a scanned stage has parameters, and dropout, of its own."""
    kernel = fresh["middle"]["blocks"]["mlp_in"]["kernel"]
    assert kernel.shape == (3, 16, 32)
    assert not np.allclose(kernel[0], kernel[1])
    reversed_layers = {**params, "middle": {**params["middle"]}}
    reversed_layers["middle"]["blocks"] = jax.tree.map(lambda a: a[::-1], params["middle"]["blocks"])
    v, w = (apply(p, Z, LOGSNR, LABEL, None) for p in (params, reversed_layers))
    assert not np.allclose(v, w)


def value_and_grad(settings, params):
    def loss(p):
        return jnp.mean(network_of(settings).apply(p, Z, LOGSNR, LABEL, jax.random.key(0)) ** 2)

    return jax.device_get(jax.jit(jax.value_and_grad(loss))(params))


@pytest.fixture(scope="module")
def two_stages():
    """Parameters."""
    return moved(jax.device_get(jax.jit(network_of(TWO_STAGES).init)(jax.random.key(1))))


@pytest.fixture(scope="module")
def plain(two_stages):
    return value_and_grad(TWO_STAGES, two_stages)


@pytest.mark.parametrize(
    "changed",
    [
        {"remat": "full"},
        {"remat": "dots"},
        {"remat": "names", "saved": ("conv_1", "attention")},
        {"unroll": False},
        {"remat": "full", "unroll": False},
    ],
)
def test_how_the_gradient_is_computed_changes_nothing(changed, two_stages, plain):
    """Dropout's draws included; the same operations in another order, so that only rounding differs."""
    value, gradient = value_and_grad(dataclasses.replace(TWO_STAGES, **changed), two_stages)
    np.testing.assert_allclose(value, plain[0], rtol=1e-5)
    # The gradient of the keys' bias is zero, and what there is of it rounding: a scale for all leaves.
    scale = max(float(np.abs(b).max()) for b in jax.tree.leaves(plain[1]))
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(plain[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * scale)


def test_recomputing_keeps_fewer_values(two_stages):
    """What the backward pass is handed: all of every block, its matrix products, or only its input.

    Each name adds the values that it stands for.
    """

    def kept(remat, *saved):
        settings = dataclasses.replace(TWO_STAGES, remat=remat, saved=saved)
        apply = lambda p: network_of(settings).apply(p, Z, LOGSNR, LABEL, None)  # noqa: E731
        _, pullback = jax.eval_shape(lambda p: jax.vjp(apply, p), two_stages)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    assert kept("full") == kept("names") < kept("dots") < kept("none")
    # Values of an example in all feature maps between blocks: two ResNets and the middle's transformers.
    resnets, transformers = 2 * 8 * 8 * 8, 3 * 4 * 4 * 16
    sizes = {
        "conv_1": resnets,
        "mlp_in": UVIT.mlp_factor * transformers,
        "qkv": 3 * transformers,
        "attention": transformers,
    }
    for name, size in sizes.items():
        # But for the bias of the product that gave it, which need not be handed on any more.
        assert kept("names", name) - kept("full") == pytest.approx(len(Z) * size, rel=0.03)


def test_bfloat16_is_near_float32_and_returns_float32(params, apply):
    low = jax.jit(network_of(dataclasses.replace(UVIT, dtype="bfloat16")).apply)
    v, v_low = apply(params, Z, LOGSNR, LABEL, None), low(params, Z, LOGSNR, LABEL, None)
    assert v_low.dtype == jnp.float32
    # bfloat16 has 8 bits: 0.4% a product, averaged over a dozen layers.
    assert np.sqrt(np.mean((v - v_low) ** 2) / np.mean(np.square(v))) < 0.03


@pytest.mark.parametrize(("scale", "end"), [("arctan", 1000), ("logsnr", 1000), ("smooth", 10)])
def test_noise_position_spans_its_range(scale, end):
    position = embeddings.noise_position(jnp.linspace(15, -15, 50), scale=scale)
    np.testing.assert_allclose(position[jnp.array([0, -1])], [0, end], atol=4e-4 * end)
    assert jnp.all(jnp.diff(position) > 0)


@pytest.fixture(scope="module")
def projection():
    linear = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
    linear.bias[...] = jnp.arange(3.0)
    return linear


def test_down_is_a_pool_and_a_projection(projection):
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 6, 4, 5)), np.float64)
    pooled = x.reshape(2, 3, 2, 2, 2, 5).mean((2, 4))
    expected = pooled @ np.asarray(projection.kernel[...], np.float64) + np.arange(3)
    # Twenty products of order one in float32.
    np.testing.assert_allclose(uvit._pooled(projection, jnp.asarray(x, jnp.float32)), expected, atol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_up_doubles_every_pixel_exactly(dtype):
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5), dtype)
    expected = np.asarray(x, np.float32).repeat(2, 1).repeat(2, 2)
    np.testing.assert_array_equal(np.asarray(blocks.doubled(x), np.float32), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounded_weights_give_the_same(dtype, params):
    """Those of layers that multiply in bfloat16 are halved, all others untouched."""
    network = network_of(dataclasses.replace(UVIT, dtype=dtype))
    rounded = jax.jit(network.rounded)(params)
    apply = jax.jit(network.apply)
    value, expected = (apply(p, Z, LOGSNR, LABEL, None) for p in (rounded, params))
    np.testing.assert_array_equal(value, expected)
    kinds = {jnp.dtype("float32"), jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(rounded)} == kinds
    assert rounded["middle"]["blocks"]["mlp_in"]["kernel"].dtype == dtype
    for path in (("conv_out", "kernel"), ("conditioning", "dense_1", "kernel"), ("norm_out", "scale")):
        leaf, same = rounded, params
        for name in path:
            leaf, same = leaf[name], same[name]
        np.testing.assert_array_equal(leaf, same)


def test_a_placement_sees_every_block_and_its_attention(params, apply):
    """`constrain` around every block, `attend` in all three transformer stages."""
    seen = collections.Counter()

    def constrain(h):
        seen["map"] += 1
        return h

    def attend(q, k, v, mask):
        assert mask is None  # There is no text.
        seen["attention"] += 1
        return attention.einsum(q, k, v)

    placed = network_of(placement=Placement(constrain, attend))
    value = jax.jit(placed.apply)(params, Z, LOGSNR, LABEL, None)
    np.testing.assert_allclose(value, apply(params, Z, LOGSNR, LABEL, None), atol=1e-5)
    # Of each of the five stages' blocks (a scan traces its body once), of the three position embeddings, and
    # of the embedding, the input and both ways up and down.
    assert seen == {"map": 5 + 3 + 6, "attention": 3}
