"""OpenMoji, 1,392 colour emoji in 9 classes (CC BY-SA 4.0): the tiny networks of a laptop's CPU.

teacher          the diffusion model
cd,steps=S       S-step multistep consistency distillation of it
ct,steps=S       S-step multistep consistency training, started from it
"""

import ml_collections

from mcm_jax import configuration
from mcm_jax.errors import InputError


def get_config(row: str = "teacher") -> ml_collections.ConfigDict:
    """The config of one row, e.g. "teacher" or "cd,steps=4"."""
    words, numbers = configuration.parse_row(row)
    if len(words) != 1 or not words <= {"teacher", "cd", "ct"} or not set(numbers) <= {"steps"}:
        raise InputError(f"row {row!r} of configs/openmoji.py: use teacher, cd,steps=S or ct,steps=S")
    (system,) = words
    config = configuration.default_config()
    config.data.dataset = "openmoji"
    config.data.resolution = 16
    config.sampling.label_rule = "train_frequency"
    config.sampling.teacher_steps = 64
    config.sampling.batch_per_device = 128
    config.optimizer.ema_decay = 0.99
    config.training.batch_size = 128
    config.training.log_every_steps = 50
    config.training.checkpoint_every_steps = 500
    config.training.sample_every_steps = 500
    if system == "teacher":
        config.objective = "diffusion"
        config.optimizer.learning_rate = 2e-3
        config.optimizer.warmup_steps = 100
        config.optimizer.decay = "linear"
        config.training.num_steps = 2000
    else:
        config.objective = system
        config.consistency.student_steps = numbers.get("steps", 4)
        config.optimizer.learning_rate = 3e-4
        config.optimizer.decay = "linear"
        config.training.num_steps = 500
        config.consistency.anneal_steps = 400
    return config
