"""Parses the row in --config=FILE:ROW, and defines the rows of the tiny configs."""

from collections.abc import Mapping

import ml_collections

from mcm_jax.config.settings import default_config
from mcm_jax.system.errors import InputError

# The settings of flow maps that AYF and MeanFlow state differently.
FLOW_MAP_SETTINGS: dict[str, dict[str, object]] = {
    "ayf": {"warmup_last": 0.99},
    "meanflow": {
        "equal_share": 0.75,
        "proposal": "lognormal",
        "normalised": "loss",
        "floor": 0.01,
        "warmup_steps": 1,
    },
}
# The settings of `ct` that iCT (arXiv:2310.14189) and ECT (arXiv:2406.14548) state differently. iCT's epsilon
# 0.00054 sqrt(d) for the sum over d is 0.00054 for the mean.
CT_STYLES: dict[str, dict[str, object]] = {
    "ict": {
        "teacher_grid": "doubling",
        "teacher_steps_first": 10.0,
        "huber_epsilon": 0.00054,
        "loss_weight": "inverse_gap",
    },
    "ect": {"teacher_grid": "ect", "proposal": "lognormal", "loss_weight": "edm"},
}


def tiny(row: str, *, dataset: str, resolution: int) -> ml_collections.ConfigDict:
    """Returns the config of a row with a network and training small enough for two CPU cores.

    Rows: "teacher", "cd,steps=S", "ct,steps=S", "scd,steps=S", "sct,steps=S", "moments,steps=S", "ayf",
    "meanflow", "shortcut", "tract" (64 -> 8 -> 1), "progressive" (64 -> 32 ... -> 1, or to "steps=S"), and
    "guidance".
    Several numbers, as in "cd,steps=1+2+4+8+16", train one student for all of them, except in moments.
    "ct,ict,steps=S" and "ct,ect,steps=S" are ct with the teacher steps and weights of iCT and ECT.

    The method is the paper's, the settings are not: fewer updates need a higher learning rate, faster
    annealing and a shorter average.

    Raises:
      InputError: there is no such row.
    """
    words, numbers = parse_row(row)
    # For each system, the numbers that it requires and the numbers that it allows.
    systems = {
        "teacher": ((), ()),
        "cd": (("steps",), ()),
        "ct": (("steps",), ()),
        "scd": (("steps",), ()),
        "sct": (("steps",), ()),
        "ayf": ((), ()),
        "meanflow": ((), ()),
        "shortcut": ((), ()),
        "moments": (("steps",), ()),
        "tract": ((), ()),
        "progressive": ((), ("steps",)),
        "guidance": ((), ()),
    }
    styles = words & set(CT_STYLES) if "ct" in words else set()
    (system,) = words - styles if len(words - styles) == 1 and len(styles) < 2 else ("",)
    needed, allowed = systems.get(system, ((), ()))
    if system not in systems or not set(needed) <= set(numbers) <= {*needed, *allowed}:
        raise InputError(
            f"there is no config row {row!r}: use teacher, guidance, tract, progressive, ayf, meanflow, "
            "shortcut, or one of cd, ct, scd, sct and moments with steps=S, such as cd,steps=4, "
            "cd,steps=1+2+4 or ct,ect,steps=1"
        )
    config = default_config()
    config.data.update(dataset=dataset, resolution=resolution)
    config.optimizer.update(decay="linear", ema_decay=0.99)
    config.training.update(batch_size=64, log_every_steps=50, checkpoint_every_steps=250)
    config.sampling.update(teacher_steps=32, batch_per_device=64)
    if system == "teacher":
        config.optimizer.update(learning_rate=2e-3, warmup_steps=100)
        config.training.update(num_steps=1000, sample_every_steps=500)
        return config
    config.objective = system
    config.optimizer.learning_rate = 3e-4
    config.training.update(num_steps=250, sample_every_steps=250)
    if system in ("cd", "ct"):
        # iCT and ECT shorten the teacher's steps during the whole training.
        lengths = {"ect_stage_steps": 30} if "ect" in styles else {"anneal_steps": 250 if styles else 150}
        config.consistency.update({"student_steps": numbers["steps"], **lengths})
        for style in styles:
            config.consistency.update(CT_STYLES[style])
    elif system in ("scd", "sct"):
        config.continuous.update(student_steps=numbers["steps"], warmup_steps=100)
        # The teacher must have it too.
        config.model.noise_scale = "smooth"
    elif system in FLOW_MAP_SETTINGS:
        config.flow_map.update({"warmup_steps": 100, **FLOW_MAP_SETTINGS[system]})
        config.model.noise_scale = "smooth"
        config.sampling.teacher_steps = 4
    elif system == "shortcut":
        # As for the students' own average: fewer updates need a shorter one.
        config.shortcut.target_decay = 0.99
    elif system == "moments":
        config.moments.student_steps = single(row, numbers, "steps")
    elif system == "tract":
        config.tract.stages = (64, 8, 1)
    elif system == "progressive":
        config.progressive.stages = halvings(row, first=64, last=single(row, numbers, "steps", default=1))
    else:
        config.guidance.teacher_guidance = 1.0
    return config


def captioned(row: str, *, dataset: str, resolution: int) -> ml_collections.ConfigDict:
    """Returns the config of a row of the paper's chain for text to image, on the scale of `tiny`.

    Rows: "teacher"; "guidance", which distils its guided prediction; "cd,steps=S", which distils that model
    with a constant number of teacher steps, as in the paper (SPEC 10).

    Raises:
      InputError: there is no such row.
    """
    words, numbers = parse_row(row)
    if (words, set(numbers)) not in [({"teacher"}, set()), ({"guidance"}, set()), ({"cd"}, {"steps"})]:
        raise InputError(f"there is no config row {row!r}: use teacher, guidance or cd,steps=S")
    config = tiny(row, dataset=dataset, resolution=resolution)
    # A mirrored image may contradict its caption.
    config.data.update(encoder="minilm", horizontal_flip=False)
    config.optimizer.ema_decay = 0.999
    if words == {"teacher"}:
        config.diffusion.label_dropout = 0.1
        config.sampling.guidance = 1.0
        config.training.update(num_steps=20_000, sample_every_steps=5_000, checkpoint_every_steps=1_000)
    else:
        config.training.update(num_steps=5_000, sample_every_steps=5_000, checkpoint_every_steps=1_000)
    if words == {"cd"}:
        config.consistency.update(teacher_steps_first=256.0, teacher_steps_last=256.0, huber_epsilon=1.0)
    return config


def parse_row(row: str) -> tuple[set[str], dict[str, tuple[int, ...]]]:
    """Parses 'cd,steps=2+4' into words and numbers: ({'cd'}, {'steps': (2, 4)}).

    Raises:
      InputError: a value is not a sum of whole numbers, or a name occurs twice.
    """
    words, numbers = set(), {}
    for part in filter(None, (part.strip() for part in row.split(","))):
        name, separator, number = part.partition("=")
        if not separator:
            words.add(name)
        elif not all(text.isdecimal() for text in number.split("+")):
            raise InputError(f"config row {row!r}: {part!r} is not NAME=WHOLE NUMBER, or NAME=1+2")
        elif name in numbers:
            raise InputError(f"config row {row!r}: {name} appears twice; remove one")
        else:
            numbers[name] = tuple(map(int, number.split("+")))
    return words, numbers


def single(row: str, numbers: Mapping[str, tuple[int, ...]], name: str, *, default: int | None = None) -> int:
    """The only number of this name in a row; InputError if there are several.

    Args:
      default: the number if there is none.
    """
    if name not in numbers and default is not None:
        return default
    if len(numbers[name]) > 1:
        raise InputError(f"config row {row!r}: {name} must be one number here")
    return numbers[name][0]


def halvings(row: str, *, first: int, last: int) -> tuple[int, ...]:
    """Returns the stages of progressive distillation, (first, first / 2, ..., last).

    Args:
      first: a power of two.

    Raises:
      InputError: `last`, the number of steps in `row`, is not one of first / 2, ..., 2, 1.
    """
    stages = tuple(first >> n for n in range(first.bit_length()))
    if last not in stages[1:]:
        raise InputError(f"config row {row!r}: steps={last} must be a power of two from 1 to {first // 2}")
    return stages[: stages.index(last) + 1]
