"""ImageNet at 64x64: the paper's networks of 394 million (small) and 1.23 billion (large) parameters.

    SIZE,teacher                       the diffusion model
    SIZE,ct,steps=S                    S-step multistep consistency training, started from it (tables 1, 3)
    SIZE,cd,steps=S                    S-step multistep consistency distillation of it (tables 1, 3, 4)
    SIZE,cd,ddim,steps=S               the same with DDIM as the teacher's step (table 4)
    SIZE,cd,steps=S,teacher_steps=N    the same with N teacher steps throughout, not 64 -> 1280
    SIZE,pd,steps=S                    progressive distillation with aDDIM, 1024 -> 512 ... -> S (table 3)
    SIZE,tract,steps=S                 TRACT, 1024 -> 32 -> S

SIZE is small, large or mini. The last is not the paper's: a network of 100 million parameters, trained on
batches of 512 for 300,000 (teacher) or 100,000 updates, for one GPU or eight chips: about 14 and 7 hours (cd)
on eight TPU v5e, by the compiler's estimates (results/plan/mini.md).

These rows start from a published network, edm2-s, edm2-m, edm2-l, edm2-xl, edm, openai_edm or adm64
(docs/public_teachers.md):

    NETWORK,ct,steps=S
    NETWORK,cd,steps=S
    NETWORK,cd,heun,steps=S            the same with Heun as the teacher's step, on EDM's grid (except adm64)

The paper's FIDs of 50,000 samples (none has been measured with this code):

    S     small,ct   small,cd   small,cd,ddim   small,pd   large,ct   large,cd
    1          7.2        4.3            3.91       10.7        6.4        3.2
    2          2.7        2.0            1.99        4.7        2.3        1.9
    4          1.8        1.7            1.77        2.4        1.6        1.6
    8          1.5        1.6            1.70        1.8        1.5        1.4
    16         1.5        1.5            1.72          -        1.6        1.4

The teachers' FIDs with 512 steps of aDDIM: small 1.5, large 1.4. Table 4 reports small,cd as 4.35, 2.02,
1.68, 1.58 and 1.54, and table 5 reports small,pd with 8 steps as 1.7.

Chips and hours, derived from the paper's updates per second (not measured with this code):

                              small, 64 TPU v5e   large, 256 TPU v5e
    teacher  1,000,000 updates     103 h               96 h       at CT's speed, but with one call fewer
    ct         200,000 updates      21 h               19 h
    cd         200,000 updates      22 h               22 h
    pd          20,000 a stage     2.2 h              2.2 h       a stage, at CD's speed; ten stages to 1 step
    tract      100,000 a stage      11 h               11 h       a stage, at CD's speed; two stages

On another number of chips, the parameters are split over all of them. The commands:

    python -m mcm_jax.train --config=imagenet64:small,teacher --workdir=runs/teacher
    python -m mcm_jax.train --config=imagenet64:small,cd,steps=8 --workdir=runs/cd8 \\
        --config.teacher_checkpoint=runs/teacher
    python -m mcm_jax.train --config=imagenet64:small,pd,steps=1 --workdir=runs/pd \\
        --config.teacher_checkpoint=runs/teacher    # writes runs/pd/steps_512 to runs/pd/steps_1
"""

import ml_collections

from mcm_jax.config import paper_rows, public_rows


def get_config(row: str = "small,teacher") -> ml_collections.ConfigDict:
    """Returns the config of a row, such as "small,teacher" or "edm2-s,cd,steps=4"."""
    if public_rows.is_public(row, resolution=64):
        return public_rows.imagenet(row, resolution=64)
    return paper_rows.imagenet(
        row,
        resolution=64,
        widths=(256, 512, 1024),
        sizes={
            "mini": paper_rows.Size(dropouts=(0.0, 0.0, 0.1)),
            "small": paper_rows.Size(dropouts=(0.0, 0.0, 0.2)),
            "large": paper_rows.Size(dropouts=(0.0, 0.1, 0.1)),
        },
    )
