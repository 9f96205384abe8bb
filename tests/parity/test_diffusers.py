"""Consistency models in the form of the library diffusers: its network and ours agree."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from mcm_jax.models.conditions import Classes
from mcm_jax.models.network import Network
from mcm_jax.system import pth
from mcm_jax.teachers import weights
from tests.teachers import diffusers_form, golden

# The configuration of the published networks. Without its last line, as in their first upload, attention
# in the middle would have no norm.
PUBLISHED = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 3,
    "num_class_embeds": 1000,
    "block_out_channels": [192, 384, 576, 768],
    "attention_head_dim": 64,
    "down_block_types": ["ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3],
    "up_block_types": [*["AttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"],
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 32,
}


def test_the_published_network_has_these_tensors():
    with torch.device("meta"):
        theirs = diffusers.UNet2DModel(**PUBLISHED).state_dict()
    zeros = {name: np.zeros(shape, np.int8) for name, shape in golden.shapes("consistency-models-64").items()}
    ours = diffusers_form.of(zeros, blocks=3)
    assert {name: tuple(value.shape) for name, value in theirs.items()} == {
        name: value.shape for name, value in ours.items()
    }


def test_both_networks_predict_the_same():
    published = pth.read(golden.file("consistency-models-64"), name="cd.pt")
    tensors = diffusers_form.of(published, blocks=1)
    unet = diffusers.UNet2DModel(
        **PUBLISHED
        | {
            "sample_size": 32,
            "layers_per_block": 1,
            "num_class_embeds": 10,
            "block_out_channels": [8, 16, 24, 32],
            "attention_head_dim": 8,
            "norm_num_groups": 4,
            "attn_norm_num_groups": 4,
        }
    )
    unet.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in tensors.items()})
    want = golden.expected("consistency-models-64")
    x = (want["x"] / np.sqrt(want["sigma"] ** 2 + 0.25).reshape(-1, 1, 1, 1)).astype(np.float32)
    level = (250 * np.log(want["sigma"])).astype(np.float32)
    labels = want["class_index"].astype(np.int64)
    with torch.no_grad():
        theirs = unet.eval()(*map(torch.from_numpy, (x, level)), class_labels=torch.from_numpy(labels)).sample
    imported = weights.diffusers(tensors)
    settings = dataclasses.replace(imported.settings, groups=4, group_width=1, head_width=8)
    imported = weights.diffusers(tensors, settings)
    network = Network(imported.settings, (32, 32, 3), Classes(10))
    f = network._module(imported.params).predict(
        jnp.asarray(x.transpose(0, 2, 3, 1)), jnp.asarray(level), jnp.asarray(labels, jnp.int32), None
    )
    # Two orders of summation, and a time embedding that float32 holds to 1e-5.
    np.testing.assert_allclose(np.asarray(f).transpose(0, 3, 1, 2), theirs.numpy(), atol=1e-4)
