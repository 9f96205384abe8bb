"""Resolves a run's sampling settings and builds the jitted sampler."""

import dataclasses
import fractions
import functools
import itertools
import math
import typing
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mcm_jax.config.settings import Config, Staged
from mcm_jax.data.pixels import Rounding, to_uint8
from mcm_jax.diffusion import sampling, schedules
from mcm_jax.diffusion.conditions import Cond
from mcm_jax.diffusion.guidance import guided, without_condition
from mcm_jax.diffusion.sampling import Clip, Sampler, XVar
from mcm_jax.diffusion.schedules import Grid
from mcm_jax.models.network import Network
from mcm_jax.objectives.shortcut import Shortcut
from mcm_jax.records import Origin, Sampling, lists_times
from mcm_jax.runs import build
from mcm_jax.system import sharding
from mcm_jax.system.errors import InputError
from mcm_jax.training.state import Params

SAMPLERS: tuple[Sampler, ...] = typing.get_args(Sampler)
NOISE_GRIDS: tuple[Grid, ...] = typing.get_args(Grid)
X_VARS: tuple[XVar, ...] = typing.get_args(XVar)
CLIPS: tuple[Clip, ...] = typing.get_args(Clip)
ROUNDINGS: tuple[Rounding, ...] = typing.get_args(Rounding)

T = TypeVar("T")
# See `sampler_fn`.
SamplerFn = Callable[[Params, Array, Float[Array, " N"] | None, Array, Cond], tuple[Array, Array]]


@dataclasses.dataclass(frozen=True, eq=False)
class Guide:
    """A worse model of the same images, which guidance leads away from (autoguidance).

    Attributes:
      name: its published file or its workdir.
      checkpoint: the identity of its checkpoint; None: unknown.
      origin: the published file that its parameters come from; None: none.
      network: its network, which may have other sizes.
      params: its parameters.
    """

    name: str
    checkpoint: str | None
    origin: Origin | None
    network: Network
    params: Params


def check_range(guide: Config, guided: Config) -> None:
    """Raises InputError unless the guide was trained at all log-SNRs of the run that it guides."""
    low, high = guide.schedule.logsnr_min, guide.schedule.logsnr_max
    if low > guided.schedule.logsnr_min or high < guided.schedule.logsnr_max:
        raise InputError(
            f"the guide was trained at log-SNRs from {low} to {high}, but is needed from "
            f"{guided.schedule.logsnr_min} to {guided.schedule.logsnr_max}; use another guide, or set "
            "config.schedule.logsnr_min and logsnr_max of a student"
        )


class NonFiniteSamplesError(InputError):
    """Samples contain NaN or infinity."""


def resolve(
    config: Config,
    *,
    steps: int | None = None,
    sampler: str | None = None,
    noise_grid: str | None = None,
    x_var: str | None = None,
    guidance: int | float | None = None,
    rounding: str | None = None,
    guide: Guide | None = None,
) -> Sampling:
    """Returns the settings for sampling a run of `config` with these arguments; None means the run's default.

    A student's defaults are its own number of steps (the largest of several), its objective's sampler, the
    schedule's grid and no guidance. By default, samples are rounded to the nearest byte.

    Args:
      guide: the model that guidance leads away from; None: the network itself, without condition.

    Raises:
      InputError: a name is not one of the choices, guidance is negative, not finite or used without a guide
        with a network that was trained without label dropout, x_var is used with a sampler that uses no
        variance, or there is a guide but no guidance.
    """
    settings, asked = config.sampling, guidance
    if config.is_student:
        settings = dataclasses.replace(
            settings,
            teacher_steps=max(config.student_steps, default=settings.teacher_steps),
            sampler=config.student_sampler,
            noise_grid="schedule",
            guidance=0.0,
        )
    chosen = _known("sampler", sampler or settings.sampler, SAMPLERS)
    if config.takes_end and chosen != "ddim":
        raise InputError(
            f"sampler={chosen} needs a model that predicts the mean of x; this student predicts the end of "
            "each step, so use ddim"
        )
    guidance = settings.guidance if guidance is None else guidance
    if not 0 <= guidance < math.inf:
        raise InputError(f"guidance={guidance} must be a finite number of at least 0")
    if guide is not None and guidance == 0 and asked is None:
        raise InputError(
            f"the guide {guide.name} has no effect without guidance; set guidance, for example to 1"
        )
    if guidance > 0 and guide is None and not config.supports_guidance:
        raise InputError(
            f"guidance {guidance} needs a diffusion model trained with config.diffusion.label_dropout above "
            "0, which this model was not, or a guide; use guidance 0, or add a guide"
        )
    guide = guide if guidance > 0 else None
    takes_variance = chosen in ("addim", "noisy_ddim")
    if x_var is not None and not takes_variance:
        raise InputError(f"x_var={x_var} has no effect on {chosen}; it applies to addim and noisy_ddim")
    x_var = _known("x_var", x_var or settings.x_var, X_VARS) if takes_variance else None
    measured = x_var == "measured"
    kind, steps = _grid(noise_grid or settings.noise_grid, steps, default=settings.teacher_steps)
    return Sampling(
        steps=steps,
        sampler=chosen,
        noise_grid=kind,
        x_var=x_var,
        x_var_eta=settings.x_var_eta if measured else None,
        x_var_images=settings.x_var_images if measured else None,
        guidance=guidance,
        guide=None if guide is None else guide.name,
        guide_checkpoint=None if guide is None else guide.checkpoint,
        clip=settings.clip,
        network_calls=sampling.network_calls(chosen, steps) * (2 if guidance else 1),
        rounding=_known("rounding", rounding or "nearest", ROUNDINGS),
    )


def _grid(noise_grid: str, steps: int | None, *, default: int) -> tuple[str, int]:
    """The name or the times of a grid, and its number of steps; see `resolve`."""
    times = grid_times(noise_grid)
    if times:
        kind = ",".join(repr(t).removesuffix(".0") for t in times)
        if steps not in (None, len(times)):
            raise InputError(f"steps={steps} contradicts noise_grid={kind}, which has {len(times)} times")
        return kind, len(times)
    kind, steps = _known("noise_grid", noise_grid, NOISE_GRIDS), steps or default
    if schedules.is_published(kind) and steps > 2:
        raise InputError(f"noise_grid={kind} has noise levels for 1 or 2 steps, not for {steps}")
    return kind, steps


def grid_times(noise_grid: str) -> tuple[float, ...]:
    """The times of a grid such as '1,1/2,1/4', at which the network is called; () for a grid with a name.

    Raises:
      InputError: the times do not descend from 1 to a number above 0.

    Examples:
      >>> grid_times("1,1/2,1/4"), grid_times("karras")
      ((1.0, 0.5, 0.25), ())
    """
    if not lists_times(noise_grid):
        return ()
    try:
        times = tuple(float(fractions.Fraction(text.strip())) for text in noise_grid.split(","))
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise InputError(f"noise_grid={noise_grid} must be a name or times such as 1,1/2,1/4") from error
    if times[0] != 1 or times[-1] <= 0 or any(t <= s for t, s in itertools.pairwise(times)):
        raise InputError(f"noise_grid={noise_grid} must descend from 1 to a time above 0")
    return times


def untrained_step(config: Config, times: Sequence[float]) -> tuple[float, float] | None:
    """The first step of a grid that a student was not trained for; None if there is none.

    A student of S steps is trained for the steps from any t in a segment to the segment's end, and in stages
    (TRACT, progressive distillation) and shortcut models only for those from boundary to boundary. The other
    flow maps support all steps.
    """
    whole_steps = isinstance(config.loss, Staged | Shortcut)

    def trained(t: float, u: float, steps: int) -> bool:
        # Fractions such as 1/3 are rounded.
        whole = [abs(time * steps - round(time * steps)) < 1e-6 for time in (t, u)]
        return whole[1] and (t - u) * steps < 1 + 1e-6 and (whole[0] or not whole_steps)

    for t, u in itertools.pairwise((*times, 0.0)):
        if config.student_steps and not any(trained(t, u, steps) for steps in config.student_steps):
            return t, u
    return None


def _known(name: str, value: str, choices: Sequence[T]) -> T:
    """Returns `value` as one of `choices`; raises InputError if it is not among them."""
    for choice in choices:
        if choice == value:
            return choice
    raise InputError(f"{name}={value} is not one of {', '.join(map(str, choices))}")


def grid(config: Config, settings: Sampling) -> Float[Array, " N"]:
    """The log-SNRs at which the network is called."""
    if settings.noise_grid == "karras":
        return schedules.karras_grid(settings.steps)
    times = grid_times(settings.noise_grid)
    if times:
        return build.schedule(config)(jnp.asarray(times, jnp.float32))
    kind = _known("noise_grid", settings.noise_grid, NOISE_GRIDS)
    if schedules.is_published(kind):
        return schedules.published_grid(kind, settings.steps)
    return schedules.uniform_grid(build.schedule(config), settings.steps)


def make_sampler(
    config: Config,
    network: Network,
    settings: Sampling,
    *,
    guide: Network | None = None,
    mesh: Mesh,
    trajectory: bool = False,
) -> jax.stages.Wrapped:
    """Returns the jitted `sampler_fn`, sharded over the mesh."""
    network = build.placed(config, network, mesh=mesh)
    sample = sampler_fn(config, network, settings, guide=guide, trajectory=trajectory)
    return jax.jit(sample, out_shardings=sharding.batch_sharding(mesh))


def sampler_fn(
    config: Config,
    network: Network,
    settings: Sampling,
    *,
    guide: Network | None = None,
    trajectory: bool = False,
) -> SamplerFn:
    """Returns (params, key, x_var, image indices, cond) -> (images, finite).

    The images are uint8; `finite` states for each whether it was finite before rounding. Image n depends only
    on (key, n), its condition, the parameters and `settings`. For x_var, see `sampling.sample`.

    Args:
      guide: the guide's network; `params` is then a pair, the network's and the guide's.
      trajectory: each image is then [N, r, r, 3], the x_hat of every step; see `sampling.sample`.
    """
    logsnr = grid(config, settings)
    sampler, clip = _known("sampler", settings.sampler, SAMPLERS), _known("clip", settings.clip, CLIPS)
    rounding = _known("rounding", settings.rounding, ROUNDINGS)

    def sample(
        params: Params, key: Array, x_var: Float[Array, " N"] | None, indices: Array, cond: Cond
    ) -> tuple[Array, Array]:
        keys = sampling.image_keys(key, indices)
        # The parameters are rounded once for all steps.
        own_params = params if guide is None else params[0]
        model_fn = functools.partial(network.apply, network.rounded(own_params))
        if settings.guidance > 0:
            if guide is None:
                guide_fn = without_condition(model_fn, network.condition.null)
            else:
                guide_fn = functools.partial(guide.apply, guide.rounded(params[1]))
            model_fn = guided(model_fn, guide_fn, guidance=settings.guidance)
        x = sampling.sample(
            model_fn,
            sampling.initial_noise(keys, network.shape),
            cond,
            keys,
            logsnr=logsnr,
            logsnr_end=build.schedule(config)(jnp.zeros(())) if config.takes_end else None,
            sampler=sampler,
            x_var=x_var,
            clip=clip,
            trajectory=trajectory,
        )
        # NaN would become an arbitrary gray level.
        finite = jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))
        return to_uint8(x, rounding=rounding), finite

    return sample
