"""Any folder of images, prepared with `mcm_jax.prepare --dataset=folder`; tiny networks for a laptop's CPU.

The rows are those of configs/openmoji.py. The resolution must be a multiple of 4 for the default network.

    python -m mcm_jax.prepare --dataset=folder --manual_dir=PATH --name=pets --resolution=32
    python -m mcm_jax.train --config=folder:teacher --config.data.dataset=folder/pets \\
        --config.data.resolution=32 --workdir=runs/teacher
"""

import ml_collections

from mcm_jax.config import rows


def get_config(row: str = "teacher") -> ml_collections.ConfigDict:
    """Returns the config of a row, e.g. "teacher" or "cd,steps=4"; set data.dataset and data.resolution."""
    return rows.tiny(row, dataset="folder/NAME", resolution=32)
