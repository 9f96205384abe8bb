"""How a run's images are made: the settings of SamplingSettings resolved, and the program that samples."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mcm_jax.config.settings import Config
from mcm_jax.data.pixels import Rounding, to_uint8
from mcm_jax.diffusion import sampling, schedules
from mcm_jax.diffusion.guidance import guided
from mcm_jax.models.network import Network
from mcm_jax.records import Sampling
from mcm_jax.runs import build
from mcm_jax.system import sharding
from mcm_jax.system.errors import InputError


def resolve(
    config: Config,
    *,
    steps: int | None = None,
    sampler: str | None = None,
    noise_grid: str | None = None,
    x_var: str | None = None,
    guidance: float | None = None,
    rounding: Rounding | None = None,
) -> Sampling:
    """How a run of `config` is sampled with these arguments; None stands for the run's default.

    A student's defaults are its own step count, DDIM, the schedule's grid and no guidance. Samples
    are rounded to the nearest byte by default.

    Raises:
      InputError: guidance for a network that was trained without label dropout, or x_var for a sampler that
        takes none.
    """
    settings = config.sampling
    if config.student_steps is not None:
        settings = dataclasses.replace(
            settings,
            teacher_steps=config.student_steps,
            sampler="ddim",
            noise_grid="schedule",
            guidance=0.0,
        )
    sampler = sampler or settings.sampler
    guidance = settings.guidance if guidance is None else guidance
    if guidance > 0 and not config.supports_guidance:
        raise InputError(
            f"guidance {guidance} needs a diffusion model trained with config.diffusion.label_dropout above "
            "0, which this model was not; sample it with guidance 0"
        )
    takes_variance = sampler in ("addim", "noisy_ddim")
    if x_var is not None and not takes_variance:
        raise InputError(f"x_var={x_var} has no effect on {sampler}; it applies to addim and noisy_ddim")
    x_var = (x_var or settings.x_var) if takes_variance else None
    measured = x_var == "measured"
    steps = steps or settings.teacher_steps
    return Sampling(
        steps=steps,
        sampler=sampler,
        noise_grid=noise_grid or settings.noise_grid,
        x_var=x_var,
        x_var_eta=settings.x_var_eta if measured else None,
        x_var_images=settings.x_var_images if measured else None,
        guidance=guidance,
        clip=settings.clip,
        network_calls=sampling.network_calls(sampler, steps) * (2 if guidance else 1),
        rounding=rounding or "nearest",
    )


def grid(config: Config, how: Sampling) -> Float[Array, "N"]:
    """log-SNRs at which the network is called."""
    if how.noise_grid == "karras":
        return schedules.karras_grid(how.steps)
    return schedules.uniform_grid(build.schedule(config), how.steps)


def make_sampler(config: Config, network: Network, how: Sampling, *, mesh: Mesh) -> Callable[..., Array]:
    """Jitted (params, key, x_var, image indices, labels) -> uint8 images; batches lie over the whole mesh.

    Image n is a function of (key, n), its label and `how`. For x_var see `sampling.sample`.
    """
    network, logsnr = build.placed(config, network, mesh=mesh), grid(config, how)

    def sample(params: Any, key: Array, x_var: Any, indices: Array, labels: Array) -> Array:
        keys = sampling.image_keys(key, indices)
        # The parameters are rounded once for all steps.
        model_fn = functools.partial(network.apply, network.rounded(params))
        if how.guidance > 0:
            model_fn = guided(model_fn, guidance=how.guidance, null_class=network.null_class)
        x = sampling.sample(
            model_fn,
            sampling.initial_noise(keys, network.shape),
            labels,
            keys,
            logsnr=logsnr,
            sampler=how.sampler,
            x_var=x_var,
            clip=how.clip,
        )
        return to_uint8(x, rounding=how.rounding)

    return jax.jit(sample, out_shardings=sharding.batch_sharding(mesh))
