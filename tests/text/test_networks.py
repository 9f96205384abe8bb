"""The networks against their equations, written out in float64 for one text without padding."""

import math

import jax
import numpy as np
import pytest
from flax import nnx
from scipy import special

from mcm_jax.text import architectures, encoders, t5
from mcm_jax.text.configs import Config
from tests.text import tiny

TEXTS = ["", "a", "b c d e f g h i j k l m n o p", "q r s t u a b", "cat red c c c c c c"]


def layer_norm(x, scale, shift, epsilon):
    deviation = x - x.mean(-1, keepdims=True)
    return deviation / np.sqrt((deviation**2).mean(-1, keepdims=True) + epsilon) * scale + shift


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x):
    return x * (1 + special.erf(x / math.sqrt(2))) / 2


def gelu_tanh(x):
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def quick_gelu(x):
    return x / (1 + np.exp(-1.702 * x))


def attend(q, k, v, heads, scale, bias):
    """Head by head; bias [heads, L, L]."""
    width = q.shape[1] // heads
    result = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        weights = softmax(scale * q[:, part] @ k[:, part].T + bias[head])
        result.append(weights @ v[:, part])
    return np.concatenate(result, axis=1)


class Weights:
    """Layers by the names in the file."""

    def __init__(self, tensors):
        self.tensors = {name: value.astype(np.float64) for name, value in tensors.items()}

    def __getitem__(self, name):
        return self.tensors[name]

    def linear(self, name, x):
        y = x @ self[f"{name}.weight"].T
        return y + self[f"{name}.bias"] if f"{name}.bias" in self.tensors else y

    def norm(self, name, x, epsilon):
        return layer_norm(x, self[f"{name}.weight"], self[f"{name}.bias"], epsilon)


def bert(config, w, ids):
    epsilon, heads, length = config["layer_norm_eps"], config["num_attention_heads"], len(ids)
    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][:length]
    x = w.norm("embeddings.LayerNorm", x + w["embeddings.token_type_embeddings.weight"][0], epsilon)
    scale = 1 / math.sqrt(config["hidden_size"] / heads)
    for n in range(config["num_hidden_layers"]):
        block = f"encoder.layer.{n}."
        q, k, v = (w.linear(f"{block}attention.self.{name}", x) for name in ("query", "key", "value"))
        h = attend(q, k, v, heads, scale, np.zeros((heads, length, length)))
        h = w.linear(f"{block}attention.output.dense", h)
        x = w.norm(f"{block}attention.output.LayerNorm", x + h, epsilon)
        h = w.linear(f"{block}output.dense", gelu(w.linear(f"{block}intermediate.dense", x)))
        x = w.norm(f"{block}output.LayerNorm", x + h, epsilon)
    mean = x.mean(0)
    return x, mean / math.sqrt((mean**2).sum())


def bucket(distance, buckets, farthest):
    """One distance: of half the buckets, half are exact, and the others divide the logarithm."""
    half, size = buckets // 2, abs(distance)
    exact = half // 2
    number = size
    if size >= exact:
        share = math.log(size / exact) / math.log(farthest / exact)
        # A distance on a boundary belongs to the farther bucket.
        number = min(exact + math.floor(share * (half - exact) + 1e-9), half - 1)
    return number + (half if distance > 0 else 0)


def t5_encoder(config, w, ids):
    heads, length = config["num_heads"], len(ids)
    table = w["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    bias = np.zeros((heads, length, length))
    for query in range(length):
        for key in range(length):
            number = bucket(
                key - query,
                config["relative_attention_num_buckets"],
                config["relative_attention_max_distance"],
            )
            bias[:, query, key] = table[number]

    def norm(name, x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["layer_norm_epsilon"]) * w[name]

    x = w["shared.weight"][ids]
    for n in range(config["num_layers"]):
        block = f"encoder.block.{n}.layer."
        h = norm(f"{block}0.layer_norm.weight", x)
        q, k, v = (w.linear(f"{block}0.SelfAttention.{name}", h) for name in "qkv")
        x = x + w.linear(f"{block}0.SelfAttention.o", attend(q, k, v, heads, 1, bias))
        h = norm(f"{block}1.layer_norm.weight", x)
        gate = gelu_tanh(w.linear(f"{block}1.DenseReluDense.wi_0", h))
        x = x + w.linear(f"{block}1.DenseReluDense.wo", gate * w.linear(f"{block}1.DenseReluDense.wi_1", h))
    x = norm("encoder.final_layer_norm.weight", x)
    return x, x.mean(0)


def clip(config, w, ids):
    epsilon, heads, length = config["layer_norm_eps"], config["num_attention_heads"], len(ids)
    activation = {"gelu": gelu, "quick_gelu": quick_gelu}[config["hidden_act"]]
    bias = np.where(np.tri(length, dtype=bool), 0, -np.inf)
    scale = 1 / math.sqrt(config["hidden_size"] / heads)
    name = "text_model.embeddings."
    x = w[f"{name}token_embedding.weight"][ids] + w[f"{name}position_embedding.weight"][:length]
    states = [x]
    for n in range(config["num_hidden_layers"]):
        block = f"text_model.encoder.layers.{n}."
        h = w.norm(f"{block}layer_norm1", x, epsilon)
        q, k, v = (w.linear(f"{block}self_attn.{name}_proj", h) for name in "qkv")
        x = x + w.linear(f"{block}self_attn.out_proj", attend(q, k, v, heads, scale, [bias] * heads))
        h = w.norm(f"{block}layer_norm2", x, epsilon)
        x = x + w.linear(f"{block}mlp.fc2", activation(w.linear(f"{block}mlp.fc1", h)))
        states.append(x)
    last = w.norm("text_model.final_layer_norm", x, epsilon)[-1]
    return states[-2], w.linear("text_projection", last)


NETWORKS = {"bert": bert, "t5": t5_encoder, "clip_text_model": clip}


@pytest.fixture(scope="module", params=tiny.CONFIGS)
def case(request, tmp_path_factory):
    """A config, and the encoder that was loaded from files with it."""
    config = tiny.CONFIGS[request.param]
    directory = tiny.write(tmp_path_factory.mktemp("encoder"), config)
    return config, directory, encoders.load(directory, length=20)


def test_agrees_with_the_equations(case):
    config, _, encoder = case
    text, (ids, mask, cut, _) = encoder.encode(TEXTS), encoder.tokenize(TEXTS)
    assert not cut.any() and len(set(mask.sum(axis=1))) > 3
    weights = Weights(tiny.tensors(config))
    for row in range(len(TEXTS)):
        count = mask[row].sum()
        tokens, pooled = NETWORKS[config["model_type"]](config, weights, ids[row, :count])
        np.testing.assert_allclose(text.tokens[row, :count], tokens, atol=1e-5)
        np.testing.assert_allclose(text.pooled[row], pooled, atol=1e-5)
        assert np.abs(tokens).max() > 0.5


def test_shapes_and_padding(case):
    config, _, encoder = case
    text = encoder.encode(TEXTS)
    width = config.get("d_model", config.get("hidden_size"))
    assert (encoder.length, encoder.width) == (20, width)
    assert encoder.pooled_width == config.get("projection_dim", width)
    assert text.tokens.shape == (5, 20, width) and text.tokens.dtype == np.float32
    assert text.pooled.shape == (5, encoder.pooled_width) and text.pooled.dtype == np.float32
    assert not text.tokens[~text.mask].any()
    assert np.isfinite(text.tokens).all()
    # The mask is True at the beginning.
    assert not (text.mask[:, 1:] & ~text.mask[:, :-1]).any() and text.mask[:, 0].all()


def test_padding_does_not_matter(case):
    _, directory, encoder = case
    longer = encoders.load(directory, length=24)
    text, padded = encoder.encode(TEXTS), longer.encode(TEXTS)
    np.testing.assert_allclose(padded.tokens[:, :20], text.tokens, atol=1e-5)
    np.testing.assert_allclose(padded.pooled, text.pooled, atol=1e-5)


def test_texts_do_not_influence_each_other(case):
    """Bitwise, in batches of any fill and in any place of them."""
    _, _, encoder = case
    many = [TEXTS[n % len(TEXTS)] + " a" * (n // len(TEXTS)) for n in range(19)]
    whole = encoder.encode(many)
    for chosen in ([3], [18, 0, 7], list(range(19))[::-1]):
        part = encoder.encode([many[n] for n in chosen])
        for found, expected in zip(part, whole, strict=True):
            np.testing.assert_array_equal(found, expected[chosen])


def test_no_texts(case):
    _, _, encoder = case
    text = encoder.encode([])
    assert text.tokens.shape == (0, 20, encoder.width) and text.mask.shape == (0, 20)
    assert text.pooled.shape == (0, encoder.pooled_width)


@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 12), (4, 7), (64, 1000)])
def test_buckets_of_distances(buckets, farthest):
    """At (32, 128), T5's, every boundary is a power of 2 times the square roots of 2."""
    distances = np.arange(-1100, 1101)
    expected = [bucket(distance, buckets, farthest) for distance in distances]
    np.testing.assert_array_equal(t5.distance_buckets(distances, buckets, farthest), expected)


REAL = {
    "all-MiniLM-L6-v2, without its pooler": (
        {**tiny.BERT, "vocab_size": 30522, "hidden_size": 384, "intermediate_size": 1536}
        | {"num_hidden_layers": 6, "num_attention_heads": 12, "max_position_embeddings": 512},
        22_713_216 - 385 * 384,
    ),
    "T5 v1.1 XXL": (
        {**tiny.T5, "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24}
        | {"num_heads": 64, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128},
        4_762_310_656,
    ),
    "ViT-L/14, 123,060,480 without the projection": (
        {**tiny.CLIP, "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072}
        | {"num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77}
        | {"projection_dim": 768},
        123_060_480 + 768**2,
    ),
    "ViT-bigG/14": (
        {**tiny.GELU_CLIP, "vocab_size": 49408, "hidden_size": 1280, "intermediate_size": 5120}
        | {"num_hidden_layers": 32, "num_attention_heads": 20, "max_position_embeddings": 77}
        | {"projection_dim": 1280},
        694_659_840,
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_published_numbers_of_parameters(name):
    config, count = REAL[name]
    settings = architectures.settings(Config(config, name), name)
    shapes = jax.tree.leaves(nnx.state(nnx.eval_shape(settings.build)))
    assert sum(math.prod(leaf.shape) for leaf in shapes) == count
