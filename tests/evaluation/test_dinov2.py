"""DINOv2 against its equations, in float64 for one image; tests/parity compares it with two programs."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from mcm_jax.evaluation import dinov2
from mcm_jax.evaluation.features import Extractor
from mcm_jax.system.errors import InputError
from mcm_jax.text.configs import Config
from tests.text.test_networks import Weights, attend, gelu

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# 4 x 4 patches, with embeddings for 5 x 5. Norms of these sizes would not notice an epsilon of 1e-6.
TINY = {
    "model_type": "dinov2",
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "mlp_ratio": 2,
    "image_size": 280,
    "patch_size": 56,
    "layer_norm_eps": 0.3,
}


def shapes(config):
    """As transformers writes them."""
    width, side = config["hidden_size"], config["patch_size"]
    hidden = width * config["mlp_ratio"]
    found = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.mask_token": (1, width),
        "embeddings.position_embeddings": (1, 1 + (config["image_size"] // side) ** 2, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, side, side),
        "embeddings.patch_embeddings.projection.bias": (width,),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
    }
    for n in range(config["num_hidden_layers"]):
        block = f"encoder.layer.{n}."
        linear = {f"attention.attention.{name}": (width, width) for name in ("query", "key", "value")}
        linear |= {"attention.output.dense": (width, width)}
        linear |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
        for name, shape in linear.items():
            found |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            found[block + name] = (width,)
        found |= {f"{block}layer_scale{m}.lambda1": (width,) for m in (1, 2)}
    return found


def tensors(config, seed=0):
    """Random weights with which every layer matters."""
    draw = np.random.default_rng(seed)

    def one(name, shape):
        if ("norm" in name and name.endswith("weight")) or name.endswith("lambda1"):
            return draw.uniform(0.5, 1.5, shape)
        if len(shape) == 1 or "token" in name or "position" in name:
            return draw.normal(size=shape)
        return draw.normal(size=shape) / math.sqrt(math.prod(shape[1:]))

    return {name: one(name, shape).astype(np.float32) for name, shape in shapes(config).items()}


def write(directory, config=TINY, weights=None, seed=0):
    """Writes a DINOv2 in the files of transformers."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    found = tensors(config, seed) if weights is None else weights
    safetensors.numpy.save_file(found, directory / "model.safetensors", {"format": "pt"})
    return directory


def keys(distance, a):
    """Keys' cubic kernel (1981) with the parameter a."""
    d = abs(distance)
    if d < 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def resized_line(line, size):
    """Pixel by pixel; the filter is as wide as the step between output pixels, and 1 at least."""
    scale = len(line) / size
    result = []
    for n in range(size):
        centre = (n + 0.5) * scale - 0.5
        factors = [keys((m - centre) / max(scale, 1), -0.5) for m in range(len(line))]
        result.append(sum(factor * pixel for factor, pixel in zip(factors, line, strict=True)) / sum(factors))
    return np.array(result)


def prepared(image):
    columns = resized_line(image.astype(np.float64), 224)
    pixels = resized_line(columns.transpose(1, 0, 2), 224).transpose(1, 0, 2)
    return (pixels / 255 - MEAN) / DEVIATION


def resized_positions(table, source, target):
    """Position by position; beyond an edge, its embedding is repeated."""
    grid = table[1:].reshape(source, source, -1)
    rows = [table[0]]
    for y in range(target):
        for x in range(target):
            centres = [(n + 0.5) / ((target + 0.1) / source) - 0.5 for n in (y, x)]
            total = 0.0
            for i in range(math.floor(centres[0]) - 1, math.floor(centres[0]) + 3):
                for j in range(math.floor(centres[1]) - 1, math.floor(centres[1]) + 3):
                    factor = keys(i - centres[0], -0.75) * keys(j - centres[1], -0.75)
                    total = total + factor * grid[min(max(i, 0), source - 1), min(max(j, 0), source - 1)]
            rows.append(total)
    return np.stack(rows)


def class_token(image, w, config=TINY):
    side, heads, epsilon = config["patch_size"], config["num_attention_heads"], config["layer_norm_eps"]
    pixels, patches = prepared(image), "embeddings.patch_embeddings.projection"
    tokens = [w["embeddings.cls_token"][0, 0]]
    for top in range(0, 224, side):
        for left in range(0, 224, side):
            patch = pixels[top : top + side, left : left + side]
            tokens.append(np.einsum("ochw,hwc->o", w[f"{patches}.weight"], patch) + w[f"{patches}.bias"])
    positions = w["embeddings.position_embeddings"][0]
    if len(positions) != len(tokens):
        positions = resized_positions(positions, config["image_size"] // side, 224 // side)
    x, scale = np.stack(tokens) + positions, 1 / math.sqrt(config["hidden_size"] / heads)
    for n in range(config["num_hidden_layers"]):
        block = f"encoder.layer.{n}."
        h = w.norm(f"{block}norm1", x, epsilon)
        q, k, v = (w.linear(f"{block}attention.attention.{name}", h) for name in ("query", "key", "value"))
        h = w.linear(f"{block}attention.output.dense", attend(q, k, v, heads, scale, [0.0] * heads))
        x = x + w[f"{block}layer_scale1.lambda1"] * h
        h = w.linear(f"{block}mlp.fc1", w.norm(f"{block}norm2", x, epsilon))
        x = x + w[f"{block}layer_scale2.lambda1"] * w.linear(f"{block}mlp.fc2", gelu(h))
    return w.norm("layernorm", x[0], epsilon)


def noise(count, *size):
    return np.random.default_rng(count).integers(0, 256, (count, *size, 3), np.uint8)


@pytest.fixture(scope="module")
def extract(tmp_path_factory):
    network = dinov2.network(write(tmp_path_factory.mktemp("dinov2")))
    extractor = Extractor(network, batch_per_device=4)
    return lambda images: extractor(images)["pool"]


def test_agrees_with_the_equations(extract):
    images = noise(3, 16, 16)
    weights = Weights(tensors(TINY))
    expected = np.stack([class_token(image, weights) for image in images])
    found = extract(images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=3e-5)
    # What is compared tells images apart.
    assert np.median(expected.std(axis=0)) > 0.03


def test_positions_are_taken_as_they_are_where_they_fit(tmp_path):
    """A network trained at 224 pixels."""
    config = {**TINY, "image_size": 224}
    images = noise(1, 16, 16)
    found = Extractor(dinov2.network(write(tmp_path, config)), batch_per_device=1)(images)["pool"][0]
    np.testing.assert_allclose(found, class_token(images[0], Weights(tensors(config)), config), atol=3e-5)


@pytest.mark.parametrize("size", [(5, 8), (64, 64), (224, 224), (300, 224)])
def test_images_are_resized_by_keys_kernel(size):
    """It overshoots, and nothing is rounded or clipped."""
    image = noise(1, *size)[0] // 128 * 255
    expected = prepared(image)
    found = dinov2.normalised(jnp.asarray(image[None]))[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    unscaled = expected * DEVIATION + MEAN
    assert (unscaled.min() < -0.02 and unscaled.max() > 1.02) == (size != (224, 224))


@pytest.mark.parametrize(("source", "target"), [(37, 16), (5, 4), (3, 7)])
def test_positions_are_resized_with_the_grid_of_the_repository(source, target):
    table = np.random.default_rng(0).normal(size=(1 + source**2, 2)).astype(np.float32)
    found = dinov2.resized(jnp.asarray(table[None]), source=source, target=target)[0]
    np.testing.assert_allclose(found, resized_positions(table, source, target), atol=1e-5)


def test_images_do_not_influence_each_other(extract):
    many = noise(6, 16, 16)
    np.testing.assert_allclose(extract(many)[5:], extract(many[5:]), atol=1e-6)


PUBLISHED = {
    "S": ({"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}, 22_056_576),
    "B": ({"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}, 86_580_480),
    "L": ({"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}, 304_368_640),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers_of_parameters(name):
    """The mask token is not read. Only ViT-L/14 of 518 pixels gives FD-DINOv2."""
    sizes, count = PUBLISHED[name]
    config = {"model_type": "dinov2", "image_size": 518, "patch_size": 14, **sizes}
    settings = dinov2.DinoV2Settings.of(Config(config, name), name)
    leaves = jax.tree.leaves(nnx.state(nnx.eval_shape(settings.build)))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == count - sizes["hidden_size"]
    assert settings.network == ("dinov2-vitl14" if name == "L" else "dinov2-other")
    if name == "L":
        other = dinov2.DinoV2Settings.of(Config({**config, "image_size": 224}, name), name)
        assert other.network == "dinov2-other"


def test_another_size_has_another_name_and_other_weights_another_hash(tmp_path):
    one, same, other = (
        dinov2.network(write(tmp_path / name, seed=seed))
        for name, seed in (("one", 0), ("same", 0), ("other", 1))
    )
    assert one.distance == "fd_dinov2_other" and one.dimensions == {"pool": 12}
    assert one.description == same.description != other.description
    assert set(one.description) == {"network", "sha256"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "vit"}, "config.json: model_type must be dinov2; get ViT-L/14: hf download"),
        ({"use_swiglu_ffn": True}, "DINOv2 giant, which is not supported; get ViT-L/14: hf download"),
        ({"use_swiglu_ffn": 1}, "use_swiglu_ffn is 1; it must be true or false"),
        ({"patch_size": 13}, "patch_size is 13; it must divide"),
        ({"image_size": 55}, "image_size is 55; it must be an integer from 56"),
        ({"image_size": 2**20, "patch_size": 1}, "and should be .12, 3, 1, 1. by config.json"),
        ({"hidden_size": 2**20, "num_attention_heads": 1, "mlp_ratio": 2**20}, "by config.json"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; it must be gelu"),
        ({"num_hidden_layers": 3}, "has no tensor encoder.layer.2"),
        ({"image_size": 336}, r"position_embeddings is \(1, 26, 12\) and should be \(1, 37, 12\)"),
    ],
)
def test_a_config_of_another_network(changes, message, tmp_path):
    directory = write(tmp_path, {**TINY, **changes}, tensors(TINY))
    with pytest.raises(InputError, match=message) as error:
        dinov2.network(directory)
    assert "\n" not in str(error.value)


def test_weights_in_half_precision_are_computed_with_in_float32(tmp_path):
    stored = {name: value.astype(np.float16) for name, value in tensors(TINY).items()}
    images = noise(2, 16, 16)
    found = Extractor(dinov2.network(write(tmp_path, weights=stored)), batch_per_device=2)(images)["pool"]
    expected = np.stack([class_token(image, Weights(stored)) for image in images])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=3e-5)


def test_damaged_weights(tmp_path):
    weights = tensors(TINY)
    weights["encoder.layer.1.layer_scale1.lambda1"][3] = np.nan
    with pytest.raises(InputError, match=r"layer_scale1\.lambda1 is not finite; download it again"):
        dinov2.network(write(tmp_path, weights=weights))


def test_missing_files(tmp_path):
    with pytest.raises(InputError, match=r"add --dinov2=DIRECTORY, or get ViT-L/14: hf download"):
        dinov2.network(None)
    for directory in (tmp_path, tmp_path / "none"):
        with pytest.raises(
            InputError, match=f"--dinov2={directory}: .*dinov2-large .*--local-dir {directory}"
        ):
            dinov2.network(directory)
