"""The cache computes once, for exactly what its key says, and survives damage."""

import numpy as np
import pytest

from mcm_jax.evaluation import references, unfinished
from mcm_jax.evaluation.references import Cache, Reference
from mcm_jax.system.errors import InputError
from tests.evaluation.pixels import PixelExtractor, network

LABELS = np.arange(30, dtype=np.int32) % 3
IMAGES = np.random.default_rng(0).integers(0, 256, (30, 4, 4, 3), dtype=np.uint8)
IDENTITY = {"fingerprint": "abc", "resolution": 4}


class Asker:
    """Asks a cache for the reference of IMAGES and counts how often the images were wanted."""

    def __init__(self, directory):
        self.directory, self.loads, self.block = directory, 0, 30

    def images(self):
        self.loads += 1
        for start in range(0, 30, self.block):
            yield IMAGES[start : start + self.block], LABELS[start : start + self.block]

    def __call__(self, extractor=None, split="train", identity=IDENTITY) -> Reference:
        # A new cache each time, as in a new process.
        return Cache(self.directory).reference(
            extractor or PixelExtractor(), split=split, identity=identity, images=self.images
        )


@pytest.fixture
def ask(tmp_path) -> Asker:
    return Asker(tmp_path / "cache")


def assert_equal(one: Reference, other: Reference) -> None:
    assert (one.description, one.sha256, one.count) == (other.description, other.sha256, other.count)
    for name in ("features", "labels"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.moments.keys() == other.moments.keys()
    for name, pair in one.moments.items():
        for a, b in zip(pair, other.moments[name], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("limit", [50_000, 12])
def test_an_interrupted_reference_goes_on_where_it_was(ask, monkeypatch, limit):
    """To the last bit, though what was seen ends within a block; with and without single images."""
    monkeypatch.setattr(references, "MAX_STORED_FEATURES", limit)
    monkeypatch.setattr(unfinished, "EVERY_SECONDS", -1.0)
    ask.block = 10
    expected = ask()
    (path,) = ask.directory.glob("reference_*.npz")
    path.unlink()
    seen = []

    class Counting(PixelExtractor):
        def __call__(self, images):
            if len(seen) == 2:
                raise KeyboardInterrupt
            seen.append(len(images))
            return super().__call__(images)

    with pytest.raises(KeyboardInterrupt):
        ask(Counting())
    seen.clear()
    ask.block = 15
    found = ask(Counting())
    assert seen == [10] and not list(ask.directory.glob("unfinished_*"))
    assert_equal(found, expected)


def test_features_that_are_all_equal_are_told(ask):
    """As weights of zeros give them."""

    class Blind(PixelExtractor):
        def __call__(self, images):
            return super().__call__(np.zeros_like(images))

    with pytest.raises(InputError, match="the features of all 30 images of the reference are equal"):
        ask(Blind())
    ask.images = lambda: iter([(np.zeros_like(IMAGES), LABELS)])  # Where the images are too it is no wonder.
    assert not ask().moments["pool"][1].any()


def test_the_statistics_are_those_of_the_images(ask):
    reference = ask()
    features = PixelExtractor()(IMAGES)["pool"]
    assert reference.count == 30 and reference.rank_deficient
    assert reference.description == {"split": "train", "count": 30, "sha256": reference.sha256}
    mean, cov = reference.moments["pool"]
    np.testing.assert_allclose(mean, features.mean(axis=0, dtype=np.float64), atol=1e-12)
    np.testing.assert_allclose(cov, np.cov(features.astype(np.float64), rowvar=False), atol=1e-12)
    np.testing.assert_array_equal(reference.features, features)
    np.testing.assert_array_equal(reference.labels, LABELS)


def test_spatial_features_have_moments_of_their_own_and_class_scores_none(ask):
    inception = PixelExtractor(network((("pool", 40), ("spatial", 12), ("logits", 5))))
    reference = ask(extractor=inception)
    assert set(reference.moments) == {"pool", "spatial"}
    np.testing.assert_allclose(
        reference.moments["spatial"][0], inception(IMAGES)["spatial"].mean(axis=0), atol=1e-6
    )
    assert_equal(ask(extractor=inception), reference)


def test_blocks_do_not_matter(ask, tmp_path):
    whole, other = ask(), Asker(tmp_path / "other")
    other.block = 7
    parts = other()
    for a, b in zip(parts.moments["pool"], whole.moments["pool"], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    np.testing.assert_array_equal(parts.features, whole.features)


def test_the_second_time_no_image_is_loaded(ask):
    assert_equal(ask(), ask())
    assert ask.loads == 1
    assert not [path for path in ask.directory.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "change",
    [
        {"extractor": PixelExtractor(network(sha256="beef"))},
        {"extractor": PixelExtractor(network(input_resolution=112))},
        {"split": "test"},
        {"identity": {**IDENTITY, "fingerprint": "abd"}},
        {"identity": {**IDENTITY, "resolution": 5}},
    ],
    ids=["weights", "input_resolution", "split", "fingerprint", "resolution"],
)
def test_anything_that_matters_is_another_reference(ask, change):
    first = ask()
    assert ask(**change).sha256 != first.sha256
    assert ask.loads == 2


def test_the_code_version_is_part_of_the_key(ask, monkeypatch):
    first = ask()
    monkeypatch.setattr(references, "VERSION", references.VERSION + 1)
    assert ask().sha256 != first.sha256


def cut_off(content: bytes) -> bytes:
    return content[: len(content) // 2]


def one_bit_flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [cut_off, one_bit_flipped, lambda _: b"", lambda _: b"not a zip"])
def test_a_damaged_file_is_computed_again_with_a_note(ask, damage, capsys):
    first = ask()
    (path,) = ask.directory.glob("*.npz")
    path.write_bytes(damage(path.read_bytes()))
    assert_equal(ask(), first)
    assert ask.loads == 2
    assert str(path) in capsys.readouterr().err
    assert_equal(ask(), first)
    assert ask.loads == 2


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (self.marker, "w")


def test_a_pickle_in_the_cache_is_damage_and_is_not_run(ask, tmp_path):
    """Arrays of objects are pickles: np.load would run them."""
    first, marker = ask(), tmp_path / "marker"
    (path,) = ask.directory.glob("*.npz")
    _, cov = first.moments["pool"]
    np.savez(path, mean_pool=np.array([Evil(str(marker))], object), cov_pool=cov, count=first.count)
    assert_equal(ask(), first)
    assert ask.loads == 2 and not marker.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"cov_pool": lambda cov: -cov},
        {"cov_pool": lambda cov: cov.astype(complex)},
        {"mean_pool": lambda mean: mean * np.nan},
        {"features": lambda rows: rows * np.nan},
        {"labels": lambda labels: labels[1:]},
    ],
)
def test_numbers_that_are_no_statistics_are_damage(ask, change):
    """A whole file of such numbers, which would score 0 or nothing."""
    first = ask()
    (path,) = ask.directory.glob("*.npz")
    with np.load(path) as file:
        arrays = dict(file)
    ((name, damage),) = change.items()
    np.savez(path, **{**arrays, name: damage(arrays[name])})
    assert_equal(ask(), first)
    assert ask.loads == 2


def test_features_of_large_sets_are_not_kept(ask, monkeypatch):
    monkeypatch.setattr(references, "MAX_STORED_FEATURES", 29)
    assert ask().features is None
    assert ask().features is None and ask.loads == 1


def test_numbers_are_computed_once_and_again_when_damaged(tmp_path, capsys):
    calls = []

    def compute():
        calls.append(1)
        return {"distance": 0.1 + 0.2}

    def ask_numbers(identity):
        return Cache(tmp_path).numbers(identity, compute)

    assert ask_numbers({"a": 1}) == ask_numbers({"a": 1}) == {"distance": 0.1 + 0.2}
    assert len(calls) == 1
    ask_numbers({"a": 2})
    assert len(calls) == 2
    for path in tmp_path.glob("*.json"):
        path.write_text(path.read_text().replace("0.3", "0.4"))
    assert ask_numbers({"a": 1}) == {"distance": 0.1 + 0.2}
    assert "checksum" in capsys.readouterr().err


def test_an_unwritable_cache_is_told_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--cache_dir=.*file"):
        Cache(tmp_path / "file" / "cache")
