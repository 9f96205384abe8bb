"""Scores by captions: chosen by the data set, computed for captions that a run draws, with their bounds."""

import dataclasses

import numpy as np
import pytest

from mcm_jax.data import embeddings, preparation
from mcm_jax.evaluation import (
    attributes,
    caption_scores,
    captioned,
    efficientnet,
    evaluator,
    nearest_of_ten,
    scoring,
)
from mcm_jax.evaluation.features import Extractor
from mcm_jax.evaluation.nearest_of_ten import NearestOfTen
from mcm_jax.runs import trainer
from mcm_jax.runs.run import load_run
from mcm_jax.system.errors import InputError
from mcm_jax.text import encoders
from tests import tiny
from tests.data import test_emoji
from tests.evaluation.test_attributes import PERFECT, small_network
from tests.text import tiny as tiny_encoders

assert small_network


WIDTH = 16 * 16 * 3


class Pixels(Extractor):
    """The pixels as features."""

    def __init__(self):
        self.network = dataclasses.replace(
            efficientnet.network(efficientnet.load(), input_resolution=32), dimensions={"pool": WIDTH}
        )

    def __call__(self, images):
        return {"pool": images.reshape(len(images), -1).astype(np.float32)}


def embedded(info, directory):
    encoder = directory / "words"
    encoder.mkdir()
    tiny_encoders.write(encoder, tiny_encoders.BERT)
    encoding, _ = embeddings.write(info, encoders.load(encoder, length=8))
    return dataclasses.replace(info, encoding=encoding)


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    directory = tmp_path_factory.mktemp("emoji")
    test_emoji.write_tgz(directory / "FILE", test_emoji.package_files())
    plan = preparation.plan(dataset="emoji", resolution=16, manual_dir=str(directory / "FILE"), workers=0)
    return embedded(preparation.prepare(plan, data_dir=directory / "data", overwrite=False)[0], directory)


@pytest.fixture(scope="module")
def avatars(tmp_path_factory):
    directory = tmp_path_factory.mktemp("avatars")
    plan = preparation.plan(dataset="avatars", resolution=16, num=24, workers=0)
    return embedded(preparation.prepare(plan, data_dir=directory / "data", overwrite=False)[0], directory)


@pytest.fixture
def three(monkeypatch):
    """Three pictures instead of ten: the tiny data set has no more in a split."""
    monkeypatch.setattr(nearest_of_ten, "_CHOICES", 3)


def everything(info, split):
    """images, labels, captions"""
    source = caption_scores.open_split(info, split)
    indices = np.arange(len(source))
    return *source.gather(indices), source.captions(indices)


def test_a_picture_is_nearest_to_itself(emoji, three):
    images, labels, captions = everything(emoji, "heldout")
    points, most = NearestOfTen(emoji, Pixels())(images, captions)
    # Designs with too few pictures are left out.
    assert most.tolist() == [(labels == label).sum() >= 3 for label in labels]
    assert points.tolist() == most.tolist() and most.any() and not most.all()


def test_nine_others_of_the_same_design():
    labels = np.repeat([0, 1], 30)
    for index in range(60):
        chosen = nearest_of_ten._chosen(index, f"caption {index}", labels)
        assert chosen[0] == index and len(set(chosen.tolist())) == 10
        assert (labels[chosen] == labels[index]).all()
    first, again = (nearest_of_ten._chosen(3, caption, labels).tolist() for caption in ("a", "a"))
    assert first == again != nearest_of_ten._chosen(3, "b", labels).tolist()


def test_a_picture_as_near_as_its_own_is_not_enough(emoji, three):
    """Equal features, such as those of an empty image, are no answer."""

    class Same(Pixels):
        def __call__(self, images):
            return {"pool": np.zeros((len(images), WIDTH), np.float32)}

    images, _, captions = everything(emoji, "heldout")
    points, most = NearestOfTen(emoji, Same())(images, captions)
    assert most.any() and not points.any()


def names(metrics, info, **options):
    chosen = captioned.CaptionScores(metrics, **{"explicit": False, **options})
    chosen.check(info)
    return [score.name for score in chosen.of(info, Pixels())]


def test_the_data_set_decides(emoji, avatars, capsys):
    assert names(("frechet",), emoji) == ["nearest_of_ten"]
    assert names(("frechet",), emoji, explicit=True) == []
    assert names(("frechet",), dataclasses.replace(emoji, encoding=None)) == []
    assert names(("frechet",), avatars) == []
    assert "--dataset=avatars --resolution=16" in capsys.readouterr().out
    for metric, info, message in (
        (
            "attributes",
            avatars,
            "there is no .*avatars_16.safetensors; write it with: .* --classifier",
        ),
        ("attributes", emoji, "applies only to runs on avatars"),
        ("nearest_of_ten", avatars, "applies only to runs on emoji"),
        ("nearest_of_ten", dataclasses.replace(emoji, encoding=None), "conditioned on captions"),
    ):
        with pytest.raises(InputError, match=message):
            names((metric,), info, explicit=True)


def test_bounds(emoji, three):
    bounds = caption_scores.bounds(NearestOfTen(emoji, Pixels()), emoji, "heldout")
    count = emoji.num_examples["heldout"]
    assert bounds[f"heldout_images_nearest_of_ten_{count}"] == 1
    assert bounds[f"other_captions_nearest_of_ten_{count}"] < 1


def test_a_run_is_scored_by_the_captions_that_it_draws(avatars, tmp_path, capsys, monkeypatch):
    """Samples replaced by the drawings of their captions have the score of the drawings."""
    monkeypatch.setattr(evaluator, "Extractor", lambda network: Pixels())
    data_dir = avatars.path.parents[2]
    classifier = dataclasses.replace(attributes.train(avatars, epochs=1), accuracies=PERFECT)
    attributes.write(classifier, attributes.path_of(avatars))
    config = tiny.config(data_dir)
    config.data.update(dataset="avatars", resolution=16, encoder="words", horizontal_flip=False)
    config.training.num_steps = 1
    assert trainer.train(config, tmp_path / "run")
    capsys.readouterr()

    def load(*arguments, **options):
        run = load_run(*arguments, **options)

        def sample(num, *, seed, first, caption_split, **_):
            indices = np.arange(first, first + num, dtype=np.int32)
            source, drawn = run._drawn(caption_split or "test", seed, indices)
            return source.gather(drawn)

        run.sample = sample
        return run

    options = scoring.Options(
        workdirs=(tmp_path / "run",),
        num=200,
        captions=("test", "heldout"),
        untrained_num=0,
        cache_dir=tmp_path / "cache",
    )
    test, heldout = scoring.evaluate(options, load)
    assert [test.label_rule, heldout.label_rule] == ["test_captions", "heldout_captions"]
    assert test.grid != heldout.grid
    assert test.caption_scores == (f"attributes {classifier.sha256}",)
    for result, split in ((test, "test"), (heldout, "heldout")):
        run = load_run(tmp_path / "run")
        captions = run.drawn_captions(200, caption_split=split)
        source = caption_scores.open_split(avatars, split)
        place = {caption: n for n, caption in enumerate(source.captions(np.arange(len(source))))}
        images, _ = source.gather(np.array([place[caption] for caption in captions]))
        points, most = classifier(images, captions)
        assert result.metrics["attributes_200"] == pytest.approx(points.sum() / most.sum())
        assert 0 <= result.bounds["other_captions_attributes_24"] <= 1
    out = capsys.readouterr().out
    assert "share of the captions' attributes that are found in the samples" in out
    # Measured before, as the classifier is the same; again with another one.
    assert scoring.evaluate(options, load) == [test, heldout]
    attributes.write(
        dataclasses.replace(classifier, accuracies={"test": PERFECT["test"] | {"planets.sky": 0.5}}),
        attributes.path_of(avatars),
    )
    assert scoring.evaluate(options, load) != [test, heldout]


def test_captions_of_a_split_that_does_not_exist(teacher, tmp_path):
    for captions, message in (("heldout", "conditioned on class labels"),):
        options = scoring.Options(workdirs=(teacher,), captions=(captions,), cache_dir=tmp_path / "cache")
        with pytest.raises(InputError, match=message):
            scoring.evaluate(options, load_run)


def test_a_clip_that_would_not_be_used(emoji, tmp_path):
    for metrics, clip in ((("clip_score",), None), (("frechet",), tmp_path)):
        with pytest.raises(InputError, match="--metrics=clip_score and --clip=DIRECTORY need each other"):
            captioned.CaptionScores(metrics, explicit=True, clip=clip)
    labelled = dataclasses.replace(emoji, encoding=None)
    with pytest.raises(InputError, match="clip_score applies only to runs that are conditioned on captions"):
        captioned.CaptionScores(("frechet",), explicit=False, clip=tmp_path).check(labelled)
    clip = tiny_encoders.write(tmp_path / "clip-tiny", tiny_encoders.WHOLE_CLIP)
    chosen = captioned.CaptionScores(("frechet",), explicit=False, clip=clip)
    assert [score.name for score in chosen.of(emoji, Pixels())] == ["clip_score_clip-tiny", "nearest_of_ten"]
