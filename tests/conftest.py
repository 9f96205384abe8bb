"""Shared by all tests: eight CPU devices, and types checked at run time."""

import os

# Before the first import of JAX. Every test sees eight devices and uses one unless it asks for more.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ["JAX_PLATFORMS"] = "cpu"

from jaxtyping import install_import_hook

install_import_hook("mcm_jax", "beartype.beartype")

import hypothesis

# Derandomised: the same examples every time. No deadline: the first example of a shape compiles.
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("fixed")
