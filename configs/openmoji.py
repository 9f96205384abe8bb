"""OpenMoji, 1,392 colour emoji in 9 classes (CC BY-SA 4.0): the tiny networks of a laptop's CPU.

    teacher          the diffusion model
    cd,steps=S       S-step multistep consistency distillation of it
    ct,steps=S       S-step multistep consistency training, started from it
    progressive      progressive distillation of it, 64 -> 32 -> ... -> 1 steps, or to steps=S
    tract            TRACT, 64 -> 8 -> 1 steps
    guidance         its guided prediction (weight 1) in one call; it must be trained with
                     --config.diffusion.label_dropout=0.1

No row of the paper's tables: 16x16 emoji, 1.6 million parameters, minutes on two cores, all by
`bash launch/smoke.sh`. One row alone:

    python -m mcm_jax.prepare --dataset=openmoji --resolution=16
    python -m mcm_jax.train --config=configs/openmoji.py:teacher --workdir=runs/teacher
    python -m mcm_jax.train --config=configs/openmoji.py:cd,steps=4 --workdir=runs/cd4 \\
        --config.teacher_checkpoint=runs/teacher
"""

import ml_collections

from mcm_jax.config import rows


def get_config(row: str = "teacher") -> ml_collections.ConfigDict:
    """The config of one row, e.g. "teacher" or "cd,steps=4"."""
    config = rows.tiny(row, dataset="openmoji", resolution=16)
    # Seven of the 1,392 are flags: uniform labels would draw every ninth sample as one.
    config.sampling.label_rule = "train_frequency"
    return config
