"""How a run's images are made: the settings of SamplingConfig resolved, and the program that samples."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mcm_jax.config.settings import Config
from mcm_jax.data.pixels import to_uint8
from mcm_jax.diffusion import sampling, schedules
from mcm_jax.diffusion.guidance import guided
from mcm_jax.models.network import Network
from mcm_jax.runs import build
from mcm_jax.system import sharding
from mcm_jax.system.errors import InputError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How images are made: the settings of SamplingConfig, resolved for one run."""

    steps: int
    sampler: str
    noise_grid: str
    x_var: str | None  # None where the sampler takes no variance
    x_var_eta: float | None  # these two where it is measured
    x_var_images: int | None
    guidance: float
    clip: str

    @property
    def network_calls(self) -> int:
        """Of one image."""
        return sampling.network_calls(self.sampler, self.steps) * (2 if self.guidance else 1)


def resolve(
    config: Config,
    *,
    steps: int | None = None,
    sampler: str | None = None,
    noise_grid: str | None = None,
    x_var: str | None = None,
    guidance: float | None = None,
) -> Sampling:
    """What sampling a run of `config` with these arguments does, defaults filled in.

    A student's defaults are its own step count, DDIM, the schedule's grid and no guidance.

    Raises:
      InputError: guidance, of a network that was trained without label dropout; x_var, of a sampler that
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
            f"guidance {guidance} needs a diffusion model that was also trained for 'any class', with "
            "config.diffusion.label_dropout above 0; sample this one with guidance 0"
        )
    takes_variance = sampler in ("addim", "noisy_ddim")
    if x_var is not None and not takes_variance:
        raise InputError(f"x_var={x_var} means nothing to {sampler}; it is for addim and noisy_ddim")
    x_var = (x_var or settings.x_var) if takes_variance else None
    measured = x_var == "measured"
    return Sampling(
        steps=steps or settings.teacher_steps,
        sampler=sampler,
        noise_grid=noise_grid or settings.noise_grid,
        x_var=x_var,
        x_var_eta=settings.x_var_eta if measured else None,
        x_var_images=settings.x_var_images if measured else None,
        guidance=guidance,
        clip=settings.clip,
    )


def grid(config: Config, how: Sampling) -> Float[Array, "N"]:
    """log-SNRs at which the network is called."""
    if how.noise_grid == "karras":
        return schedules.karras_grid(how.steps)
    return schedules.uniform_grid(build.schedule(config), how.steps)


def make_sampler(config: Config, network: Network, how: Sampling, *, mesh: Mesh) -> Callable[..., Array]:
    """Jitted (params, key, x_var, image indices, labels) -> uint8 images; batches lie over the whole mesh.

    Image n is a function of (key, n), its label and `how`; x_var: see `sampling.sample`.
    """
    network, logsnr = build.placed(config, network, mesh=mesh), grid(config, how)

    def sample(params: Any, key: Array, x_var: Any, indices: Array, labels: Array) -> Array:
        keys = sampling.image_keys(key, indices)
        # Rounded once for all steps.
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
        return to_uint8(x)

    return jax.jit(sample, out_shardings=sharding.batch_sharding(mesh))
