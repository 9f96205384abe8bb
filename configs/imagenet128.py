"""ImageNet at 128x128: the paper's networks of 397 million (small) and 1.25 billion (large) parameters.

    SIZE,teacher                       the diffusion model
    SIZE,ct,steps=S                    S-step multistep consistency training, started from it (table 1)
    SIZE,cd,steps=S                    S-step multistep consistency distillation of it (tables 1, 2)
    SIZE,cd,steps=S,teacher_steps=N    the same with N teacher steps throughout, not 64 -> 1280 (table 2)
    SIZE,cd,ddim,steps=S               the same with DDIM as the teacher's step
    SIZE,pd,steps=S                    progressive distillation with aDDIM, 1024 -> 512 ... -> S (table 5)
    SIZE,tract,steps=S                 TRACT, 1024 -> 32 -> S

SIZE is small or large. The rows adm128,cd,steps=S and adm128,ct,steps=S start from ADM's published network
(docs/public_teachers.md).

The paper's FIDs of 50,000 samples (none has been measured with this code):

    S     small,ct   small,cd   large,ct   large,cd
    1         16.0        8.5       14.5        7.0
    2          6.0        3.1        4.2        3.1
    4          4.0        2.4        2.7        2.3
    8          3.3        2.1        2.2        2.1
    16         3.4        2.0        2.3        2.0

    S     large,cd,teacher_steps=128   large,cd,teacher_steps=256   large,cd,teacher_steps=1024
    1                            8.8                          7.6                          10.8
    2                            5.3                          3.6                           3.8
    4                            5.0                          3.5                           2.6
    8                            4.9                          3.2                           2.2

The teachers' FIDs with 512 steps of aDDIM: small 2.2, large 2.2. Table 5 reports pd as 8.0, 3.8 and 2.5 with
2, 4 and 8 steps, but not the size of its network.

Chips and hours, derived from the paper's updates per second (not measured with this code):

                              small, 64 TPU v5e   large, 256 TPU v5e
    teacher  1,000,000 updates     126 h              126 h       at CT's speed, but with one call fewer
    ct         200,000 updates      25 h               25 h
    cd         200,000 updates      33 h               31 h
    pd          20,000 a stage     3.3 h              3.1 h       a stage, at CD's speed; ten stages to 1 step
    tract      100,000 a stage      16 h               15 h       a stage, at CD's speed; two stages

The small network uses guidance, as in the paper: its teacher is also trained without labels and sampled with
guidance, and cd distils the guided prediction. This costs cd another network call, which the published speed
may not include. ct, pd and tract use no guidance; --config.consistency.teacher_guidance=0 disables it for cd.

On another number of chips, the parameters are split over all of them. The commands:

    python -m mcm_jax.train --config=imagenet128:small,teacher --workdir=runs/teacher
    python -m mcm_jax.train --config=imagenet128:small,cd,steps=8 --workdir=runs/cd8 \\
        --config.teacher_checkpoint=runs/teacher
    python -m mcm_jax.train --config=imagenet128:small,pd,steps=1 --workdir=runs/pd \\
        --config.teacher_checkpoint=runs/teacher    # writes runs/pd/steps_512 to runs/pd/steps_1
"""

import ml_collections

from mcm_jax.config import paper_rows, public_rows


def get_config(row: str = "small,teacher") -> ml_collections.ConfigDict:
    """Returns the config of a row, such as "small,teacher" or "adm128,cd,steps=4"."""
    if public_rows.is_public(row, resolution=128):
        return public_rows.imagenet(row, resolution=128)
    return paper_rows.imagenet(
        row,
        resolution=128,
        widths=(128, 256, 512, 1024),
        sizes={
            # The paper uses guidance for the small network, but leaves open the weight and where (SPEC 3).
            "small": paper_rows.Size(dropouts=(0.0, 0.0, 0.0, 0.1), guidance=0.3),
            "large": paper_rows.Size(dropouts=(0.0, 0.1, 0.1, 0.1)),
        },
        levels=(128, 64),
    )
