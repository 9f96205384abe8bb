"""OpenMoji, 1,392 colour emoji in 9 classes (CC BY-SA 4.0); tiny networks for a laptop's CPU.

    teacher          the diffusion model
    cd,steps=S       S-step multistep consistency distillation of it
    ct,steps=S       S-step multistep consistency training, started from it
    ct,ect,steps=S   the same with the teacher steps and weights of ECT; ct,ict,steps=S with iCT's
    progressive      progressive distillation of it, 64 -> 32 -> ... -> 1 steps, or to steps=S
    tract            TRACT, 64 -> 8 -> 1 steps
    guidance         distillation of its guided prediction (weight 1) into one network call; train the
                     teacher with --config.diffusion.label_dropout=0.1

These are not rows of the paper's tables. The images are 16x16; the networks have 1.6 million parameters and
train in minutes on two cores. `bash launch/smoke.sh` runs the teacher, cd and ct; one row alone:

    python -m mcm_jax.prepare --dataset=openmoji --resolution=16
    python -m mcm_jax.train --config=openmoji:teacher --workdir=runs/teacher
    python -m mcm_jax.train --config=openmoji:cd,steps=4 --workdir=runs/cd4 \\
        --config.teacher_checkpoint=runs/teacher
"""

import ml_collections

from mcm_jax.config import rows


def get_config(row: str = "teacher") -> ml_collections.ConfigDict:
    """Returns the config of a row, such as "teacher" or "cd,steps=4"."""
    config = rows.tiny(row, dataset="openmoji", resolution=16)
    # Only seven of the 1,392 emoji are flags; with uniform labels, one sample in nine would be a flag.
    config.sampling.label_rule = "train_frequency"
    return config
