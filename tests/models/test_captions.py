"""UViT with captions, and on patches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from jax.flatten_util import ravel_pytree

from mcm_jax.diffusion import conditions
from mcm_jax.models.conditions import Caption, Captions, Classes
from mcm_jax.models.network import Network
from tests.models.test_uvit import LABEL, LOGSNR, UVIT, Z

CAPTIONS = Captions(length=5, width=6, pooled_width=7)
LENGTHS = jnp.array([5, 3, 1, 0])  # The last example has no caption.


def network_of(settings=UVIT, condition=CAPTIONS):
    return Network(settings, (8, 8, 3), condition=condition)


def moved(network):
    """Parameters away from the initial zeros, so that every part of the network matters."""
    flat, unflatten = ravel_pytree(jax.jit(network.init)(jax.random.key(1)))
    return unflatten(flat + 0.1 * jax.random.normal(jax.random.key(2), flat.shape))


@pytest.fixture(scope="module")
def predict():
    """caption -> v_hat of four images."""
    params, apply = moved(network_of()), jax.jit(network_of().apply)
    return lambda caption: np.asarray(apply(params, Z, LOGSNR, caption, None))


@pytest.fixture(scope="module")
def caption():
    keys = jax.random.split(jax.random.key(3), 2)
    mask = jnp.arange(5) < LENGTHS[:, None]
    return Caption(jax.random.normal(keys[0], (4, 5, 6)), mask, jax.random.normal(keys[1], (4, 7)))


def test_every_token_of_a_caption_matters_and_no_other(predict, caption):
    before = predict(caption)
    for place in range(5):
        other = caption._replace(tokens=caption.tokens.at[:, place].add(jnp.arange(1.0, 7.0)))
        changed = np.abs(predict(other) - before).max(axis=(1, 2, 3))
        np.testing.assert_array_equal(changed > 1e-4, place < LENGTHS)
        np.testing.assert_array_equal(changed[place >= LENGTHS], 0)


def test_the_pooled_embedding_matters(predict, caption):
    other = predict(caption._replace(pooled=caption.pooled + 1))
    assert np.abs(other - predict(caption)).max(axis=(1, 2, 3)).min() > 1e-3


def test_tokens_have_no_order_of_their_own(predict, caption):
    """Their encoder has given them one; the sum over keys only changes in the last bits."""
    order = jnp.array([2, 0, 4, 1, 3])
    shuffled = caption._replace(tokens=caption.tokens[:, order], mask=caption.mask[:, order])
    np.testing.assert_allclose(predict(shuffled), predict(caption), atol=1e-5)


def test_examples_do_not_meet(predict, caption):
    flipped = jax.tree.map(lambda leaf: leaf[::-1], caption)
    expected = predict(caption)
    mixed = predict(jax.tree.map(lambda a, b: a.at[1:].set(b[1:]), caption, flipped))
    np.testing.assert_array_equal(mixed[0], expected[0])
    assert np.abs(mixed[1] - expected[1]).max() > 1e-3


def test_without_a_caption_only_the_image_is_attended_to(predict, caption):
    """As in the network of labels whose embedding of 'any class' is zero."""
    of_captions, of_classes = network_of(), network_of(condition=Classes(5))
    params = moved(of_captions)

    def without_text(tree):
        if not isinstance(tree, dict):
            return tree
        return {k: without_text(v) for k, v in tree.items() if k not in ("text_kv", "norm_text", "pooled")}

    plain = without_text(params)
    plain["conditioning"]["classes"] = {"embedding": jnp.zeros((6, 16))}
    expected = jax.jit(of_classes.apply)(plain, Z, LOGSNR, LABEL, None)
    nothing = conditions.unconditional(caption, CAPTIONS.null)
    np.testing.assert_allclose(predict(nothing), expected, atol=1e-5)


def test_the_condition_of_a_batch():
    batch = {"image": 0, **CAPTIONS.abstract(4)}
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), CAPTIONS.of(batch))
    assert shapes == Caption(((4, 5, 6), "float16"), ((4, 5), "bool"), ((4, 7), "float32"))
    assert Classes(5).of({"label": 3, **batch}) == 3


def test_patches_are_the_pixels_of_a_smaller_image():
    """Of a quarter of the positions and four times the channels, with the same parameters."""
    coarse = dataclasses.replace(UVIT, patch=2)
    of_patches = Network(coarse, (16, 16, 3), condition=Classes(5))
    of_pixels = Network(UVIT, (8, 8, 12), condition=Classes(5))
    params = moved(of_pixels)
    z = jax.random.normal(jax.random.key(4), (4, 16, 16, 3))
    small = np.zeros((4, 8, 8, 12), np.float32)
    for i in range(2):
        for j in range(2):
            start = 3 * (2 * i + j)
            small[..., start : start + 3] = z[:, i::2, j::2]
    expected = jax.jit(of_pixels.apply)(params, small, LOGSNR, LABEL, None)
    found = jax.jit(of_patches.apply)(params, z, LOGSNR, LABEL, None)
    again = rearrange(found, "b (h i) (w j) c -> b h w (i j c)", i=2, j=2)
    np.testing.assert_allclose(again, expected, atol=1e-5)
