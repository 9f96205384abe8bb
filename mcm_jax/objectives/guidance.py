"""Guidance distillation (Meng et al. 2022, arXiv:2210.03142; SPEC 5) for one fixed guidance weight."""

import jax
from jaxtyping import Array, Float, Int

from mcm_jax.diffusion import process
from mcm_jax.diffusion.guidance import guided
from mcm_jax.diffusion.network import ModelFn
from mcm_jax.diffusion.schedules import Schedule


def guidance_loss(
    model_fn: ModelFn,
    teacher_fn: ModelFn,
    x: Float[Array, "B ..."],
    cond: Int[Array, "B"],
    key: jax.Array,
    *,
    schedule: Schedule,
    teacher_guidance: float,
    null_class: int,
) -> Float[Array, "B"]:
    """||v_g - v_hat(z_t)||^2 / d, t ~ U(0, 1): one call that says what the guided teacher says in two.

    v_g = v_cond + g (v_cond - v_uncond) is the teacher's, g = teacher_guidance; null_class is its label for
    'any class'. The student is a diffusion model again, of guided images.
    """
    key_t, key_eps, key_dropout = jax.random.split(key, 3)
    logsnr_t = schedule(jax.random.uniform(key_t, x.shape[:1]))
    eps = jax.random.normal(key_eps, x.shape)
    z_t = process.diffuse(x, eps, logsnr_t=logsnr_t)
    guided_teacher = guided(teacher_fn, guidance=teacher_guidance, null_class=null_class)
    v_target = guided_teacher(z_t, logsnr_t, cond, None)
    return process.mean_square(v_target - model_fn(z_t, logsnr_t, cond, key_dropout))
