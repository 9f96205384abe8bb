"""The configs that both libraries run in tests/benchmarks/gpu.py."""

import dataclasses

import jax
import jax.numpy as jnp

from configs import imagenet64
from mcm_jax.config import validation
from mcm_jax.config.settings import Config
from mcm_jax.models.conditions import Classes
from mcm_jax.runs import build

# S and N_teacher of both students.
STUDENT_STEPS, TEACHER_STEPS = 8, 64.0
NUM_CLASSES = 1000


def config(system: str, *, small: bool, batch_size: int) -> Config:
    """ImageNet64 small; if `small`, the same kind of network with few channels.

    Args:
      system: "ct" or "cd".
    """
    raw = imagenet64.get_config(f"small,{system},steps={STUDENT_STEPS}")
    raw.consistency.update(teacher_steps_first=TEACHER_STEPS, teacher_steps_last=TEACHER_STEPS)
    raw.teacher_checkpoint = "any"  # Never read.
    raw.training.batch_size = batch_size
    raw.mesh.fsdp = 1
    if small:
        raw.data.resolution = 16
        raw.schedule.noise_resolution_high = 32
        raw.model.update(widths=(16, 32, 64), blocks=(1, 1, 2), embedding_width=32, head_width=16)
    return validation.validate(raw)


def in_float32(config: Config) -> Config:
    """The same without dropout and in float32, to compare two implementations."""
    model = dataclasses.replace(config.model, dtype="float32", dropouts=(0.0,) * len(config.model.dropouts))
    return dataclasses.replace(config, model=model)


def flops(config: Config) -> dict[str, float]:
    """Floating-point operations by case, of which JAX counts those of a call on the CPU only."""
    # A compiler counts matrix products, but not what a kernel does.
    written_out = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="einsum"))
    network, batch = build.network(written_out, condition=Classes(NUM_CLASSES)), config.training.batch_size
    image, logsnr, label = (
        jax.ShapeDtypeStruct((batch, *shape), dtype)
        for shape, dtype in ((network.shape, jnp.float32), ((), jnp.float32), ((), jnp.int32))
    )
    lowered = jax.jit(network.apply).lower(network.abstract_params, image, logsnr, label, None)
    call = float(lowered.cost_analysis()["flops"])
    # A call with a gradient costs as much as three without.
    return {"ct": (3 + 1) * call, "cd": (3 + 1 + 1) * call, "sample": STUDENT_STEPS * call}


def features_batch(*, small: bool) -> int:
    """Images of which features are computed at once."""
    return 2 if small else 128
