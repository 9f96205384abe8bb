"""Text to image at 512x512: the paper's networks and chain (its section 5.3), 4.97 billion parameters.

    teacher            the diffusion model, conditioned on captions
    guidance,low       distillation of its guided prediction with weight 0.5 into one network call
    guidance,high      the same with weight 3
    cd,steps=S         S-step multistep consistency distillation of the model that one of these trained

The paper's FIDs of 30,000 and 5,000 samples and its CLIP scores (none has been measured with this code):

                                       weight 0.5                weight 3
                                 FID-30k FID-5k  CLIP     FID-30k FID-5k  CLIP
    teacher, 256 steps of DDPM       7.9   13.6 0.305        12.7   18.1 0.315
    guidance, 256 steps of DDIM      8.2   13.8 0.300        13.9   19.0 0.312
    cd, 4 steps                      8.7   14.4 0.298        12.4   18.1 0.311
    cd, 8 steps                      8.1   13.8 0.300        13.9   19.6 0.311
    cd, 16 steps                     7.9   13.9 0.300        14.4   20.0 0.312

At the paper's 0.71 updates per second on 256 TPU v5e, the 30,000 updates of cd take 12 hours.

The paper does not name its data or its text encoder; here they are a folder of images with captions, and T5
v1.1 XXL. Neither does it say whether the network works on patches. Here they have 2x2 pixels: with a middle
of 32x32 positions, the published speed would exceed the chips' peak. In cd, aDDIM's x_var is that of the
guided prediction, as the distilled model has no other; the paper uses the conditional one. The commands:

    python -m mcm_jax.prepare --dataset=folder --name=captioned --manual_dir=PATH --resolution=512 \\
        --encoder=DIRECTORY/t5-v1_1-xxl
    python -m mcm_jax.train --config=text_to_image:teacher --workdir=runs/teacher
    python -m mcm_jax.train --config=text_to_image:guidance,low --workdir=runs/guidance \\
        --config.teacher_checkpoint=runs/teacher
    python -m mcm_jax.train --config=text_to_image:cd,steps=4 --workdir=runs/cd4 \\
        --config.teacher_checkpoint=runs/guidance
    python -m mcm_jax.sample --workdir=runs/cd4 --num=4 --out=cats.png --text_encoder=DIRECTORY/t5-v1_1-xxl \\
        --prompt="a cat that reads a newspaper"
"""

import ml_collections

from mcm_jax.config import paper_rows


def get_config(row: str = "teacher") -> ml_collections.ConfigDict:
    """Returns the config of a row, such as "guidance,low" or "cd,steps=4"."""
    return paper_rows.text_to_image(row)
