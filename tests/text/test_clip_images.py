"""CLIP's image encoder against its equations, in float64 for one image."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from mcm_jax.evaluation.clip_score import ClipScore
from mcm_jax.system.errors import InputError
from mcm_jax.text import clip_images, encoders
from mcm_jax.text.clip_images import ClipImagesSettings
from mcm_jax.text.configs import Config
from tests.text import tiny
from tests.text.test_networks import Weights, attend, quick_gelu

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("clip") / "clip-tiny", tiny.WHOLE_CLIP)


def projection(image, w):
    """One image without resizing, patch by patch."""
    config = tiny.WHOLE_CLIP["vision_config"]
    side, heads, epsilon = config["patch_size"], config["num_attention_heads"], config["layer_norm_eps"]
    pixels = (image / 255 - MEAN) / DEVIATION
    kernel = w["vision_model.embeddings.patch_embedding.weight"]
    tokens = [w["vision_model.embeddings.class_embedding"]]
    for top in range(0, len(pixels), side):
        for left in range(0, len(pixels), side):
            patch = pixels[top : top + side, left : left + side]
            tokens.append(np.einsum("ochw,hwc->o", kernel, patch))
    x = np.stack(tokens) + w["vision_model.embeddings.position_embedding.weight"]
    x = w.norm("vision_model.pre_layrnorm", x, epsilon)
    scale = 1 / math.sqrt(config["hidden_size"] / heads)
    for n in range(config["num_hidden_layers"]):
        block = f"vision_model.encoder.layers.{n}."
        h = w.norm(f"{block}layer_norm1", x, epsilon)
        q, k, v = (w.linear(f"{block}self_attn.{name}_proj", h) for name in "qkv")
        x = x + w.linear(f"{block}self_attn.out_proj", attend(q, k, v, heads, scale, [0.0] * heads))
        h = w.norm(f"{block}layer_norm2", x, epsilon)
        x = x + w.linear(f"{block}mlp.fc2", quick_gelu(w.linear(f"{block}mlp.fc1", h)))
    return w.linear("visual_projection", w.norm("vision_model.post_layernorm", x[0], epsilon))


def test_agrees_with_the_equations(directory):
    weights = Weights(tiny.tensors(tiny.WHOLE_CLIP))
    expected = np.stack([projection(image, weights) for image in IMAGES])
    np.testing.assert_allclose(clip_images.load(directory).encode(IMAGES), expected, atol=2e-5)
    assert np.abs(expected).max() > 0.5


def test_the_score_is_the_cosine(directory):
    captions = ["a b c", "", "d e"]
    score = ClipScore(directory)
    assert score.name == "clip_score_clip-tiny"
    points, most = score(IMAGES, captions)
    text, weights = encoders.load(directory).encode(captions).pooled, Weights(tiny.tensors(tiny.WHOLE_CLIP))
    for found, image, row in zip(points, IMAGES, text, strict=True):
        a = projection(image, weights)
        assert found == pytest.approx(a @ row / math.sqrt((a @ a) * (row @ row)), abs=1e-5)
    assert most.tolist() == [1, 1, 1]


def test_another_clip_has_another_hash(directory, tmp_path):
    other = tiny.write(tmp_path / "clip-tiny", tiny.WHOLE_CLIP, seed=1)
    assert ClipScore(directory).sha256 != ClipScore(other).sha256


@pytest.mark.parametrize("side", [5, 8, 20])
def test_images_are_resized_as_by_pillow(side):
    """Up to rounding: Pillow rounds between its two passes, ours only at the end.

    It also clips there, so these pixels are away from the ends.
    """
    images = np.random.default_rng(1).integers(90, 166, (2, side, side, 3), np.uint8)
    found = np.asarray(clip_images.normalised(jnp.asarray(images), resolution=8)) * DEVIATION + MEAN
    for image, ours in zip(images, found, strict=True):
        expected = np.asarray(Image.fromarray(image).resize((8, 8), Image.Resampling.BICUBIC)) / 255
        assert np.abs(ours - expected).max() < 2.01 / 255


def test_images_do_not_influence_each_other(directory):
    encoder = clip_images.load(directory)
    many = np.random.default_rng(2).integers(0, 256, (35, 8, 8, 3), np.uint8)
    np.testing.assert_allclose(encoder.encode(many)[33:], encoder.encode(many[33:]), atol=1e-6)


# transformers' defaults are those of ViT-B/32, and are left out of the files.
PUBLISHED = {
    "ViT-B/16": ({"patch_size": 16}, 512, 85_799_424 + 768 * 512),
    "ViT-L/14": (
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        | {"patch_size": 14},
        768,
        303_179_776 + 1024 * 768,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers_of_parameters(name):
    vision, width, count = PUBLISHED[name]
    config = Config({"model_type": "clip", "projection_dim": width, "vision_config": vision}, name)
    shapes = jax.tree.leaves(nnx.state(nnx.eval_shape(ClipImagesSettings.of(config, name).build)))
    assert sum(math.prod(leaf.shape) for leaf in shapes) == count


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"config.json": None}, "so it is no CLIP; get one: hf download"),
        ({"config.json": json.dumps(tiny.CLIP).encode()}, "model_type must be clip"),
        ({"config.json": json.dumps({**tiny.WHOLE_CLIP, "vision_config": 3}).encode()}, "vision_config"),
        ({"model.safetensors": None}, "has no model.safetensors"),
        ({"model.safetensors": tiny.files(tiny.CLIP)["model.safetensors"]}, "has no tensor vision_model"),
    ],
)
def test_bad_files(changed, message, tmp_path):
    directory = tiny.write(tmp_path / "clip", tiny.WHOLE_CLIP, changed)
    with pytest.raises(InputError, match=message):
        clip_images.load(directory)
