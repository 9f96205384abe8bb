"""All settings of a run: `Config`, and the settings that belong to no other module.

A config file builds a locked `ConfigDict` from `default_config`; `validation.validate` turns it into the
frozen, typed `Config` that the rest of the program reads. Each setting is declared once, next to the code
that uses it (see `mcm_jax.fields`). Settings that the paper leaves open are marked '(open)', most
with the reason for the default.
"""

import dataclasses
import typing
from typing import Literal

import ml_collections
from ml_collections import config_dict

from mcm_jax import records
from mcm_jax.diffusion.sampling import Clip, Sampler, XVar
from mcm_jax.diffusion.schedules import LOGSNR_LIMIT, EndPoints, Grid
from mcm_jax.fields import Affects, Settings, setting
from mcm_jax.models.adm import ADMSettings
from mcm_jax.models.edm2 import EDM2Settings
from mcm_jax.models.uvit import UViTSettings
from mcm_jax.objectives.consistency import Consistency
from mcm_jax.objectives.continuous import Continuous
from mcm_jax.objectives.diffusion import Diffusion
from mcm_jax.objectives.flow_map import FlowMap
from mcm_jax.objectives.guidance import Guidance
from mcm_jax.objectives.moments import Moments
from mcm_jax.objectives.multistep import Multistep
from mcm_jax.objectives.progressive import Progressive
from mcm_jax.objectives.shortcut import Shortcut
from mcm_jax.objectives.tract import Tract
from mcm_jax.records import Objective
from mcm_jax.system.paths import Path
from mcm_jax.system.sharding import MeshSettings
from mcm_jax.training.loop import TrainingSettings
from mcm_jax.training.optimizer import OptimizerSettings

LabelRule = Literal["uniform", "train_frequency"]

# The section of `Config` that holds an objective's settings.
SECTIONS = {
    "diffusion": "diffusion",
    "cd": "consistency",
    "ct": "consistency",
    "scd": "continuous",
    "sct": "continuous",
    "ayf": "flow_map",
    "meanflow": "flow_map",
    "shortcut": "shortcut",
    "moments": "moments",
    "tract": "tract",
    "progressive": "progressive",
    "guidance": "guidance",
}
# The section of `Config` that holds an architecture's settings.
ARCHITECTURES = {"uvit": "model", "adm": "adm", "edm2": "edm2"}
# The objectives that are trained in stages.
Staged = Tract | Progressive
# The objectives that call no teacher during training.
_FROM_DATA = ("diffusion", "ct", "sct", "meanflow", "shortcut")


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The data set and how images are read."""

    dataset: str = setting(
        "openmoji",
        "openmoji, avatars, emoji, coco, imagenet, imagenet/adm, imagenet/resized or folder/NAME",
    )
    data_dir: str = setting("data", "directory of the prepared data sets", affects=Affects.NOTHING)
    encoder: str | None = setting(
        None,
        "text encoder of the captions that condition the network; None: class labels",
        affects=Affects.ALL,
    )
    resolution: int = setting(32, "height and width of the images in pixels", low=1, affects=Affects.ALL)
    horizontal_flip: bool = setting(
        True, "flip half of the training images (open for the consistency stages; ours: there too)"
    )
    in_memory_gb: float = setting(
        1.0,
        "maximum GB of decoded training images held in memory; a larger split is read from disk",
        low=0,
        affects=Affects.NOTHING,
    )
    max_corrupt_records: int = setting(
        10,
        "maximum number of corrupt training records that each process skips; more end the run",
        low=0,
        affects=Affects.NOTHING,
    )


@dataclasses.dataclass(frozen=True)
class ScheduleSettings:
    """The noise schedule (SPEC 2): cosine, shifted or interpolated by its two resolutions, or Karras's."""

    kind: Literal["cosine", "karras"] = setting(
        "cosine",
        "cosine, with the resolutions below; or karras (not the paper's): EDM's grid from logsnr_min to "
        "logsnr_max",
        affects=Affects.ALL,
    )
    noise_resolution_low: int | None = setting(
        None,
        "n_low of the interpolated schedule in pixels; None: the image's resolution",
        low=1,
        affects=Affects.ALL,
    )
    noise_resolution_high: int | None = setting(
        None, "n_high, the noise at t = 1; None: the image's resolution", low=1, affects=Affects.ALL
    )
    end_points: EndPoints = setting(
        "moved",
        "whether a shift moves the ends of the log-SNR (open; moved follows the formula literally)",
        affects=Affects.ALL,
    )
    logsnr_min: float = setting(
        -LOGSNR_LIMIT,
        "log-SNR at t = 1 (open); rows of imported networks set both to the range of their training",
        low=-30,
        high=-1,
        affects=Affects.ALL,
    )
    logsnr_max: float = setting(LOGSNR_LIMIT, "log-SNR at t = 0 (open)", low=1, high=30, affects=Affects.ALL)


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """Default settings for sampling from a run."""

    sampler: Sampler = setting(
        "addim", "a teacher's sampler; students use ddim, or ddpm with moments", affects=Affects.SAMPLES
    )
    teacher_steps: int = setting(512, "steps of the teacher's sampler", low=1, affects=Affects.SAMPLES)
    noise_grid: Grid = setting(
        "schedule",
        "a teacher's noise levels: schedule (uniform in t), karras, or those of published consistency models "
        "(published_cd, published_ct); students use schedule",
        affects=Affects.SAMPLES,
    )
    x_var: XVar = setting(
        "analytic",
        "variance of addim and noisy_ddim: 0.1 / (2 + SNR), or measured on training images",
        affects=Affects.SAMPLES,
    )
    x_var_eta: float = setting(
        0.75, "eta: measured x_var = eta mean(||x - x_hat||^2 / d)", low=0, affects=Affects.SAMPLES
    )
    x_var_images: int = setting(
        1024, "maximum number of training images to measure x_var on", low=1, affects=Affects.SAMPLES
    )
    guidance: float = setting(
        0.0,
        "guidance weight g of a teacher: x_hat + g (x_hat - x_hat of any class)",
        low=0,
        affects=Affects.SAMPLES,
    )
    clip: Clip = setting(
        "last",
        "clip x_hat to [-1, 1] in the last step, in every step, or never (open)",
        affects=Affects.SAMPLES,
    )
    label_rule: LabelRule = setting(
        "uniform",
        "how classes are drawn (open): uniform as in SPEC 7, or train_frequency as in the data",
        affects=Affects.SAMPLES,
    )
    batch_per_device: int = setting(
        64, "images that a device samples at once; the last batch is padded", low=1, affects=Affects.NOTHING
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """The config of one run. `objective` selects the loss and the section that contains its settings."""

    objective: Objective = setting(
        "diffusion",
        "diffusion (the teacher), cd or ct (consistency, distilled or trained), scd or sct (the same in "
        "continuous time), moments (moment matching), ayf, meanflow or shortcut (flow maps, distilled or "
        "trained), tract, progressive, guidance",
    )
    seed: int = setting(0, "random seed of training", low=0, high=2**32 - 1)
    teacher_checkpoint: str | None = setting(
        None,
        "workdir of the teacher; required except for diffusion (ct, sct, meanflow and shortcut only copy its "
        "parameters)",
    )
    guide_checkpoint: str | None = setting(
        None,
        "workdir of a worse diffusion model, from which teacher_guidance moves away (autoguidance); None: "
        "the teacher's own prediction for 'any class'",
    )
    architecture: Literal["uvit", "adm", "edm2"] = setting(
        "uvit",
        "the network: uvit, with settings in config.model, or, for imported teachers, adm or edm2, "
        "with settings in config.adm or config.edm2",
        affects=Affects.ALL,
    )
    data: DataSettings = dataclasses.field(default_factory=DataSettings)
    model: UViTSettings = dataclasses.field(default_factory=UViTSettings)
    adm: ADMSettings = dataclasses.field(default_factory=ADMSettings)
    edm2: EDM2Settings = dataclasses.field(default_factory=EDM2Settings)
    schedule: ScheduleSettings = dataclasses.field(default_factory=ScheduleSettings)
    diffusion: Diffusion = dataclasses.field(default_factory=Diffusion)
    consistency: Consistency = dataclasses.field(default_factory=Consistency)
    continuous: Continuous = dataclasses.field(default_factory=Continuous)
    flow_map: FlowMap = dataclasses.field(default_factory=FlowMap)
    shortcut: Shortcut = dataclasses.field(default_factory=Shortcut)
    moments: Moments = dataclasses.field(default_factory=Moments)
    tract: Tract = dataclasses.field(default_factory=Tract)
    progressive: Progressive = dataclasses.field(default_factory=Progressive)
    guidance: Guidance = dataclasses.field(default_factory=Guidance)
    optimizer: OptimizerSettings = dataclasses.field(default_factory=OptimizerSettings)
    training: TrainingSettings = dataclasses.field(default_factory=TrainingSettings)
    mesh: MeshSettings = dataclasses.field(default_factory=MeshSettings)
    sampling: SamplingSettings = dataclasses.field(default_factory=SamplingSettings)

    @property
    def network(self) -> UViTSettings | ADMSettings | EDM2Settings:
        """The sizes of the selected architecture."""
        return getattr(self, ARCHITECTURES[self.architecture])

    @property
    def loss(
        self,
    ) -> Diffusion | Consistency | Continuous | Moments | FlowMap | Shortcut | Tract | Progressive | Guidance:
        """The selected objective with its settings; call it to compute the loss."""
        return getattr(self, SECTIONS[self.objective])

    @property
    def distils(self) -> bool:
        """Whether the objective calls a teacher during training."""
        return self.objective not in _FROM_DATA

    @property
    def teacher_guidance(self) -> float:
        """Guidance weight g of the teacher; 0 if the objective does not distil a guided teacher."""
        loss = self.loss
        return loss.teacher_guidance if isinstance(loss, Multistep | Moments | FlowMap | Guidance) else 0.0

    @property
    def target_decay(self) -> float | None:
        """Decay of the target network's average; None if the student itself provides x_ref."""
        loss = self.loss
        if isinstance(loss, Tract | Shortcut) or (
            isinstance(loss, Consistency) and loss.target_network == "ema"
        ):
            return loss.target_decay
        return None

    @property
    def batch_parts(self) -> int:
        """Number of equal parts of a batch that are processed one after another."""
        halves = 2 if isinstance(self.loss, Moments) and self.loss.instant else 1
        return halves * self.training.accumulation_steps

    @property
    def student_sampler(self) -> Sampler:
        """The sampler that the objective's students are trained for."""
        return records.student_sampler(self.objective)

    @property
    def supports_guidance(self) -> bool:
        """Whether the model is also trained for the label 'any class', as guidance requires."""
        return self.objective == "diffusion" and self.diffusion.label_dropout > 0

    @property
    def student_steps(self) -> tuple[int, ...]:
        """The numbers of steps that the model is trained for; () if it supports any number."""
        loss = self.loss
        if isinstance(loss, Staged):
            return (loss.stages[-1],)
        if isinstance(loss, Moments):
            return () if loss.student_steps is None else (loss.student_steps,)
        if isinstance(loss, Shortcut):
            return loss.trained_steps
        return loss.student_steps if isinstance(loss, Multistep) else ()

    @property
    def takes_end(self) -> bool:
        """Whether the network receives the end of each step; see `objectives.multistep`."""
        loss = self.loss
        return isinstance(loss, FlowMap | Shortcut) or (isinstance(loss, Multistep) and loss.takes_end)

    @property
    def is_student(self) -> bool:
        """Whether the model is made for few steps, and is no diffusion model."""
        return bool(self.student_steps) or self.takes_end


def stage_configs(config: Config, workdir: Path) -> list[tuple[Path, Config]]:
    """Returns the workdir and config of each run that `config` describes, in order.

    Without multiple stages this is `config` itself. Otherwise each stage is a separate run in workdir/steps_N
    whose teacher is the run before, so that it is resumed, sampled and evaluated like any other run.
    """
    loss, teacher = config.loss, config.teacher_checkpoint
    if not isinstance(loss, Staged) or len(loss.stages) == 2:
        return [(workdir, config)]
    result = []
    for pair in zip(loss.stages, loss.stages[1:], strict=False):
        stage_workdir = workdir / f"steps_{pair[1]}"
        stage = {config.objective: dataclasses.replace(loss, stages=pair), "teacher_checkpoint": teacher}
        result.append((stage_workdir, dataclasses.replace(config, **stage)))
        teacher = str(stage_workdir)
        if isinstance(loss, Progressive):
            loss = dataclasses.replace(loss, xvar_frac=loss.later_xvar_frac)
    return result


def default_config() -> ml_collections.ConfigDict:
    """Returns all settings with their defaults, as a locked ConfigDict for a config file to modify."""
    return _to_config_dict(Config())


def _to_config_dict(settings: Settings) -> ml_collections.ConfigDict:
    result = ml_collections.ConfigDict()
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = _to_config_dict(value)
        elif value is None:
            hint = without_none(hints[field.name])
            value = config_dict.placeholder(str if typing.get_origin(hint) is Literal else hint)
        result[field.name] = value
    return result.lock()


def without_none(hint: object) -> type:
    """Returns T for the type hint T | None."""
    return next(kind for kind in typing.get_args(hint) if kind is not type(None))
