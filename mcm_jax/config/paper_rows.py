"""Config rows for the paper's ImageNet tables, at full size (SPEC 4 to 6).

Settings that do not appear here keep their defaults in `config.settings`, which are the paper's values.
"""

import dataclasses
from collections.abc import Collection, Mapping

import ml_collections

from mcm_jax.config import rows
from mcm_jax.config.settings import default_config
from mcm_jax.system.errors import InputError

# Numbers of TPU v5e chips of the published speeds; mini is ours. The paper leaves the sharding of parameters
# open; here it is over all chips.
_CHIPS = {"mini": 8, "small": 64, "large": 256}

# For each system: the words it allows, the numbers it requires, and the numbers it allows.
_SYSTEMS = {
    "teacher": (set(), set(), set()),
    "ct": (set(rows.CT_STYLES), {"steps"}, {"teacher_steps"}),
    "cd": ({"ddim"}, {"steps"}, {"teacher_steps"}),
    "sct": (set(), {"steps"}, set()),
    "scd": (set(), {"steps"}, set()),
    "ayf": (set(), set(), set()),
    "meanflow": (set(), set(), set()),
    "shortcut": (set(), set(), set()),
    "moments": (set(), {"steps"}, set()),
    "pd": (set(), {"steps"}, set()),
    "tract": (set(), {"steps"}, set()),
}
_ALLOWED = (
    "with teacher, ayf, meanflow or shortcut, or with ct, cd, sct, scd, moments, pd or tract and steps=S, "
    "such as cd,steps=4; ct and cd may add teacher_steps=N, cd may add ddim, and ct "
    "may add ict or ect"
)


@dataclasses.dataclass(frozen=True)
class Size:
    """Settings that differ between the sizes of a network, besides the widths.

    Attributes:
      dropouts: the dropout rate of each stage.
      guidance: guidance weight g for sampling the diffusion model and for its distillation by CD; 0: none.
    """

    dropouts: tuple[float, ...]
    guidance: float = 0.0


def imagenet(
    row: str,
    *,
    resolution: int,
    widths: tuple[int, ...],
    sizes: Mapping[str, Size],
    levels: tuple[int, ...] = (),
) -> ml_collections.ConfigDict:
    """Returns the config of a row: a size, a system and the numbers required by the system, in any order.

    Sizes: "small" and "large"; "mini", see `_mini`. Systems: "teacher" (the diffusion model);
    "ct,steps=S"; "cd,steps=S"; "pd,steps=S" (progressive distillation, 1024 -> 512 ... -> S);
    "tract,steps=S" (1024 -> 32 -> S). Trained like ct and cd, though not the paper's: "sct,steps=S" and
    "scd,steps=S" (continuous time), "moments,steps=S" (moment matching), "ayf", "meanflow" and
    "shortcut" (flow maps).
    Several numbers, as in "cd,steps=1+2+4", train one student for all of them.
    "ct,ict" and "ct,ect" have the teacher steps and weights of iCT and ECT.
    With ct and cd, "teacher_steps=N" sets a constant N_teacher; with cd, "ddim" sets DDIM as the teacher's
    step.

    Args:
      resolution: height and width of the images in pixels.
      sizes: the settings of each size that there is.
      widths: channels of the small network's stages, highest resolution first; the last two stages are
        transformers, the others ResNets.
      levels: resolutions of the teacher's multiscale loss, in pixels; (): the loss at full resolution only.

    Raises:
      InputError: there is no such row.
    """
    size, system, options, numbers = _parse(row, sizes)
    settings = sizes[size]
    if size == "mini":
        paper = imagenet(
            row.replace("mini", "small"),
            resolution=resolution,
            widths=widths,
            sizes={"small": settings},
            levels=levels,
        )
        return _mini(paper)
    config = default_config()
    config.data.update(dataset="imagenet", resolution=resolution)
    config.schedule.update(noise_resolution_low=32, noise_resolution_high=resolution)
    factor = {"small": 1, "large": 2}[size]
    config.model.update(
        kinds=("resnet",) * (len(widths) - 2) + ("transformer",) * 2,
        widths=tuple(factor * width for width in widths),
        blocks=(3,) * (len(widths) - 1) + (16,),
        dropouts=settings.dropouts,
        embedding_width=1024,
        # The paper leaves open 64 or 128; 128 is the width of a TPU's matrix unit.
        head_width=128,
        # The paper leaves open layer or group norm; by the compiler's estimate, group is faster on a TPU.
        resnet_norm="group",
        dtype="bfloat16",
    )
    config.mesh.fsdp = _CHIPS[size]
    if system == "teacher":
        config.diffusion.levels = levels
        if settings.guidance > 0:
            config.diffusion.label_dropout = 0.1
            config.sampling.guidance = settings.guidance
        config.optimizer.warmup_steps = 10_000
        # The paper leaves the number of updates open. Samples take 512 steps, so draw them less often than
        # for students.
        config.training.update(num_steps=1_000_000, sample_every_steps=50_000)
        return config
    config.objective = "progressive" if system == "pd" else system
    config.optimizer.update(learning_rate=2e-5, decay="linear")
    if system in ("ct", "cd"):
        config.consistency.student_steps = numbers["steps"]
        if "teacher_steps" in numbers:
            constant = float(rows.single(row, numbers, "teacher_steps"))
            config.consistency.update(teacher_steps_first=constant, teacher_steps_last=constant)
        for style in options & set(rows.CT_STYLES):
            config.consistency.update(rows.CT_STYLES[style])
        if "ict" in options:
            config.consistency.anneal_steps = config.training.num_steps
        if "ect" in options and resolution == 64:
            config.consistency.ect_q = 4.0
    elif system == "shortcut":
        pass  # The defaults.
    elif system in rows.FLOW_MAP_SETTINGS:
        config.flow_map.update(rows.FLOW_MAP_SETTINGS[system])
        config.model.noise_scale = "smooth"
        config.flow_map.teacher_guidance = settings.guidance if system == "ayf" else 0.0
        config.sampling.teacher_steps = 4
    elif system in ("sct", "scd"):
        config.continuous.student_steps = numbers["steps"]
        # The teacher must have it too.
        config.model.noise_scale = "smooth"
        config.continuous.teacher_guidance = settings.guidance if system == "scd" else 0.0
    elif system == "moments":
        config.moments.update(
            student_steps=rows.single(row, numbers, "steps"), teacher_guidance=settings.guidance
        )
    else:
        stages, config.training.num_steps = _stages(row, system, rows.single(row, numbers, "steps"))
        config[config.objective].stages = stages
    if system == "cd":
        config.consistency.teacher_guidance = settings.guidance
        config.consistency.teacher_step = "ddim" if "ddim" in options else "addim"
    return config


def _mini(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Turns a row of the small network into one for a GPU or eight chips; not the paper's.

    It has a quarter of the parameters and of the batch, and fewer updates. By the estimates of
    results/plan/mini.md, eight TPU v5e train the teacher in 14 hours, and a student in 7.
    """
    config.model.widths = tuple(width // 2 for width in config.model.widths)
    config.model.embedding_width //= 2
    config.mesh.fsdp = _CHIPS["mini"]
    config.training.batch_size //= 4
    if config.objective == "diffusion":
        config.optimizer.warmup_steps //= 2
        config.training.num_steps = 300_000
        return config
    config.training.num_steps //= 2
    if config.objective in ("ct", "cd") and config.consistency.teacher_grid == "ect":
        config.consistency.ect_stage_steps //= 2
    elif config.objective in ("ct", "cd"):
        config.consistency.anneal_steps //= 2
    elif config.objective in ("sct", "scd"):
        config.continuous.warmup_steps //= 2
    elif config.objective in rows.FLOW_MAP_SETTINGS:
        config.flow_map.warmup_steps = max(1, config.flow_map.warmup_steps // 2)
    return config


def _parse(row: str, known: Collection[str]) -> tuple[str, str, set[str], dict[str, tuple[int, ...]]]:
    """Parses a row into (size, system, other words, numbers)."""
    words, numbers = rows.parse_row(row)
    sizes, systems = words & set(known), words & set(_SYSTEMS)
    if len(sizes) == len(systems) == 1:
        (size,), (system,) = sizes, systems
        others = words - sizes - systems
        options, needed, allowed = _SYSTEMS[system]
        if (
            others <= options
            and len(others & set(rows.CT_STYLES)) < 2
            and needed <= set(numbers) <= needed | allowed
        ):
            return size, system, others, numbers
    raise InputError(f"there is no config row {row!r}: use {', '.join(known)} {_ALLOWED}")


def _stages(row: str, system: str, last: int) -> tuple[tuple[int, ...], int]:
    """Returns the numbers of steps (of the teacher, then of each stage's student) and of updates per stage.

    The paper does not specify the updates. Here all stages together (ten of progressive distillation down to
    one step, or two of TRACT) have 200,000 updates, like the consistency models they are compared with.
    """
    if system == "pd":
        return rows.halvings(row, first=1024, last=last), 20_000
    if last not in (1, 2, 4, 8, 16):
        raise InputError(f"config row {row!r}: steps={last} must be one of 1, 2, 4, 8, 16")
    return (1024, 32, last), 100_000


# The two guidance weights of the paper's table 6.
_GUIDANCES = {"low": 0.5, "high": 3.0}


def text_to_image(row: str) -> ml_collections.ConfigDict:
    """Returns the config of a row of the paper's text to image at 512x512 (SPEC 10).

    Rows: "teacher"; "guidance,low" and "guidance,high" (distillation of its guided prediction with weight 0.5
    and 3); "cd,steps=S" (distillation of what one of these has trained).

    Raises:
      InputError: there is no such row.
    """
    words, numbers = rows.parse_row(row)
    known = [({"teacher"}, set()), ({"cd"}, {"steps"}), *(({"guidance", name}, set()) for name in _GUIDANCES)]
    if (words, set(numbers)) not in known:
        raise InputError(
            f"there is no config row {row!r}: use teacher, guidance,low, guidance,high or cd,steps=S"
        )
    config = default_config()
    # The paper's data and text encoder are not named. A mirrored image may contradict its caption.
    config.data.update(
        dataset="folder/captioned", resolution=512, encoder="t5-v1_1-xxl", horizontal_flip=False
    )
    config.schedule.update(noise_resolution_low=32, noise_resolution_high=512)
    config.model.update(
        kinds=("resnet", "resnet", "resnet", "transformer", "transformer"),
        widths=(128, 256, 1024, 2048, 4096),
        blocks=(3, 3, 3, 3, 16),
        dropouts=(0.0, 0.0, 0.0, 0.0, 0.1),
        # Not stated. The published speed rules out a middle at 32x32, where it would exceed the chips' peak.
        patch=2,
        # A step fits 256 TPU v5e only with recomputation and with parameters gathered block by block.
        remat="full",
        unroll=False,
        embedding_width=1024,
        head_width=128,
        resnet_norm="group",
        dtype="bfloat16",
    )
    config.mesh.update(fsdp=256, gather="blocks")
    if "teacher" in words:
        config.diffusion.update(levels=(512, 256, 128, 64, 32), label_dropout=0.1)
        config.sampling.update(sampler="ddpm", teacher_steps=256, guidance=_GUIDANCES["low"])
        config.optimizer.warmup_steps = 10_000
        # The paper leaves the number of updates open.
        config.training.update(num_steps=1_000_000, sample_every_steps=50_000)
        return config
    # Both as for cd, since the paper does not state them for guidance.
    config.optimizer.update(learning_rate=2e-5, decay="linear")
    config.training.num_steps = 30_000
    if "cd" in words:
        for steps in numbers["steps"]:
            if 256 % max(steps, 1):
                raise InputError(f"config row {row!r}: steps={steps} must divide the 256 teacher steps")
        config.objective = "cd"
        config.consistency.update(
            student_steps=numbers["steps"],
            teacher_steps_first=256.0,
            teacher_steps_last=256.0,
            huber_epsilon=1.0,
        )
        return config
    config.objective = "guidance"
    (weight,) = (weight for name, weight in _GUIDANCES.items() if name in words)
    config.guidance.teacher_guidance = weight
    config.sampling.update(sampler="ddim", teacher_steps=256)
    return config
