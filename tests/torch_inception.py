"""The Inception networks of other evaluators, which need the extra `parity`, with random weights.

Not imported by anything that runs without PyTorch.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytorch_fid.inception
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

Run = Callable[[np.ndarray], dict[str, np.ndarray]]


def write_random_weights(path: Path) -> None:
    """In a .pth; batch norms far from the identity, activations of the order of one."""
    torch.manual_seed(0)
    with _loading(lambda *_, **__: None, None):
        model = pytorch_fid.inception.fid_inception_v3()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.7, 1.3)
            torch.nn.init.normal_(module.bias, 0.1, 0.2)
            torch.nn.init.normal_(module.running_mean, 0, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    torch.save({name: value for name, value in model.state_dict().items() if "Aux" not in name}, path)


def torch_fidelity(weights: Path, *, features: tuple[str, ...] = ("2048",)) -> Run:
    """uint8 images [B, H, W, 3] -> features by torch-fidelity's names, and "spatial"."""
    model = FeatureExtractorInceptionV3("inception-v3-compat", list(features), str(weights)).eval()
    spatial: list[torch.Tensor] = []
    model.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, output: spatial.append(output))

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            found = model(torch.from_numpy(images).permute(0, 3, 1, 2))
        maps = spatial.pop().permute(0, 2, 3, 1)[..., :7]
        named = dict(zip(features, found, strict=True)) | {"spatial": maps.reshape(len(images), -1)}
        return {name: value.numpy() for name, value in named.items()}

    return run


def pytorch_fid_pool(weights: Path, *, as_published: bool) -> Run:
    """uint8 images [B, H, W, 3] -> {"pool"}, as its program has it, or without its resize and its scaling."""
    with _loading(lambda *_, **__: torch.load(weights, weights_only=True), False):
        model = pytorch_fid.inception.InceptionV3(
            [3], resize_input=as_published, normalize_input=as_published
        )
    model.eval()

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        with torch.no_grad():
            (pool,) = model(x / 255 if as_published else (x - 128) / 128)
        return {"pool": pool.flatten(1).numpy()}

    return run


@contextlib.contextmanager
def _loading(url: Callable[..., Any], strict: bool | None) -> Iterator[None]:
    """pytorch-fid takes its weights from `url` in place of the network; strict None: loads none.

    The auxiliary classifier, which nothing uses, has no weights in our files.
    """
    load = torch.nn.Module.load_state_dict

    def loaded(self: torch.nn.Module, state: Any, *_: Any, **__: Any) -> Any:
        return None if strict is None else load(self, state, strict=strict)

    with (
        mock.patch.object(pytorch_fid.inception, "load_state_dict_from_url", url),
        mock.patch.object(torch.nn.Module, "load_state_dict", loaded),
    ):
        yield
