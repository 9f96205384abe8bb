"""Files of the layouts that others publish are read by what is in them, and nothing else is taken for one."""

import functools
import hashlib
import pickle

import numpy as np
import pytest

from mcm_jax.evaluation import published
from mcm_jax.evaluation.references import Cache
from mcm_jax.system.errors import InputError
from tests.evaluation.pixels import PixelExtractor, network


@pytest.fixture
def read(tmp_path):
    """`published.read`, with a cache."""
    return functools.partial(published.read, extractor=EXTRACTOR, cache=Cache(tmp_path / "cache"))


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
def test_moments_of_every_layout(layout, tmp_path, read):
    path = tmp_path / "reference"
    LAYOUTS[layout](path)
    reference = read(path, single_images=True)
    np.testing.assert_array_equal(reference.moments["pool"][0], MU)
    np.testing.assert_array_equal(reference.moments["pool"][1], SIGMA)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert reference.description == {"file": "reference", "sha256": sha256, "count": None}
    assert reference.sha256 == sha256 and not reference.rank_deficient
    assert ("spatial" in reference.moments) == (reference.features is not None) == (layout == "ADM's")


EDM2S = {"fid": {"mu": MU, "sigma": SIGMA}, "fd_dinov2": {"mu": MU[:2], "sigma": SIGMA[:2, :2]}}


def of_distance(distance, size):
    return PixelExtractor(network((("pool", size),), distance=distance))


@pytest.mark.parametrize(("distance", "size"), [("fid", 5), ("fd_dinov2", 2)])
def test_edm2s_file_has_moments_for_each_distance(distance, size, tmp_path):
    path, cache = tmp_path / "img64.pkl", Cache(tmp_path / "cache")
    extractor, other = of_distance(distance, size), "fd_dinov2" if distance == "fid" else "fid"
    pickled(EDM2S)(path)
    mean, cov = published.read(path, extractor, cache).moments["pool"]
    np.testing.assert_array_equal(mean, MU[:size])
    np.testing.assert_array_equal(cov, SIGMA[:size, :size])
    pickled({other: EDM2S[other]})(path)
    message = f"img64.pkl has statistics of {other}, but none of {distance}; use a file that has them"
    with pytest.raises(InputError, match=message) as error:
        published.read(path, extractor, cache)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("write", [npz(mu=MU, sigma=SIGMA), pickled({"mu": MU, "sigma": SIGMA})])
def test_inceptions_moments_are_not_dinov2s(write, tmp_path):
    write(tmp_path / "reference")
    with pytest.raises(InputError, match=r"instead of 2 features\); give a file that was made with dinov2-v"):
        published.read(tmp_path / "reference", of_distance("fd_dinov2", 2), Cache(tmp_path / "cache"))


def test_moments_of_another_size_of_dinov2_are_refused(tmp_path):
    pickled(EDM2S)(tmp_path / "reference")
    with pytest.raises(InputError, match="of fid and fd_dinov2, but none of fd_dinov2_other"):
        published.read(tmp_path / "reference", of_distance("fd_dinov2_other", 2), Cache(tmp_path / "cache"))


def test_adms_images_and_spatial_moments(tmp_path, read):
    path = tmp_path / "reference"
    LAYOUTS["ADM's"](path)
    reference = read(path, single_images=True)
    np.testing.assert_array_equal(reference.features, EXTRACTOR(IMAGES)["pool"])
    np.testing.assert_array_equal(reference.moments["spatial"][1], SIGMA[:3, :3])
    assert reference.labels is None
    npz(mu=MU, sigma=SIGMA, arr_0=IMAGES, arr_1=np.arange(7))(path)
    np.testing.assert_array_equal(read(path, single_images=True).labels, np.arange(7))


def test_adms_images_are_left_alone_where_nothing_needs_them(tmp_path, read):
    path = tmp_path / "reference"
    LAYOUTS["ADM's"](path)
    assert read(path).features is None


def test_float32_moments_are_widened(tmp_path, read):
    path = tmp_path / "reference"
    npz(mu=MU.astype(np.float32), sigma=SIGMA.astype(np.float32))(path)
    assert read(path).moments["pool"][1].dtype == np.float64


@pytest.mark.parametrize("labels", [None, np.arange(7)])
def test_the_moments_of_images_alone_are_computed_once(labels, tmp_path, monkeypatch):
    """As ADM's evaluator does."""
    path, cache = tmp_path / "reference.npz", Cache(tmp_path / "cache")
    npz(arr_0=IMAGES, **({} if labels is None else {"arr_1": labels}))(path)
    found = published.read(path, EXTRACTOR, cache)
    for name in ("pool", "spatial"):
        features = EXTRACTOR(IMAGES)[name].astype(np.float64)
        np.testing.assert_allclose(found.moments[name][0], features.mean(axis=0))
        np.testing.assert_allclose(found.moments[name][1], np.cov(features, rowvar=False), atol=1e-12)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.description == {"file": "reference.npz", "sha256": sha256, "count": 7}
    assert found.sha256 == sha256 and found.count == 7 and not found.rank_deficient
    np.testing.assert_array_equal(found.features, EXTRACTOR(IMAGES)["pool"])
    np.testing.assert_array_equal(found.labels, labels)
    monkeypatch.setattr(PixelExtractor, "__call__", None)
    again = published.read(path, EXTRACTOR, cache)
    np.testing.assert_array_equal(again.moments["pool"][1], found.moments["pool"][1])


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_rounded_and_singular_covariances_are_accepted(kind, tmp_path, read):
    """Numbers of any precision, of fewer images than features and even of equal ones."""
    path = tmp_path / "reference"
    for sigma in (SIGMA, FACTOR[:, :2] @ FACTOR[:, :2].T, np.zeros((5, 5))):
        npz(mu=MU.astype(kind), sigma=sigma.astype(kind))(path)
        np.testing.assert_array_equal(read(path).moments["pool"][1], sigma.astype(kind))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (npz(mu=MU), "holds mu, but neither mu and sigma nor ref_mu"),
        (npz(mu=MU[:3], sigma=SIGMA[:3, :3]), "mu and sigma: moments of shapes .* instead of 5 features"),
        (npz(mu=MU, sigma=SIGMA[:3]), "moments of shapes"),
        (npz(mu=np.full(5, np.nan), sigma=SIGMA), "not finite"),
        (npz(mu=MU, sigma=SIGMA + np.arange(5)), "a covariance that is not symmetric"),
        (npz(mu=MU, sigma=-SIGMA), "a covariance with negative eigenvalues"),
        (npz(mu=MU, sigma=SIGMA - 0.5 * np.eye(5)), "a covariance with negative eigenvalues"),
        (npz(ref_mu=MU, ref_sigma=-SIGMA), "ref_mu and ref_sigma: a covariance with negative"),
        (pickled({"fid": {"mu": MU, "sigma": -SIGMA}}), "a covariance with negative eigenvalues"),
        (npz(mu=MU, sigma=SIGMA, mu_s=MU[:3], sigma_s=-SIGMA[:3, :3]), "mu_s and sigma_s: a cov"),
        (npz(mu=MU, sigma=SIGMA.astype(complex)), "a covariance of dtype complex128 instead of real numbers"),
        (npz(mu=MU * 1j, sigma=SIGMA), "a mean of dtype complex128 instead of real numbers"),
        (npz(mu=MU, sigma=SIGMA > 0), "a covariance of dtype bool"),
        (npz(mu=MU, sigma=SIGMA, arr_0=IMAGES / 255), "arr_0 holds float64 .* instead of uint8 images"),
        (npz(mu=MU, sigma=SIGMA, arr_0=IMAGES, arr_1=np.ones(7)), "arr_1 holds float64 .* of 7 labels"),
        (npz(arr_0=IMAGES[:1]), "arr_0 holds 1 images, but moments need 2 or more"),
        (npz(arr_0=IMAGES % 2), "bytes of 0 and 1 only"),
        (npz(mu=MU, sigma=SIGMA, mu_s=MU, sigma_s=SIGMA), "mu_s and sigma_s: moments of shapes"),
        (pickled([MU, SIGMA]), "holds nothing"),
        (pickled({"mu": print}), "refers to builtins.print"),
        (lambda path: path.write_bytes(b"PK and no more"), "is damaged"),
        (lambda path: path.write_bytes(b"text"), "not a pickle of plain arrays"),
        (lambda path: None, "can't be read"),
    ],
)
def test_what_is_no_reference(write, message, tmp_path, read):
    path = tmp_path / "reference"
    write(path)
    with pytest.raises(InputError, match=message) as error:
        read(path, single_images=True)
    assert str(error.value).startswith(f"--reference={path}") and "\n" not in str(error.value)


def test_a_cut_off_file_is_none(tmp_path, read):
    path = tmp_path / "reference"
    for layout in ("ADM's", "pickle"):
        LAYOUTS[layout](path)
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(InputError, match=r"is damaged|not a pickle"):
            read(path, single_images=True)
