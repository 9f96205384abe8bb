"""Published networks at their true size, with weights from a formula, agree with their authors' code.

No file of weights is needed: each tensor follows from its name, by NumPy's legacy generator, whose stream is
guaranteed.
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# Not needed, but this takes minutes and gigabytes: it runs with the other tests of the parity extra.
pytest.importorskip("torch")

from mcm_jax.models.conditions import Classes
from mcm_jax.models.network import Network
from mcm_jax.teachers import weights
from tests.teachers import golden

# The authors' float32 differs from float64 by up to 7e-6. The time embedding of consistency models is inexact
# in float32, so that they are compared with float64.
CLOSE = 1e-4


def formula(name: str, shape: tuple[int, ...], *, edm2: bool) -> np.ndarray:
    """The tensor of this name, as the golden files were made."""
    random, leaf = np.random.RandomState(zlib.crc32(name.encode())), name.split(".")[-1]
    if leaf == "phases":
        values = 2 * np.pi * random.random_sample(shape)
    else:
        normal = random.standard_normal(shape)
        if leaf == "freqs":
            values = 2 * np.pi * normal
        elif leaf == "out_gain":
            values = 1 + 0.1 * normal
        elif leaf == "emb_gain":
            values = 0.5 * normal
        elif leaf == "resample_filter":
            values = np.full(shape, 0.25)
        elif len(shape) == 1:
            values = 1 + 0.2 * normal if leaf == "weight" else 0.2 * normal
        elif edm2:
            rows = np.exp(0.3 * random.standard_normal(shape[0]))
            values = normal * rows.reshape(-1, *[1] * (len(shape) - 1))
        elif name.endswith(("label_emb.weight", "map_label.weight")):
            values = 0.5 * normal
        else:
            values = normal / np.sqrt(np.prod(shape[1:]))
    single = np.asarray(values, np.float32)
    return single.astype(np.float16).astype(np.float32) if edm2 else single


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("edm2-img64", "edm"),
        ("edm-imagenet64-adm", "edm"),
        ("guided-diffusion-64", "eps_cosine"),
        ("guided-diffusion-128", "eps_linear"),
        ("consistency-models-64", "edm_1000"),
    ],
)
def test_the_true_network_at_its_true_size(name, kind):
    edm2 = name == "edm2-img64"
    tensors = {key: formula(key, shape, edm2=edm2) for key, shape in golden.shapes(name).items()}
    if edm2:
        imported = weights.edm2(tensors, {"unet.dec.8x8_in0.num_heads": 12})
    elif kind == "edm":
        imported = weights.edm(tensors, {"model.dec.8x8_in0.num_heads": 12})
    else:
        imported = weights.openai(tensors, preconditioning=kind)
    want = golden.expected(f"{name}.full")
    x, labels = want["x"].astype(np.float64), want["class_index"].astype(np.int32)
    if "sigma" in want:
        sigma = want["sigma"].astype(np.float64)
        x = x / np.sqrt(sigma**2 + 0.25).reshape(-1, 1, 1, 1)
        level = np.log(sigma) / 4 * (1 if kind == "edm" else 1000)
    else:
        level = want["t"]
    network = Network(imported.settings, x.transpose(0, 2, 3, 1).shape[1:], Classes(1000))

    @jax.jit
    def predict(params, x, level, labels):
        return network._module(params).predict(x, level, labels, None)

    params = jax.tree.map(jnp.asarray, imported.params)
    f = predict(params, x.transpose(0, 2, 3, 1).astype(np.float32), level.astype(np.float32), labels)
    f = np.asarray(f).transpose(0, 3, 1, 2)
    reference = want.get("F_float64", want["F"])
    if reference.shape != f.shape:  # Every second row and column is in the file.
        f = f[:, :, ::2, ::2]
    error = np.abs(f - reference).max()
    print(f"{name}: {error:.1e}")
    assert error < CLOSE
