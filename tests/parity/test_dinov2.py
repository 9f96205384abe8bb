"""Our DINOv2 beside transformers', which wrote its files, and beside torch's interpolation."""

import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax.evaluation import dinov2
from mcm_jax.evaluation.features import Extractor

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from tests.parity.test_text import randomise

# Float32, in another order of sums.
TOLERANCE = 1e-5
MEAN, DEVIATION = (torch.tensor(three).view(1, 3, 1, 1) for three in (dinov2._MEAN, dinov2._DEVIATION))


def images(side, count=3):
    """Bytes of 0 and 255 too, next to which a bicubic filter leaves the range."""
    draw = np.random.default_rng(side)
    drawn = draw.integers(0, 256, (count, side, side, 3), np.uint8)
    drawn[0] = 255 * (drawn[0] > 127)
    return drawn


def prepared(images):
    """As EDM2's calculate_metrics.py prepares images."""
    pixels = torch.tensor(images).permute(0, 3, 1, 2).to(torch.float32)
    pixels = torch.nn.functional.interpolate(pixels, size=(224, 224), mode="bicubic", antialias=True)
    return (pixels / 255 - MEAN) / DEVIATION


def hub_positions(stored, source, target):
    """As the repository facebookresearch/dinov2 resizes position embeddings [1, 1 + source^2, C]."""
    grid = stored[:, 1:].reshape(1, source, source, -1).permute(0, 3, 1, 2)
    scale = (target + 0.1) / source
    grid = torch.nn.functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    assert grid.shape[-2:] == (target, target)
    return torch.cat([stored[:, :1], grid.permute(0, 2, 3, 1).reshape(1, target**2, -1)], dim=1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=518, patch_size=14
    )
    model = transformers.Dinov2Model(config).eval()
    randomise(model)
    return model


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("dinov2")
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("side", [7, 32, 64, 128, 224, 256, 299, 512])
def test_images_are_resized_as_by_torch(side):
    drawn = images(side)
    expected = prepared(drawn).permute(0, 2, 3, 1).numpy()
    found = np.asarray(dinov2.normalised(jnp.asarray(drawn)))
    print(f"{side} pixels: {np.abs(found - expected).max():.1e}")
    assert side == 224 or (expected * dinov2._DEVIATION + dinov2._MEAN).max() > 1.01
    # A grey level is 0.017. The largest difference, at 128 pixels, is that of float32 coordinates.
    np.testing.assert_allclose(found, expected, atol=5e-5)


@pytest.mark.parametrize(("source", "target"), [(37, 16), (16, 37), (5, 4)])
def test_positions_are_resized_as_in_the_repository(source, target):
    stored = torch.randn((1, 1 + source**2, 8), generator=torch.Generator().manual_seed(0))
    expected = hub_positions(stored, source, target).numpy()
    found = dinov2.resized(jnp.asarray(stored.numpy()), source=source, target=target)
    np.testing.assert_allclose(found, expected, atol=5e-5)


def test_features_are_those_of_transformers(model, directory, monkeypatch):
    """With the repository's position embeddings; with its own, the difference is printed."""
    drawn = images(64)
    ours = Extractor(dinov2.network(directory), batch_per_device=3)(drawn)["pool"]
    with torch.no_grad():
        own = model(pixel_values=prepared(drawn)).pooler_output.numpy()
        positions = hub_positions(model.embeddings.position_embeddings, 37, 16)
        monkeypatch.setattr(model.embeddings, "interpolate_pos_encoding", lambda *_: positions)
        expected = model(pixel_values=prepared(drawn)).pooler_output.numpy()
    print(f"{np.abs(ours - expected).max():.1e}; with transformers' positions {np.abs(ours - own).max():.1e}")
    assert np.median(expected.std(axis=0)) > 100 * TOLERANCE
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE)
    assert np.abs(own - expected).max() > 100 * TOLERANCE
