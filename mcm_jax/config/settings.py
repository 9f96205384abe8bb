"""Every setting of a run: its name, default, meaning and range, in one place.

A config file builds a locked `ConfigDict` from `default_config`; `validation.validate` turns it into the
frozen, typed `Config` that the rest of the program reads. Nothing derived is stored. A setting that the
paper leaves open says so, with the reason for its default.
"""

import dataclasses
import typing
from pathlib import Path
from typing import Any, Literal

import ml_collections
from ml_collections import config_dict

from mcm_jax.diffusion.sampling import Clip, Sampler, XVar
from mcm_jax.diffusion.schedules import EndPoints, Grid
from mcm_jax.models.blocks import Norm, Saved
from mcm_jax.models.embeddings import NoiseScale
from mcm_jax.models.uvit import Remat, StageKind
from mcm_jax.objectives.consistency import TeacherStep
from mcm_jax.objectives.diffusion import LevelWeights
from mcm_jax.objectives.distances import LossWeight, Reduction
from mcm_jax.records import DIFFUSION_MODELS, Objective

LabelRule = Literal["uniform", "train_frequency"]
TargetNetwork = Literal["student", "ema"]

STAGED = ("tract", "progressive")


def _field(default: Any, doc: str, *, low: int | float | None = None, high: int | float | None = None) -> Any:
    """A setting with its meaning and its inclusive range."""
    return dataclasses.field(default=default, metadata={"doc": doc, "low": low, "high": high})


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are read."""

    dataset: str = _field(
        "openmoji", "openmoji, imagenet, imagenet/adm, imagenet/resized or folder/NAME, by mcm_jax.prepare"
    )
    data_dir: str = _field("data", "where prepared data sets lie")
    resolution: int = _field(32, "height and width of the images in pixels", low=1)
    horizontal_flip: bool = _field(
        True, "flip half of the training images (open for the consistency stages; ours: as the teacher)"
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Every size of the UViT (SPEC 6)."""

    kinds: tuple[StageKind, ...] = _field(
        ("resnet", "resnet", "transformer"), "kind of each stage, from the top to the middle"
    )
    widths: tuple[int, ...] = _field((32, 64, 128), "channels of each stage", low=1)
    blocks: tuple[int, ...] = _field((1, 1, 4), "blocks of each stage, on each side", low=1)
    dropouts: tuple[float, ...] = _field(
        (0.0, 0.0, 0.0), "dropout of each stage, to the nearest 1/256", low=0, high=0.99
    )
    embedding_width: int = _field(128, "width of the conditioning vector", low=2)
    head_width: int = _field(32, "attention head width (open: 64 or 128 at full size)", low=1)
    mlp_factor: int = _field(4, "hidden width of a transformer's MLP over its width", low=1)
    resnet_norm: Norm = _field(
        "layer", "norm of ResNet blocks and of the output (open); group is the faster by a TPU's compiler"
    )
    noise_scale: NoiseScale = _field("arctan", "axis of the noise level's embedding (open)")
    dtype: Literal["float32", "bfloat16"] = _field("float32", "what activations compute in")
    remat: Remat = _field(
        "none",
        "what the gradient computes again instead of keeping it: nothing, every block, all of a block but "
        "its matrix products, or all but what `saved` names",
    )
    saved: tuple[Saved, ...] = _field(
        ("conv_1", "mlp_in", "attention"),
        "what remat=names keeps of every block: the products conv_1, mlp_in and qkv, the result of attention",
    )
    unroll: bool = _field(
        True,
        "transformer blocks one after the other; False: a loop, which compiles faster and runs slower on CPU",
    )
    attention: Literal["fused", "einsum"] = _field(
        "fused",
        "by a kernel where the devices are TPUs, head_width and the number of positions are "
        "multiples of 128, and these at most 1024; or always written out",
    )


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule (SPEC 2): cosine, shifted or interpolated by its two resolutions."""

    noise_resolution_low: int | None = _field(
        None, "n_low of the interpolated schedule in pixels; None: the image's resolution", low=1
    )
    noise_resolution_high: int | None = _field(
        None, "n_high, the noise at t = 1; None: the image's resolution", low=1
    )
    end_points: EndPoints = _field(
        "moved", "whether a shift moves the log-SNR's ends (open; moved is the formula as it stands)"
    )


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The diffusion teacher's objective (SPEC 5); no meaning for the others."""

    levels: tuple[int, ...] = _field(
        (), "sides in pixels of the multiscale loss, e.g. (128, 64); (): the plain v-loss", low=1
    )
    level_weights: LevelWeights = _field(
        "reciprocal", "weights of the levels (open; ours: 1/r, normalised to sum 1)"
    )
    label_dropout: float = _field(
        0.0, "share of labels replaced by 'any class'; 0.1 where guidance is used (open)", low=0, high=1
    )


@dataclasses.dataclass(frozen=True)
class ConsistencyConfig:
    """Multistep consistency (SPEC 4) and the staged methods (SPEC 5); no meaning for diffusion.

    Of them tract reads stages, loss_weight and target_decay, progressive reads stages, loss_weight,
    teacher_step, xvar_frac and later_xvar_frac.
    """

    student_steps: int | None = _field(None, "cd, ct: S, network calls of the student's sampler", low=1)
    stages: tuple[int, ...] = _field(
        (),
        "tract, progressive: steps of the teacher, then of each stage's student, e.g. (1024, 32, 1)",
        low=1,
    )
    teacher_steps_first: float = _field(64.0, "N_teacher at the first update", low=1)
    teacher_steps_last: float = _field(1280.0, "N_teacher at the end of the annealing", low=1)
    anneal_steps: int = _field(100_000, "updates from first to last, exponentially", low=1)
    teacher_step: TeacherStep = _field("addim", "integrator of the teacher's step")
    xvar_frac: float = _field(0.75, "x_var = xvar_frac ||x_teacher - x||^2 / d", low=0)
    later_xvar_frac: float = _field(
        0.0, "progressive: xvar_frac after the first stage (open; its teacher carries the adjustment)", low=0
    )
    huber_epsilon: float = _field(1e-4, "pseudo-Huber's epsilon, in units of a pixel", low=1e-30)
    huber_reduction: Reduction = _field("mean", "of the squares in the distance (open; see pseudo_huber)")
    loss_weight: LossWeight | None = _field(
        None,
        "w_t (open); None: sqrt_snr_plus_one for cd and ct, whose unsquared distance the root makes that in "
        "v; max_snr_one for tract and progressive",
    )
    target_network: TargetNetwork = _field(
        "student", "whose x_ref: the student's own, or that of its averaged parameters"
    )
    target_decay: float | None = _field(
        None,
        "decay of the target network's average, bias-corrected; None: 0.5 for tract, else 0.95 (open)",
        low=0,
        high=0.999999,
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Adam, its learning rate, and the averaged parameters."""

    learning_rate: float = _field(1e-4, "peak learning rate of Adam (open)", low=0)
    warmup_steps: int = _field(0, "updates of linear warm-up, the first at peak / warmup_steps", low=0)
    decay: Literal["constant", "linear"] = _field("constant", "after the warm-up; linear ends at 0")
    b1: float = _field(0.9, "Adam's b1 (open)", low=0, high=0.999999)
    b2: float = _field(0.99, "Adam's b2 (open)", low=0, high=0.999999)
    eps: float = _field(1e-12, "Adam's epsilon (open)", low=1e-30)
    clip_norm: float = _field(1.0, "largest global norm of the gradient (open)", low=1e-30)
    ema_decay: float = _field(0.9999, "decay of the averaged parameters (open)", low=0, high=1)


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How long, how many at a time, and how often to save and show."""

    num_steps: int = _field(200_000, "updates in all", low=1)
    batch_size: int = _field(2048, "images an update, over all devices", low=1)
    accumulation_steps: int = _field(
        1, "parts of the batch whose gradients are computed one after the other, where memory is short", low=1
    )
    log_every_steps: int = _field(100, "updates between two lines of metrics", low=1)
    checkpoint_every_steps: int = _field(5_000, "updates between two checkpoints", low=1)
    keep_checkpoints: int = _field(2, "checkpoints kept, the newest ones", low=1)
    sample_every_steps: int = _field(10_000, "updates between two sample grids; 0: none", low=0)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged."""

    data: int = _field(-1, "devices over which the batch alone is split; -1: all that are left", low=-1)
    fsdp: int = _field(
        1,
        "devices over which the parameters are split too; each gathers them whole for every part of a batch",
        low=1,
    )


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the run is sampled where nothing else is asked for."""

    sampler: Sampler = _field("addim", "a teacher's sampler; students take ddim")
    teacher_steps: int = _field(512, "steps of the teacher's sampler", low=1)
    noise_grid: Grid = _field(
        "schedule", "a teacher's noise levels: uniform in t, or karras; students: schedule"
    )
    x_var: XVar = _field(
        "analytic", "of addim and noisy_ddim: 0.1 / (2 + SNR), or measured on training images"
    )
    x_var_eta: float = _field(0.75, "eta: measured x_var = eta ||x - x_hat||^2 / d", low=0)
    x_var_images: int = _field(1024, "training images that x_var is measured on, at most", low=1)
    guidance: float = _field(0.0, "g of a teacher's samples; x_hat + g (x_hat - x_hat of any class)", low=0)
    clip: Clip = _field("last", "clip x_hat to [-1, 1] in the last step, in every one, or never (open)")
    label_rule: LabelRule = _field(
        "uniform", "how classes are drawn (open; uniform is SPEC 7's, train_frequency the data's)"
    )
    batch_per_device: int = _field(64, "images a device samples at once, padded", low=1)


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. `objective` selects what is minimised."""

    objective: Objective = _field(
        "diffusion",
        "diffusion (the teacher), cd or ct (consistency, distilled or trained), tract, progressive, guidance",
    )
    seed: int = _field(0, "base of all randomness in training", low=0, high=2**32 - 1)
    teacher_checkpoint: str | None = _field(
        None, "workdir of the diffusion model that all other objectives start from and all but ct distil"
    )
    teacher_guidance: float = _field(
        0.0, "cd, guidance: g of the teacher's prediction; 0: none (open for cd: see objectives)", low=0
    )
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)
    consistency: ConsistencyConfig = dataclasses.field(default_factory=ConsistencyConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)

    @property
    def knows_any_class(self) -> bool:
        """Whether the model was trained for the label 'any class', which guidance asks."""
        return self.objective == "diffusion" and self.diffusion.label_dropout > 0

    @property
    def student_steps(self) -> int | None:
        """The only step count that this run's model is trained for; None for a model of all of time."""
        if self.objective in DIFFUSION_MODELS:
            return None
        return self.consistency.stages[-1] if self.objective in STAGED else self.consistency.student_steps


def stage_configs(config: Config, workdir: Path) -> list[tuple[Path, Config]]:
    """The runs, one after the other, that `config` in `workdir` stands for.

    One, itself, unless it has several stages: then each is a run of its own in workdir/steps_N with the run
    before as its teacher, so that it resumes, is sampled and is evaluated like any other.
    """
    stages = config.consistency.stages
    if config.objective not in STAGED or len(stages) == 2:
        return [(workdir, config)]
    result, teacher, xvar_frac = [], config.teacher_checkpoint, config.consistency.xvar_frac
    for pair in zip(stages, stages[1:], strict=False):
        consistency = dataclasses.replace(config.consistency, stages=pair, xvar_frac=xvar_frac)
        stage_workdir = workdir / f"steps_{pair[1]}"
        result.append(
            (stage_workdir, dataclasses.replace(config, consistency=consistency, teacher_checkpoint=teacher))
        )
        teacher, xvar_frac = str(stage_workdir), config.consistency.later_xvar_frac
    return result


def default_config() -> ml_collections.ConfigDict:
    """All settings with their defaults, as a locked ConfigDict for a config file to fill in."""
    return _to_config_dict(Config())


def _to_config_dict(settings: Any) -> ml_collections.ConfigDict:
    result = ml_collections.ConfigDict()
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            value = _to_config_dict(value)
        elif value is None:
            hint = without_none(hints[field.name])
            value = config_dict.placeholder(str if typing.get_origin(hint) is Literal else hint)
        result[field.name] = value
    return result.lock()


def without_none(hint: Any) -> Any:
    """T of T | None."""
    return next(kind for kind in typing.get_args(hint) if kind is not type(None))
