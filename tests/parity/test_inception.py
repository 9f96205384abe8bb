"""Our Inception network beside torch-fidelity's and pytorch-fid's, with the same random weights in all."""

import numpy as np
import pytest

from mcm_jax.evaluation import inception_weights
from mcm_jax.evaluation.features import Extractor

torch = pytest.importorskip("torch")
pytorch_fid = pytest.importorskip("pytorch_fid.inception")
torch_fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

# Float32 sums over up to 3,456 products, in another order, through 20 layers.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Random weights in a .pth; batch norms far from the identity, activations of the order of one."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytorch_fid, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: None)
        model = pytorch_fid.fid_inception_v3()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.7, 1.3)
            torch.nn.init.normal_(module.bias, 0.1, 0.2)
            torch.nn.init.normal_(module.running_mean, 0, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    state = {name: value for name, value in model.state_dict().items() if "Aux" not in name}
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def ours(file):
    return Extractor(inception_weights.load(file).network(), batch_per_device=3)


@pytest.fixture(scope="module")
def fidelity(file):
    names = ["2048", "logits_unbiased", "logits"]
    model = torch_fidelity.FeatureExtractorInceptionV3("inception-v3-compat", names, str(file)).eval()
    spatial = []
    model.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, output: spatial.append(output))

    def run(images):
        with torch.no_grad():
            pool, unbiased, logits = model(torch.from_numpy(images).permute(0, 3, 1, 2))
        maps = spatial.pop().permute(0, 2, 3, 1)[..., :7]
        return {"pool": pool, "logits": unbiased, "biased": logits, "spatial": maps.reshape(len(images), -1)}

    return lambda images: {name: value.numpy() for name, value in run(images).items()}


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            pytorch_fid, "load_state_dict_from_url", lambda *_, **__: torch.load(file, weights_only=True)
        )
        load = torch.nn.Module.load_state_dict
        # The auxiliary classifier, which is not used, has no weights in the file.
        patch.setattr(torch.nn.Module, "load_state_dict", lambda self, state: load(self, state, strict=False))
        model = pytorch_fid.InceptionV3([3], resize_input=False, normalize_input=False).eval()
    drawn = images(299)
    scaled = (torch.from_numpy(drawn).permute(0, 3, 1, 2).float() - 128) / 128
    with torch.no_grad():
        (pool,) = model(scaled)
    assert_close(ours(drawn)["pool"], pool.flatten(1).numpy())
