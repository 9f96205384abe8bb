"""Captions are embedded once, stored beside the records, and found by their text."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from mcm_jax.data import embeddings, pipeline, preparation
from mcm_jax.system.errors import InputError

LENGTH, WIDTH, POOLED_WIDTH = 5, 3, 2
# The last image has no caption.
CAPTIONS = ["a cat", "a dog and a cat", "a cat", ""]


@dataclasses.dataclass
class Encoder:
    """Each letter is a token."""

    name: str = "letters"
    sha256: str = "0" * 64
    length: int = LENGTH
    width: int = WIDTH
    pooled_width: int = POOLED_WIDTH
    scale: float = 1.0
    calls: int = 0

    def tokenize(self, strings):
        lengths = np.array([len(string) for string in strings])
        return np.zeros((len(strings), LENGTH)), np.zeros((len(strings), LENGTH), bool), lengths > LENGTH

    def encode(self, strings):
        self.calls += 1
        tokens, mask = (
            np.zeros((len(strings), LENGTH, WIDTH), np.float32),
            np.zeros((len(strings), LENGTH), bool),
        )
        for n, string in enumerate(strings):
            letters = [ord(letter) for letter in string[:LENGTH]] or [1]
            tokens[n, : len(letters)] = self.scale * np.array(letters, np.float32)[:, None] / [1, 2, 4]
            mask[n, : len(letters)] = True
        return tokens, mask, tokens.sum(axis=1)[:, :POOLED_WIDTH] + 0.001


@pytest.fixture
def place(tmp_path):
    """A data_dir with four captioned images."""
    for n, caption in enumerate(CAPTIONS):
        path = tmp_path / "images" / f"{n}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), n, np.uint8)).save(path)
        path.with_suffix(".txt").write_text(caption)
    return tmp_path / "data"


def prepare(place, **options):
    plan = preparation.plan(
        dataset="folder", resolution=4, manual_dir=str(place.parent / "images"), name="tiny"
    )
    return preparation.prepare(plan, data_dir=place, **options)[0]


def open_split(place, split="train", **options):
    how = {"data_dir": place, "dataset": "folder/tiny", "resolution": 4, "split": split, **options}
    return pipeline.open_split(encoder="letters", **how)


@pytest.mark.parametrize("limit", [0, 2**30], ids=["from disk", "in memory"])
def test_an_example_has_the_embedding_of_its_caption(place, limit):
    encoder = Encoder()
    encoding, cut = embeddings.write(prepare(place), encoder)
    assert encoding.num_captions == 3  # Two images share one.
    assert cut == 1
    seen = []
    for split in ("train", "test"):
        source = open_split(place, split, in_memory_limit_bytes=limit)
        batch = source.batch(np.arange(len(source)))
        for n, image in enumerate(batch["image"]):
            caption = CAPTIONS[image[0, 0, 0]]
            seen.append(caption)
            tokens, mask, pooled = encoder.encode([caption])
            if not caption:  # No caption is not the embedding of the empty string.
                tokens, mask, pooled = 0 * tokens, 0 * mask, 0 * pooled
            np.testing.assert_array_equal(batch["tokens"][n], tokens[0].astype(np.float16))
            np.testing.assert_array_equal(batch["mask"][n], mask[0])
            np.testing.assert_array_equal(batch["pooled"][n], pooled[0].astype(np.float32))
        assert {name: batch[name].dtype for name in ("tokens", "mask", "pooled")} == {
            "tokens": np.float16,
            "mask": bool,
            "pooled": np.float32,
        }
    assert sorted(seen) == sorted(CAPTIONS)


def test_training_batches_have_captions(place):
    embeddings.write(prepare(place), Encoder())
    batches = pipeline.train_batches(open_split(place), batch_size=6, seed=0, flip=True)
    batch = next(batches)
    assert {name: values.shape for name, values in batch.items()} == {
        "image": (6, 4, 4, 3),
        "label": (6,),
        "tokens": (6, LENGTH, WIDTH),
        "mask": (6, LENGTH),
        "pooled": (6, POOLED_WIDTH),
    }


def test_prompts_are_embedded_as_captions_are(place):
    info = prepare(place)
    encoder = Encoder()
    encoding, _ = embeddings.write(info, encoder)
    stored = embeddings.Embeddings(embeddings.describe(info, "letters"), in_memory_limit_bytes=0)
    prompts = ["", "a dog and a cat", "a cat"]
    found = stored.gather(stored.rows(prompts))
    embedded = embeddings.embed([*prompts, "a cat"], encoder.encode, encoding)
    for name, values in embedded(slice(0, 3)).items():
        np.testing.assert_array_equal(values, found[name])
    np.testing.assert_array_equal(embedded(slice(3, 4))["tokens"], found["tokens"][2:])
    assert not found["mask"][0].any() and not found["pooled"][0].any()


def test_captions_are_embedded_once(place):
    info, encoder = prepare(place), Encoder()
    first, _ = embeddings.write(info, encoder)
    assert embeddings.write(info, encoder) == (first, 0) and encoder.calls == 1
    assert not list(place.rglob(".incomplete-*"))


def test_embeddings_of_an_earlier_preparation_are_replaced(place):
    encoder = Encoder()
    first, _ = embeddings.write(prepare(place), encoder)
    (place.parent / "images" / "0.txt").write_text("a mouse")
    info = prepare(place, overwrite=True)
    with pytest.raises(InputError, match="not embedded by letters"):
        embeddings.describe(info, "letters")
    second, _ = embeddings.write(info, encoder)
    assert second.captions_sha256 != first.captions_sha256 and second.num_captions == 4
    assert embeddings.describe(info, "letters").encoding == second


def test_what_an_interrupted_deletion_has_left_is_replaced(place):
    info, encoder = prepare(place), Encoder()
    first, _ = embeddings.write(info, encoder)
    (embeddings.directory(info, "letters") / "summary.json").unlink()
    assert embeddings.write(info, encoder)[0] == first
    assert embeddings.describe(info, "letters").encoding == first


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sha256": "1" * 64}, "by another encoder of that name (its hash is 000000000000, now 111111111111"),
        (
            {"length": 4},
            "contains embeddings of up to 5 tokens, not 4; delete it, or pass --caption_length=5",
        ),
        ({"name": "a b"}, "text encoder 'a b': its name may contain only"),
        ({"name": "huge", "scale": 1e6}, "text encoder huge: an embedding exceeds float16"),
    ],
)
def test_an_encoder_that_does_not_fit(changed, message, place):
    info = prepare(place)
    embeddings.write(info, Encoder())
    with pytest.raises(InputError) as error, np.errstate(over="ignore"):
        embeddings.write(info, Encoder(**changed))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_encoders_name_is_not_its_path(place):
    info = prepare(place)
    with pytest.raises(InputError, match=r"config.data.encoder=/models/t5: it must be minilm, or the name"):
        embeddings.describe(info, "/models/t5")


def test_a_data_set_without_captions(tmp_path):
    (tmp_path / "images").mkdir()
    for n in range(2):
        Image.new("RGB", (4, 4), (n, n, n)).save(tmp_path / "images" / f"{n}.png")
    plan = preparation.plan(dataset="folder", resolution=4, manual_dir=str(tmp_path / "images"), name="plain")
    info, _ = preparation.prepare(plan, data_dir=tmp_path / "data")
    with pytest.raises(InputError, match="folder/plain has no captions to embed"):
        embeddings.write(info, Encoder())


def _flip(path):
    content = bytearray(path.read_bytes())
    content[70] ^= 1
    path.write_bytes(content)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("summary.json", _truncate),
        ("summary.json", lambda path: path.write_text('{"encoder": 3}')),
        ("captions.jsonl", _truncate),
        ("captions.jsonl", lambda path: path.write_text(json.dumps("one") + "\n")),
        ("captions.jsonl", lambda path: path.write_text("".join(reversed(path.open().readlines())))),
        ("captions.jsonl", lambda path: path.unlink()),
        ("embeddings.array_record", lambda path: path.write_bytes(path.read_bytes()[:40])),
        ("embeddings.array_record", _flip),
        ("embeddings.array_record", lambda path: path.unlink()),
    ],
)
def test_damage_is_one_line(file, damage, place):
    info = prepare(place)
    embeddings.write(info, Encoder())
    damage(embeddings.directory(info, "letters") / file)
    with pytest.raises(InputError) as error:
        open_split(place)
    assert "is damaged" in str(error.value) and "\n" not in str(error.value)
