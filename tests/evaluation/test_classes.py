"""Class by class, and never between classes that only share a number without a word."""

import numpy as np
import pytest

from mcm_jax.evaluation import classes


def test_classes_that_one_side_lacks_are_left_out():
    rows = np.random.default_rng(0).normal(size=(12, 3))
    labels = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 4, 4])
    reference_labels = np.array([0, 0, 0, 1, 1, 1, 9, 9, 9, 3, 3, 4])
    found = classes.class_distance(rows, labels, rows[::-1], reference_labels)
    expected = [
        classes.class_distance(rows[labels == n], labels[labels == n], rows[::-1], reference_labels)
        for n in (0, 1)
    ]
    assert found == pytest.approx(np.mean(expected)) and found > 0
    assert np.isnan(classes.class_distance(rows, labels, rows, reference_labels + 10))


RNG = np.random.default_rng(0)
LABELS = np.repeat(np.arange(12), 4)


def images_of_classes(spread, noise=1.0, labels=LABELS):
    """Features whose classes lie `spread` apart, with that much noise within each."""
    means = spread * np.random.default_rng(1).normal(size=(12, 64))
    return means[labels] + noise * RNG.normal(size=(len(labels), 64))


def renumbered(order):
    """Labels of the classes in another order."""
    return np.argsort(order)[LABELS]


TEXT_ORDER = sorted(range(12), key=str)


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        (renumbered(TEXT_ORDER), "2 like 10, 3 like 11, 4 like 2, 5 like 3, 6 like 4, ..."),
        (np.where(LABELS < 9, LABELS + 1, 0), "like 0, 2 like 1, 3 like 2"),
    ],
    ids=["order of text", "shifted within the reference's"],
)
@pytest.mark.parametrize("spread", [1.0, 100.0])
def test_classes_that_are_numbered_differently_are_noted(labels, shown, spread):
    rows, reference = images_of_classes(spread), images_of_classes(spread)
    assert classes.class_notes(rows, LABELS, reference, LABELS) == []
    *_, note = classes.class_notes(rows, labels, reference, LABELS)
    assert shown in note and "check that both number their classes alike" in note


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_a_model_that_knows_no_classes_is_not_suspected(noise):
    """Whatever its samples' noise, and with many or few reference images in a class."""
    reference_labels = np.concatenate([np.repeat(np.arange(12), 4), np.repeat(np.arange(4), 50)])
    reference = images_of_classes(1.0, labels=reference_labels)
    rows = images_of_classes(0.0, noise)
    assert classes.class_notes(rows, LABELS, reference, reference_labels) == []


def test_classes_that_are_left_out_are_noted():
    rows = images_of_classes(1.0)
    labels = np.where(LABELS < 5, LABELS, 0)
    (note,) = classes.class_notes(rows, labels, images_of_classes(1.0, labels=labels), LABELS)
    assert "class_fid is over 5 of 12 classes" in note
    notes = classes.class_notes(rows, LABELS + 100, rows, LABELS)
    assert notes == [
        "class_fid is over 0 of 24 classes; the others have fewer than two samples or reference images"
    ]
