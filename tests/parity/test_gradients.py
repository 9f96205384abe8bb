"""Gradients of the published networks against finite differences in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax.models.conditions import Classes
from mcm_jax.models.network import Network
from tests.teachers import golden


def slopes(imported, *, step):
    """By parameter: the derivative of a weighted sum of v_hat along a random direction, twice.

    First that of the gradient, then that of central differences with this step.
    """
    # Fully convolutional, so a small image is enough.
    network = Network(imported.settings, (16, 16, 3), Classes(imported.num_classes))
    rng = np.random.default_rng(0)
    z, weights = jnp.asarray(rng.standard_normal((2, 1, 16, 16, 3)))
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), imported.params)
    leaves, tree = jax.tree.flatten(params)

    @jax.jit
    def total(leaves):
        params = jax.tree.unflatten(tree, leaves)
        return jnp.sum(network.apply(params, z, jnp.array([1.0]), jnp.array([4]), None) * weights)

    gradient = jax.grad(total)(leaves)
    result = {}
    for at, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        direction = rng.standard_normal(leaf.shape)
        ends = (total([*leaves[:at], leaf + sign * step * direction, *leaves[at + 1 :]]) for sign in (1, -1))
        difference = (next(ends) - next(ends)) / (2 * step)
        exact = jnp.vdot(gradient[at], direction)
        result[jax.tree_util.keystr(path)] = float(exact), float(difference)
    return result


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("edm2-img64", "edm"),
        ("edm-imagenet64-adm", "edm"),
        ("guided-diffusion-64", "eps_cosine"),
        ("consistency-models-64", "consistency"),
    ],
)
def test_the_gradient_of_every_parameter(name, kind, monkeypatch):
    imported = golden.imported(name, kind)
    object.__setattr__(imported.settings, "dtype", "float64")
    # The networks name float32 where they leave the activations' dtype.
    monkeypatch.setattr(jnp, "float32", jnp.float64)
    with jax.enable_x64(True):
        found = slopes(imported, step=1e-5)
    largest = max(abs(exact) for exact, _ in found.values())
    for path, (exact, difference) in found.items():
        if "frequencies" in path or "phases" in path:
            assert exact == 0  # They are not learned.
            continue
        # Rounding: 1e-16 of a sum of thousands, over 2e-5.
        assert abs(exact - difference) < 1e-6 * largest + 1e-5 * abs(exact), path
    assert sum(exact != 0 for exact, _ in found.values()) > len(found) / 2
