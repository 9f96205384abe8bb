"""The attributes of captions are found in images: counted as defined, trained, stored, and reported."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from mcm_jax.data import avatars, preparation
from mcm_jax.evaluation import attributes, caption_scores
from mcm_jax.evaluation.attributes import Classifier
from mcm_jax.system.errors import InputError

QUESTIONS = [question.name for question in attributes.questions()]
PERFECT = {split: dict.fromkeys(QUESTIONS, 1.0) for split in ("test", "heldout")}
PURPLE = "a purple critter with one eye, a frown and horns on a grey background"


def known(answers, accuracies=PERFECT):
    """A classifier that gives these answers to whatever images."""

    class Known(Classifier):
        def predictions(self, images):
            return np.array(answers, np.int32)[: len(images)]

    return Known({}, 16, "data", accuracies)


def answer(**named):
    """Answers to all questions: those named (critters__color='red'), and the first value of all others."""
    words = {name.replace("__", "."): word for name, word in named.items()}
    return [
        question.values.index(words[question.name]) if question.name in words else 0
        for question in attributes.questions()
    ]


IMAGES = np.zeros((1, 16, 16, 3), np.uint8)
RIGHT = {
    "style": "critters",
    "critters__color": "purple",
    "critters__eyes": "one eye",
    "critters__mouth": "a frown",
    "critters__top": "horns",
    "critters__background": "grey",
}


@pytest.mark.parametrize("style", avatars.STYLES)
def test_answers_are_the_attributes(style):
    rng = np.random.default_rng(0)
    drawn = [avatars.random_avatar(rng, style) for _ in range(20)]
    found = attributes.answers([avatar.caption for avatar in drawn])
    for avatar, row in zip(drawn, found, strict=True):
        words = {
            question.name: question.values[index]
            for question, index in zip(attributes.questions(), row, strict=True)
            if index >= 0
        }
        assert words == {"style": style} | {
            f"{style}.{name}": word for name, word in avatar.attributes.items()
        }


def test_a_caption_without_attributes_has_no_answers():
    assert (attributes.answers(["", "a bicycle"]) == -1).all()


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (RIGHT, 6),
        (RIGHT | {"critters__color": "red"}, 5),
        (RIGHT | {"critters__color": "red", "critters__eyes": "two eyes"}, 4),
        # In a planet, a purple critter's color doesn't count.
        (RIGHT | {"style": "planets"}, 0),
        # What other styles' attributes would be doesn't matter.
        (RIGHT | {"planets__color": "blue"}, 6),
    ],
)
def test_found_attributes(image, found):
    classifier = known([answer(**image)])
    assert [int(count[0]) for count in classifier(IMAGES, [PURPLE])] == [found, 6]


def test_a_prompt_that_names_few_attributes_is_scored_by_these():
    classifier = known([answer(**RIGHT)])
    assert [int(count[0]) for count in classifier(IMAGES, ["a purple critter"])] == [2, 2]


@pytest.mark.parametrize("split", ["test", "heldout"])
def test_attributes_that_are_not_recognised_are_left_out(split):
    accuracies = {name: dict(shares) for name, shares in PERFECT.items()}
    accuracies[split]["critters.color"] = 0.99
    classifier = known([answer(**RIGHT)], accuracies)
    assert [int(count[0]) for count in classifier(IMAGES, [PURPLE])] == [5, 5]
    assert "critters.color           " in attributes.report(classifier)
    (line,) = [line for line in attributes.report(classifier).splitlines() if "omitted" in line]
    assert "99.00%" in line and line.startswith("critters.color")


@pytest.fixture(scope="module")
def info(tmp_path_factory):
    directory = tmp_path_factory.mktemp("avatars") / "data"
    plan = preparation.plan(dataset="avatars", resolution=16, manual_dir=None, name=None, num=300, workers=0)
    return preparation.prepare(plan, data_dir=directory, overwrite=False)[0]


@pytest.fixture(scope="module", autouse=True)
def small_network():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attributes, "_WIDTHS", (8, 8, 16))
        patch.setattr(attributes, "_BATCH", 32)
        forget()
        yield
    forget()


def forget():
    """Forgets networks of other sizes."""
    attributes._graph.cache_clear()
    attributes._apply.cache_clear()


@pytest.fixture(scope="module")
def classifier(info):
    return attributes.train(info, epochs=20)


def test_it_learns(classifier, info):
    """300 drawings teach the styles and a little more."""
    assert classifier.accuracies["test"]["style"] > 0.9
    bounds = caption_scores.bounds(dataclasses.replace(classifier, accuracies=PERFECT), info, "heldout")
    assert bounds["heldout_images_attributes_300"] > bounds["other_captions_attributes_300"] + 0.2


def test_answers_do_not_depend_on_the_number_of_images(classifier):
    images = np.random.default_rng(0).integers(0, 256, (131, 16, 16, 3), np.uint8)
    np.testing.assert_array_equal(classifier.predictions(images)[130:], classifier.predictions(images[130:]))


def test_it_comes_back(classifier, tmp_path):
    attributes.write(classifier, tmp_path / "file")
    back = attributes.read(tmp_path / "file")
    assert (back.resolution, back.accuracies, back.sha256) == (16, classifier.accuracies, classifier.sha256)
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    np.testing.assert_array_equal(back.predictions(images), classifier.predictions(images))


def test_other_parameters_or_omissions_have_another_hash(classifier):
    moved = dataclasses.replace(classifier, params=jax.tree.map(lambda leaf: leaf + 1, classifier.params))
    others = dataclasses.replace(classifier, accuracies=PERFECT)
    assert len({classifier.sha256, moved.sha256, others.sha256}) == 3


def rewritten(content, change):
    """The file after a change of its tensors and its description."""
    tensors = load_tensors(content)
    description = json.loads(
        json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["description"]
    )
    change(tensors, description)
    return save_tensors(tensors, {"description": json.dumps(description)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, _: tensors.popitem(), "is damaged"),
        (lambda tensors, _: tensors.update({"out.bias": np.zeros(3, np.float32)}), "has shape"),
        (lambda _, described: described.update(resolution="16"), "is damaged"),
        (lambda _, described: described.update(resolution=24), "has shape"),
        (lambda _, described: described["questions"].pop(), "asks for attributes of another version"),
        (lambda _, described: described["accuracies"]["test"].pop("style"), "is damaged"),
        (lambda _, described: described.clear(), "is damaged"),
    ],
)
def test_damaged_files(change, message, classifier, tmp_path):
    path = tmp_path / "file"
    attributes.write(classifier, path)
    path.write_bytes(rewritten(path.read_bytes(), change))
    with pytest.raises(InputError, match=message) as caught:
        attributes.read(path)
    assert str(path) in str(caught.value) and "train the classifier again" in str(caught.value)


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_truncated_files(cut, classifier, tmp_path):
    path = tmp_path / "file"
    attributes.write(classifier, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match="is damaged"):
        attributes.read(path)


def test_only_avatars_have_attributes(info):
    with pytest.raises(InputError, match="--classifier applies only to avatars"):
        attributes.train(dataclasses.replace(info, dataset="openmoji"))
    with pytest.raises(InputError, match="applies only to runs on avatars"):
        attributes.load(dataclasses.replace(info, dataset="openmoji"))


def test_the_loss_of_an_image_does_not_depend_on_the_others():
    network = attributes.Network(16, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (3, 16, 16, 3))
    truth = jnp.asarray(attributes.answers([PURPLE, "a purple critter", PURPLE]))
    together = attributes._loss(network(images), truth)
    alone = [attributes._loss(network(images[n : n + 1]), truth[n : n + 1]) for n in range(3)]
    np.testing.assert_allclose(together, np.mean(alone), rtol=1e-5)
