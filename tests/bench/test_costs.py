"""The network calls of an update, counted."""

import jax
import jax.numpy as jnp
import pytest

from mcm_jax.bench.costs import CALLS
from mcm_jax.config.settings import SECTIONS, Config
from mcm_jax.diffusion import schedules
from mcm_jax.objectives.consistency import Consistency
from mcm_jax.objectives.continuous import Continuous
from mcm_jax.objectives.moments import Moments
from mcm_jax.objectives.objective import Networks
from mcm_jax.objectives.progressive import Progressive

SETTINGS = {
    "consistency": Consistency((2,)),
    "continuous": Continuous((2,)),
    "moments": Moments(student_steps=2),
    "progressive": Progressive(stages=(4, 2)),
}
FROM_DATA = ("ct", "sct", "meanflow", "shortcut")


@pytest.mark.parametrize("system", CALLS)
def test_the_calls_of_an_update(system):
    """The gradient costs twice a call, and a forward derivative as much as its call."""
    batch, spent = 16, {}

    def network(name, cost):
        def model_fn(z_t, logsnr_t, cond, key, logsnr_u=None):
            # Within jax.jvp, arguments are tracers.
            twice = 2 if isinstance(z_t, jax.core.Tracer) else 1
            spent[name] = spent.get(name, 0) + cost * twice * len(z_t)
            return 0.1 * z_t

        return model_fn

    section = SECTIONS[system]
    loss = SETTINGS.get(section) or getattr(Config(), section)
    networks = Networks(
        student=network("student", 3),
        teacher=None if system in FROM_DATA else network("teacher", 1),
        target=None if system == "progressive" else network("target", 1),
        schedule=schedules.cosine(),
        null_cond=9,
    )
    x, cond = jnp.ones((batch, 3)), jnp.zeros(batch, jnp.int32)
    loss(networks, x, cond, jax.random.key(0), jnp.int32(3))
    assert sum(spent.values()) == CALLS[system] * batch
