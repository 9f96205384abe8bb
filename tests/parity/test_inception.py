"""Our Inception network beside torch-fidelity's and pytorch-fid's, with the same random weights in all."""

import numpy as np
import pytest

from mcm_jax.evaluation import inception_weights
from mcm_jax.evaluation.features import Extractor

torch = pytest.importorskip("torch")
pytest.importorskip("pytorch_fid")
pytest.importorskip("torch_fidelity")
from tests import torch_inception

# Float32 sums over up to 3,456 products, in another order, through 20 layers.
TOLERANCE = 1e-4
# Names of torch-fidelity's, by ours; "biased" is not among ours.
NAMES = {"pool": "2048", "logits": "logits_unbiased", "biased": "logits"}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch_inception.write_random_weights(path)
    return path


@pytest.fixture(scope="module")
def ours(file):
    return Extractor(inception_weights.load(file).network(), batch_per_device=3)


@pytest.fixture(scope="module")
def fidelity(file):
    run = torch_inception.torch_fidelity(file, features=tuple(NAMES.values()))

    def by_our_names(images):
        found = run(images)
        return {ours: found[theirs] for ours, theirs in NAMES.items()} | {"spatial": found["spatial"]}

    return by_our_names


def images(size, count=3):
    """Smooth and noisy ones, dark and bright."""
    draw = np.random.default_rng(size)
    noise = draw.integers(0, 256, (count, size, size, 3), np.uint8)
    ramp = np.linspace(0, 255, size, dtype=np.uint8)
    noise[0] = ramp[:, None, None]
    noise[1] //= 4
    return noise


def assert_close(found, expected):
    """Row by row, by the norm of the difference."""
    difference = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert difference.max() < TOLERANCE
    # What is compared tells images apart, a hundred times as well as the tolerance.
    apart = np.linalg.norm(expected[0] - expected[-1]) / np.linalg.norm(expected[0])
    assert apart > 100 * TOLERANCE


@pytest.mark.parametrize("layout", [False, True])
def test_both_layouts_of_a_real_pth(file, layout, tmp_path):
    path = tmp_path / "again.pth"
    state = torch.load(file, weights_only=True)
    torch.save(state, path, _use_new_zipfile_serialization=layout)
    assert inception_weights.load(path).sha256 == inception_weights.load(file).sha256


@pytest.mark.parametrize("size", [32, 64, 128, 256, 299, 33])
def test_features_are_torch_fidelitys(ours, fidelity, size):
    drawn = images(size)
    found, expected = ours(drawn), fidelity(drawn)
    for name in ("pool", "spatial", "logits"):
        assert_close(found[name], expected[name])


def test_the_classifiers_bias_is_what_our_logits_lack(file, ours, fidelity):
    drawn = images(64)
    bias = inception_weights.load(file).params["fc.bias"]
    assert_close(ours(drawn)["logits"] + bias, fidelity(drawn)["biased"])


def test_features_are_pytorch_fids(file, ours):
    """At 299 with its resize off and the same scaling: its own grid and scaling are others."""
    drawn = images(299)
    expected = torch_inception.pytorch_fid_pool(file, as_published=False)(drawn)
    assert_close(ours(drawn)["pool"], expected["pool"])
