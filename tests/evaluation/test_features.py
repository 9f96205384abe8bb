"""A fixed padded batch over all devices: what comes out depends on the image and on nothing beside it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax.evaluation.features import Extractor, FeatureNetwork
from mcm_jax.system import sharding
from mcm_jax.system.errors import InputError


def two_features(params, images):
    """A product, whose sums an image could share with others, and a mean."""
    rows = images.reshape(len(images), -1).astype(jnp.float32)
    return {"pool": rows @ params, "spatial": rows.mean(axis=1, keepdims=True)}


PARAMS = np.random.default_rng(0).normal(size=(48, 5)).astype(np.float32)
NETWORK = FeatureNetwork(PARAMS, two_features, {"pool": 5, "spatial": 1}, "fid", {})
IMAGES = np.random.default_rng(1).integers(0, 256, (19, 4, 4, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=[1, pytest.param(8, marks=pytest.mark.multi_device)])
def extractor(request) -> Extractor:
    mesh = sharding.make_mesh(data=-1, fsdp=1) if request.param == 8 else None
    return Extractor(NETWORK, mesh=mesh, batch_per_device=8)


@pytest.mark.parametrize("batch", [1, 8, 16, 64])
def test_features_by_name_for_every_image(batch):
    """Batches that are a multiple of what a CPU computes at once, and one that is none."""
    found = Extractor(NETWORK, batch_per_device=batch)(IMAGES)
    rows = IMAGES.reshape(19, -1).astype(np.float64)
    np.testing.assert_allclose(found["pool"], rows @ PARAMS, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(found["spatial"][:, 0], rows.mean(axis=1), rtol=1e-6)
    assert found["pool"].dtype == np.float32


def test_features_do_not_depend_on_what_else_is_in_the_batch(extractor):
    """Bit for bit, however many images come at once."""
    whole = extractor(IMAGES)["pool"]
    alone = np.concatenate([extractor(IMAGES[i : i + 1])["pool"] for i in (8, 9, 10)])
    np.testing.assert_array_equal(whole[8:11], alone)
    changed = IMAGES.copy()
    changed[3] = 0
    same = np.arange(19) != 3
    np.testing.assert_array_equal(extractor(changed)["pool"][same], whole[same])
    assert np.abs(extractor(changed)["pool"][3] - whole[3]).max() > 1e-2


def test_no_images_have_no_features(extractor):
    found = extractor(IMAGES[:0])
    assert {name: rows.shape for name, rows in found.items()} == {"pool": (0, 5), "spatial": (0, 1)}


def test_features_that_are_not_finite_are_refused():
    """As damaged weights give them; their distance would be found to be none after all the work."""
    damaged = dataclasses.replace(NETWORK, params=np.full_like(PARAMS, np.nan))
    with pytest.raises(InputError, match=r"pool features of .* not finite, so its weights are damaged"):
        Extractor(damaged, batch_per_device=8)(IMAGES)


def test_images_of_another_size_are_another_program(extractor):
    wide = dataclasses.replace(NETWORK, params=PARAMS[:12])
    assert Extractor(wide, batch_per_device=8)(IMAGES[:, :2, :2])["pool"].shape == (19, 5)
