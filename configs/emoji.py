"""Emoji in ten designs with their names as captions; text to image on two CPU cores.

    teacher            the diffusion model, conditioned on captions
    guidance           distillation of its guided prediction (weight 1) into one network call
    cd,steps=S         S-step multistep consistency distillation of the model that guidance trained

These are not rows of the paper's tables, but its chain for text to image (section 5.3). The images are
32x32; the captions are embedded by all-MiniLM-L6-v2. In cd, aDDIM's x_var is that of the guided prediction,
as the distilled model has no other; the paper uses the conditional one. The commands, where FILE is what
`npm pack @iconify/json@2.2.535` downloads:

    python -m mcm_jax.prepare --dataset=emoji --resolution=32 --caption_length=40 --manual_dir=FILE
    python -m mcm_jax.train --config=emoji:teacher --workdir=runs/emoji_teacher
    python -m mcm_jax.train --config=emoji:guidance --workdir=runs/emoji_guidance \\
        --config.teacher_checkpoint=runs/emoji_teacher
    python -m mcm_jax.train --config=emoji:cd,steps=4 --workdir=runs/emoji_cd4 \\
        --config.teacher_checkpoint=runs/emoji_guidance
    python -m mcm_jax.sample --workdir=runs/emoji_cd4 --num=8 --out=runs/bananas.png \\
        --prompt="banana, Noto style"
"""

import ml_collections

from mcm_jax.config import rows


def get_config(row: str = "teacher") -> ml_collections.ConfigDict:
    """Returns the config of a row, such as "teacher" or "cd,steps=4"."""
    return rows.captioned(row, dataset="emoji", resolution=32)
