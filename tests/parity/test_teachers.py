"""Published networks at their true size, with weights from a formula, agree with their authors' code.

No file of weights is needed: each tensor follows from its name, by NumPy's legacy generator, whose stream is
guaranteed.
"""

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
    tensors = {key: golden.formula(key, shape, edm2=edm2) for key, shape in golden.shapes(name).items()}
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
