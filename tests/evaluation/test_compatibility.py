"""Images of another size, or with other numbers for the classes, are not compared."""

import numpy as np
import pytest

from mcm_jax.data import layout
from mcm_jax.evaluation.compatibility import ReferenceImages, reference_images
from mcm_jax.system.errors import InputError
from tests.limits import refusal

KNOWN = ReferenceImages(size=(16, 16), class_names=("cat", "dog", "eel"), class_counts=(5, 5, 5))


def test_what_a_prepared_data_set_says(tiny_data):
    directory = layout.dataset_dir(tiny_data, dataset="folder/tiny", resolution=8)
    found = reference_images(directory, split="train")
    assert found.size == (8, 8) and found.class_names == ("even", "odd")
    assert found.class_counts == layout.read_summary(directory).class_counts["train"]


def test_what_a_file_says(tmp_path):
    path = tmp_path / "reference.npz"
    np.savez(path, np.zeros((4, 8, 12, 3), np.uint8), np.array([0, 2, 2, 3]))
    assert reference_images(path) == ReferenceImages(size=(8, 12), class_counts=(1, 0, 2, 1))
    for arrays in ({"mu": np.zeros(3)}, {"arr_0": np.zeros(3), "arr_1": np.array([-1, 0])}):
        np.savez(path, **arrays)
        assert reference_images(path) == ReferenceImages()


def test_nothing_is_known_without_a_reference_or_a_data_set(tmp_path):
    assert reference_images(None) == reference_images(tmp_path) == ReferenceImages()


@pytest.mark.parametrize("size", [(64, 64), (8, 8), (16, 32)])
def test_another_size_is_refused(size):
    message = rf"x\.npz has images of {size[1]}x{size[0]} pixels but --reference has images of 16x16 pixels"
    with pytest.raises(InputError, match=message):
        KNOWN.require_size(size, what="x.npz")
    KNOWN.require_size((16, 16), what="x.npz")
    ReferenceImages().require_size(size, what="x.npz")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("cat", "eel", "dog"), "class 1 is 'eel' for runs/cd4 but 'dog' for --reference"),
        (("cat", "dog"), "class 2 is missing for runs/cd4 but 'eel' for"),
        (("cat", "dog", "eel", "fly"), "class 3 is 'fly' for runs/cd4 but missing for"),
    ],
)
def test_other_classes_are_refused(names, message):
    with pytest.raises(InputError, match=message):
        KNOWN.require_class_names(names, what="runs/cd4")
    KNOWN.require_class_names(KNOWN.class_names, what="runs/cd4")
    ReferenceImages(class_counts=(1,)).require_class_names(names, what="runs/cd4")


@pytest.mark.parametrize(
    ("shift", "message"),
    [
        (1, "an image of class 3, but --reference has only classes 0 to 2; number the classes from 0"),
        (100, "an image of class 100, but"),
        (-1, "an image of class -1, but"),
    ],
)
def test_labels_that_are_no_classes_are_refused(shift, message):
    labels = np.repeat(np.arange(3), 2)
    with pytest.raises(InputError, match=message):
        KNOWN.require_labels(labels + shift, what="x.npz")
    KNOWN.require_labels(labels, what="x.npz")
    ReferenceImages().require_labels(labels + shift, what="x.npz")


def test_classes_of_single_images_are_refused():
    with pytest.raises(InputError, match=r"no class has 2 images or more both in x\.npz and in --reference"):
        KNOWN.require_labels(np.arange(3), what="x.npz")
    KNOWN.require_labels(np.array([0, 1, 1]), what="x.npz")


def test_a_label_of_billions_of_classes_is_one_line(tmp_path):
    path = tmp_path / "reference.npz"
    np.savez(path, arr_0=np.zeros((2, 4, 4, 3), np.uint8), arr_1=np.array([0, 10**10]))
    found = refusal(lambda: reference_images(path))
    assert found is not None and "arr_1 has the label 10000000000" in found
