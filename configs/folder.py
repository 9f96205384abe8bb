"""Any folder of images, prepared by mcm_jax.prepare --dataset=folder: the tiny networks of a laptop's CPU.

    --config=configs/folder.py:teacher --config.data.dataset=folder/NAME --config.data.resolution=R

Rows as in configs/openmoji.py. R must be a multiple of 4 for the default network.
"""

import ml_collections

from mcm_jax.config import rows


def get_config(row: str = "teacher") -> ml_collections.ConfigDict:
    """The config of one row; data.dataset and data.resolution are the user's to set."""
    return rows.tiny(row, dataset="folder/NAME", resolution=32)
