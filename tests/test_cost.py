"""What objectives and samplers cost, counted in calls of the network and in the compiler's operations."""

import functools
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax import configuration, experiment, sampling
from mcm_jax.diffusion import schedules
from mcm_jax.models.network import Network
from tests import tiny
from tests.models.test_uvit import full_size

NULL_CLASS = 9
ANYWHERE = Path("nowhere")

# Each kind of config.objective: the settings of config and of config.consistency that change its course.
OBJECTIVES = {
    "diffusion": ("diffusion", {}, {}),
    "diffusion, labels dropped": ("diffusion", {"diffusion.label_dropout": 0.3}, {}),
    "diffusion, multiscale": ("diffusion", {"diffusion.levels": (8, 4)}, {}),
    "ct": ("ct", {}, {}),
    "ct, target ema": ("ct", {}, {"target_network": "ema"}),
    "cd": ("cd", {}, {}),
    "cd, ddim": ("cd", {}, {"teacher_step": "ddim"}),
    "cd, target ema": ("cd", {}, {"target_network": "ema"}),
    "cd, guided": ("cd", {"teacher_guidance": 0.5}, {}),
    "progressive": ("progressive", {}, {}),
    "tract": ("tract", {}, {}),
    "guidance": ("guidance", {"teacher_guidance": 0.5}, {}),
}


def build(name, **consistency):
    """The Config of a row of OBJECTIVES and its objective, as training builds them."""
    objective, settings, row = OBJECTIVES[name]
    config = tiny.config(ANYWHERE, objective, None if objective == "diffusion" else ANYWHERE)
    for field, value in settings.items():
        config.update_from_flattened_dict({field: value})
    config.consistency.update(row | consistency)
    config = configuration.validate(config)
    objective = experiment.build_objective(config, null_class=NULL_CLASS)

    def with_target(model_fn, teacher_fn, target_fn, *arguments):
        # A target network is there where the config wants one, and a teacher where one is distilled.
        target_fn = None if experiment.target_decay(config) is None else target_fn
        return objective(model_fn, teacher_fn if experiment.distils(config) else None, target_fn, *arguments)

    return config, with_target


STUDENT, TARGET = ("student", "label", "dropout"), ("target", "label", "dropout")
TEACHER, UNCONDITIONAL = ("teacher", "label", "none"), ("teacher", "any class", "none")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("diffusion", [STUDENT]),
        ("diffusion, multiscale", [STUDENT]),
        ("ct", [STUDENT] * 2),
        ("ct, target ema", [STUDENT, TARGET]),
        ("cd", [STUDENT] * 2 + [TEACHER]),
        ("cd, ddim", [STUDENT] * 2 + [TEACHER]),
        ("cd, target ema", [STUDENT, TARGET, TEACHER]),
        ("cd, guided", [STUDENT] * 2 + [TEACHER, UNCONDITIONAL]),
        ("progressive", [STUDENT] + [TEACHER] * 2),
        ("tract", [STUDENT, TARGET, TEACHER]),
        ("guidance", [STUDENT, TEACHER, UNCONDITIONAL]),
    ],
)
def test_network_evaluations_of_a_loss(name, expected):
    """Who is called how often, for which class, and with dropout or without; nothing is called in a loop.

    All calls with dropout share its randomness: Algorithm 1's f at t and at s differ in z alone.
    """
    calls, dropout_keys = [], []

    def counted(who):
        def model_fn(z_t, logsnr_t, cond, key):
            label = "any class" if np.all(cond == NULL_CLASS) else "label"
            calls.append((who, label, "none" if key is None else "dropout"))
            if key is not None:
                dropout_keys.append(jax.random.key_data(key))
            return 0.1 * z_t

        return model_fn

    _, objective = build(name)
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    networks = map(counted, ("student", "teacher", "target"))
    objective(*networks, x, jnp.arange(4), jax.random.key(1), jnp.int32(0))
    assert sorted(calls) == sorted(expected)
    for key in dropout_keys:
        np.testing.assert_array_equal(key, dropout_keys[0])
