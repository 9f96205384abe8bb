"""Files of the layouts that others publish are read by what is in them, and nothing else is taken for one."""

import hashlib
import pickle

import numpy as np
import pytest

from mcm_jax.evaluation import published
from mcm_jax.system.errors import InputError
from tests.evaluation.pixels import PixelExtractor, network

EXTRACTOR = PixelExtractor(network((("pool", 5), ("spatial", 3), ("logits", 4)), distance="fid"))
DRAW = np.random.default_rng(0)
FACTOR = DRAW.normal(size=(5, 5))
MU, SIGMA = DRAW.normal(size=5), FACTOR @ FACTOR.T
SPATIAL = {"mu_s": MU[:3], "sigma_s": SIGMA[:3, :3]}
IMAGES = DRAW.integers(0, 256, (7, 4, 4, 3), np.uint8)


def npz(**arrays):
    return lambda path: np.savez(path.open("wb"), **arrays)


def pickled(value, protocol=4):
    return lambda path: path.write_bytes(pickle.dumps(value, protocol=protocol))


LAYOUTS = {
    "ADM's": npz(mu=MU, sigma=SIGMA, arr_0=IMAGES, **SPATIAL),
    "EDM's": npz(mu=MU, sigma=SIGMA),
    "ref_": npz(ref_mu=MU, ref_sigma=SIGMA),
    "pickle": pickled({"mu": MU, "sigma": SIGMA}),
    "old pickle": pickled({"mu": MU, "sigma": SIGMA}, protocol=2),
    "EDM2's": pickled({"fid": {"mu": MU, "sigma": SIGMA}, "fd_dinov2": {"mu": MU[:2], "sigma": SIGMA}}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments_of_every_layout(layout, tmp_path):
    path = tmp_path / "reference"
    LAYOUTS[layout](path)
    reference = published.read(path, EXTRACTOR, single_images=True)
    np.testing.assert_array_equal(reference.moments["pool"][0], MU)
    np.testing.assert_array_equal(reference.moments["pool"][1], SIGMA)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert reference.description == {"file": "reference", "sha256": sha256, "count": None}
    assert reference.sha256 == sha256 and not reference.rank_deficient
    assert ("spatial" in reference.moments) == (reference.features is not None) == (layout == "ADM's")


def test_adms_images_and_spatial_moments(tmp_path):
    path = tmp_path / "reference"
    LAYOUTS["ADM's"](path)
    reference = published.read(path, EXTRACTOR, single_images=True)
    np.testing.assert_array_equal(reference.features, EXTRACTOR(IMAGES)["pool"])
    np.testing.assert_array_equal(reference.moments["spatial"][1], SIGMA[:3, :3])


def test_adms_images_are_left_alone_where_nothing_needs_them(tmp_path):
    path = tmp_path / "reference"
    LAYOUTS["ADM's"](path)
    assert published.read(path, EXTRACTOR).features is None


def test_float32_moments_are_widened(tmp_path):
    path = tmp_path / "reference"
    npz(mu=MU.astype(np.float32), sigma=SIGMA.astype(np.float32))(path)
    assert published.read(path, EXTRACTOR).moments["pool"][1].dtype == np.float64


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (npz(arr_0=IMAGES), "holds arr_0, and neither mu and sigma nor ref_mu"),
        (npz(mu=MU[:3], sigma=SIGMA[:3, :3]), "moments of shapes .*, not of 5 features"),
        (npz(mu=MU, sigma=SIGMA[:3]), "mu and sigma of shapes"),
        (npz(mu=np.full(5, np.nan), sigma=SIGMA), "not finite"),
        (npz(mu=MU, sigma=SIGMA + np.arange(5)), "sigma is no covariance, being not symmetric"),
        (npz(mu=MU, sigma=SIGMA, arr_0=IMAGES / 255), "arr_0 holds no uint8 images"),
        (npz(mu=MU, sigma=SIGMA, mu_s=MU, sigma_s=SIGMA), "spatial: moments of shapes"),
        (pickled([MU, SIGMA]), "holds nothing"),
        (pickled({"mu": print}), "refers to builtins.print"),
        (lambda path: path.write_bytes(b"PK and no more"), "is damaged"),
        (lambda path: path.write_bytes(b"text"), "not a pickle of plain arrays"),
        (lambda path: None, "can't be read"),
    ],
)
def test_what_is_no_reference(write, said, tmp_path):
    path = tmp_path / "reference"
    write(path)
    with pytest.raises(InputError, match=said) as error:
        published.read(path, EXTRACTOR, single_images=True)
    assert str(error.value).startswith(f"--reference={path}") and "\n" not in str(error.value)


def test_a_cut_off_file_is_none(tmp_path):
    path = tmp_path / "reference"
    for layout in ("ADM's", "pickle"):
        LAYOUTS[layout](path)
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(InputError, match=r"is damaged|not a pickle"):
            published.read(path, EXTRACTOR, single_images=True)
