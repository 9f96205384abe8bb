"""Every objective takes any pytree as its condition."""

import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax.objectives.consistency import Consistency
from mcm_jax.objectives.diffusion import Diffusion
from mcm_jax.objectives.guidance import Guidance
from mcm_jax.objectives.progressive import Progressive
from mcm_jax.objectives.tract import Tract
from tests.objectives.test_consistency import COND, KEY, X, conditional_model, networks

NULL = 9


def pair_model(z_t, logsnr_t, cond, key):
    """The model of labels; the second part of the condition must be dropped wherever the label is."""
    v_hat = conditional_model(z_t, logsnr_t, cond["label"], key)
    return jnp.where((cond["label"] == NULL) == (cond["part"][:, 0] == -1), v_hat.T, jnp.nan).T


@pytest.mark.parametrize(
    "objective",
    [
        Diffusion(label_dropout=0.5),
        Guidance(teacher_guidance=1.5),
        Consistency(student_steps=(4,), teacher_guidance=0.7),
        Consistency(student_steps=(4,)),
        Tract(stages=(64, 1)),
        Progressive(stages=(64, 32)),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_a_pytree_gives_the_loss_of_its_label(objective):
    of_label = objective(
        networks(conditional_model, conditional_model, null_cond=NULL), X, COND, KEY, jnp.int32(0)
    )
    of_pair = objective(
        networks(pair_model, pair_model, null_cond={"label": NULL, "part": np.full(2, -1.0)}),
        X,
        {"label": COND, "part": jnp.ones((len(X), 2))},
        KEY,
        jnp.int32(0),
    )
    np.testing.assert_array_equal(of_pair, of_label)
