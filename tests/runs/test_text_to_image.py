"""From a teacher to a student of few steps, conditioned on captions, and prompts for its samples."""

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from mcm_jax.data import embeddings, preparation
from mcm_jax.exporting import folders, programs
from mcm_jax.runs import trainer, workdirs
from mcm_jax.runs.run import load_run
from mcm_jax.system.errors import InputError
from mcm_jax.text import encoders
from tests import tiny
from tests.text import tiny as tiny_encoders

PROMPTS = ["a b c", "d e", "", "a b c"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The directory of a tiny BERT."""
    directory = tmp_path_factory.mktemp("encoders") / "words"
    directory.mkdir()
    tiny_encoders.write(directory, tiny_encoders.BERT)
    return directory


@pytest.fixture(scope="module")
def data_dir(encoder, tmp_path_factory):
    """folder/tiny, in which an image's number is its caption's length."""
    directory = tmp_path_factory.mktemp("captioned")
    tiny.prepare_folder(directory)
    for n, image in enumerate(sorted((directory / "images").rglob("*.png"))):
        image.with_suffix(".txt").write_text(" ".join(tiny_encoders.WORDS[: n % 7 + 1]))
    plan = preparation.plan(dataset="folder", resolution=8, manual_dir=str(directory / "images"), name="tiny")
    info, _ = preparation.prepare(plan, data_dir=directory / "data", overwrite=True)
    embeddings.write(info, encoders.load(encoder, length=9))
    return directory / "data"


def config(data_dir, objective="diffusion", teacher=None):
    result = tiny.config(data_dir, objective, teacher)
    result.data.encoder = "words"
    result.training.num_steps = 2
    if objective == "diffusion":
        result.diffusion.label_dropout = 0.5
    elif objective == "guidance":
        result.guidance.teacher_guidance = 1.0
    return result


@pytest.fixture(scope="module")
def teacher(data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "teacher"
    assert trainer.train(config(data_dir), workdir)
    return workdir


@pytest.fixture(scope="module")
def run(teacher, encoder):
    """With parameters away from the initial zeros, so that the captions matter."""
    run = load_run(teacher)
    run.text_encoder(encoder)
    flat, unflatten = ravel_pytree(run.params)
    return run.with_params(unflatten(flat + 0.2 * jax.random.normal(jax.random.key(0), flat.shape)))


def test_the_papers_chain(data_dir, teacher, encoder, tmp_path):
    """Teacher, guidance distillation, consistency distillation (SPEC 10)."""
    assert trainer.train(config(data_dir, "guidance", teacher), tmp_path / "guidance")
    assert trainer.train(config(data_dir, "cd", tmp_path / "guidance"), tmp_path / "cd")
    student = load_run(tmp_path / "cd")
    student.text_encoder(encoder)
    images, _ = student.sample(4, prompts=PROMPTS)
    assert images.shape == (4, 8, 8, 3)


def test_a_prompt_changes_the_image_and_nothing_else_does(run):
    images, labels = run.sample(4, prompts=PROMPTS, steps=2)
    again, _ = run.sample(4, prompts=["a b c", "e d c", "a", "a b c"], steps=2)
    assert [np.array_equal(a, b) for a, b in zip(images, again, strict=True)] == [True, False, False, True]
    np.testing.assert_array_equal(labels, 0)


def test_without_prompts_captions_of_the_test_split_are_drawn(run):
    images, labels = run.sample(6, steps=2)
    part, part_labels = run.sample(2, steps=2, first=3)
    np.testing.assert_array_equal(part, images[3:5])
    np.testing.assert_array_equal(part_labels, labels[3:5])
    assert run.label_rule() == "test_captions" and set(labels) <= set(run.images("test")[1])


def test_it_is_exported_with_its_parameters_but_not_as_a_sampler(run, teacher, encoder, data_dir, tmp_path):
    """A program without the text encoder could not read prompts."""
    folders.write_model(run, workdirs.read(teacher), tmp_path)
    loaded = load_run(tmp_path, data_dir=data_dir)
    loaded.text_encoder(encoder)
    for options in ({"prompts": PROMPTS}, {}):
        expected, _ = run.sample(4, steps=2, **options)
        np.testing.assert_array_equal(loaded.sample(4, steps=2, **options)[0], expected)
    card = (tmp_path / "README.md").read_text()
    assert 'pipeline_tag: "text-to-image"' in card and "conditioned on captions, embedded by words" in card
    with pytest.raises(InputError, match=r"is conditioned on captions, .* use --format=safetensors"):
        programs.exported_sampler(run, run.sampling())


def test_guidance_is_away_from_no_caption(run):
    """An empty prompt is what guidance leads away from, so there it changes nothing but last bits."""
    plain, guided = (run.sample(4, prompts=PROMPTS, steps=2, guidance=g)[0].astype(int) for g in (0.0, 4.0))
    changed = np.abs(plain - guided).max(axis=(1, 2, 3))
    assert changed[2] <= 1 and changed[[0, 1, 3]].min() > 1


def test_the_variance_is_measured_with_captions(run):
    images, _ = run.sample(2, prompts=PROMPTS[:2], steps=2, sampler="addim", x_var="measured")
    assert images.shape == (2, 8, 8, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": ["a"]}, "1 prompts for 2 images"),
        ({"labels": np.zeros(2, np.int32)}, "conditioned on captions; use prompts instead of labels"),
    ],
)
def test_prompts_that_do_not_fit(given, message, run):
    with pytest.raises(InputError, match=message):
        run.sample(2, steps=2, **given)


def test_another_encoder_is_refused_by_its_hash(teacher, tmp_path):
    other = tmp_path / "words"
    other.mkdir()
    tiny_encoders.write(other, tiny_encoders.BERT, seed=1)
    with pytest.raises(InputError, match="is not the one that embedded this run's captions"):
        load_run(teacher).text_encoder(other)


def test_prompts_for_classes(tiny_data, tmp_path):
    raw = tiny.config(tiny_data)
    raw.training.num_steps = 1
    assert trainer.train(raw, tmp_path / "run")
    run = load_run(tmp_path / "run")
    with pytest.raises(InputError, match="conditioned on class labels; use labels instead of prompts"):
        run.sample(1, prompts=["a"])
    with pytest.raises(InputError, match="it has no text encoder"):
        run.text_encoder()


def test_a_teacher_of_labels_has_nothing_to_teach_about_captions(data_dir, tmp_path):
    raw = tiny.config(data_dir)
    raw.training.num_steps = 1
    assert trainer.train(raw, tmp_path / "labels")
    with pytest.raises(
        InputError, match="was trained with class labels, this run's data has captions of 9 tokens"
    ):
        trainer.train(config(data_dir, "cd", tmp_path / "labels"), tmp_path / "cd")


def test_captions_that_are_not_embedded(tiny_data, tmp_path):
    with pytest.raises(InputError, match="are not embedded by words; repeat the command that prepared them"):
        trainer.train(config(tiny_data), tmp_path / "run")


def test_embeddings_that_changed_since(data_dir, teacher, encoder):
    """The run continues only on what it was trained on."""
    run = load_run(teacher)
    path = embeddings.directory(run.dataset, "words") / "summary.json"
    before = path.read_text()
    try:
        path.write_text(before.replace(run.dataset.encoding.captions_sha256, "0" * 64))
        with pytest.raises(InputError, match="other embeddings"):
            run.sample(1, steps=1)
        raw = config(data_dir)
        raw.training.num_steps = 3
        with pytest.raises(InputError, match="other embeddings of captions"):
            trainer.train(raw, teacher)
    finally:
        path.write_text(before)
