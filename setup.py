"""What setup.cfg cannot express: wheels contain configs/ as mcm_jax.configs."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["mcm_jax", "mcm_jax.*"]), "mcm_jax.configs"],
    package_dir={"mcm_jax.configs": "configs"},
)
