"""Config rows that distil published ImageNet networks (see `teachers.importer`)."""

import ml_collections

from mcm_jax.config import rows
from mcm_jax.config.settings import default_config
from mcm_jax.models import preconditioning
from mcm_jax.models.preconditioning import Preconditioning
from mcm_jax.system.errors import InputError

# Channels of EDM2's first level, by size; dropout of the sizes that were trained with it.
_EDM2 = {"edm2-s": (192, 0.0), "edm2-m": (256, 0.1), "edm2-l": (320, 0.1), "edm2-xl": (384, 0.1)}
# Kinds of networks with ADM's U-Net.
ADM: dict[str, Preconditioning] = {
    "edm": "edm",
    "openai_edm": "edm_1000",
    "adm64": "eps_cosine",
    "adm128": "eps_linear",
}
# By the resolution in pixels.
NETWORKS = {64: (*_EDM2, "edm", "openai_edm", "adm64"), 128: ("adm128",)}


def is_public(row: str, *, resolution: int) -> bool:
    """Whether a row names one of the published networks."""
    return not rows.parse_row(row)[0].isdisjoint(NETWORKS[resolution])


def set_schedule(config: ml_collections.ConfigDict, kind: Preconditioning) -> None:
    """Sets the paper's schedule, between the log-SNRs at which such networks were trained."""
    low, high = preconditioning.logsnr_range(kind)
    config.schedule.update(
        noise_resolution_low=min(32, config.data.resolution),
        end_points="kept",
        logsnr_min=round(low, 2),
        logsnr_max=round(high, 2),
    )


def imagenet(row: str, *, resolution: int) -> ml_collections.ConfigDict:
    """Returns the config of a row: a published network, and "cd,steps=S", "ct,steps=S" or "moments,steps=S".

    "cd,heun,steps=S", for networks of EDM, follows a published multistep distillation of EDM2-S in PyTorch
    (FID 3.44, 2.32 and 1.79 at 2, 4 and 8 steps) in what is known of it: Heun's step of the teacher, 256 to
    1,024 steps on EDM's grid, and the root of EDM's weight.

    "scd,steps=S" and "sct,steps=S" are for EDM's own network and those of EDM2.

    The batch, the learning rates and the number of updates are ours. They suit one GPU or eight TPU v5e.

    Raises:
      InputError: there is no such row.
    """
    words, numbers = rows.parse_row(row)
    networks, rest = words & set(NETWORKS[resolution]), words - set(NETWORKS[resolution])
    systems = [{"cd"}, {"ct"}, {"moments"}]
    if networks <= {*_EDM2, "edm", "openai_edm"}:
        systems.append({"cd", "heun"})
    if networks <= {*_EDM2, "edm"}:
        # The others change too fast with the noise level.
        systems += [{"scd"}, {"sct"}]
    if len(networks) != 1 or rest not in systems or set(numbers) != {"steps"}:
        heun = ""
        if resolution == 64:
            heun = ", or a network of EDM with cd,heun,steps=S, or edm or one of EDM2 with scd or sct,steps=S"
        raise InputError(
            f"there is no config row {row!r}: use one of {', '.join(NETWORKS[resolution])}, with "
            f"cd,steps=S, ct,steps=S or moments,steps=S{heun}"
        )
    (network,), (system,) = networks, rest - {"heun"}
    config = default_config()
    config.data.update(dataset="imagenet", resolution=resolution)
    config.objective = system
    if system in ("scd", "sct"):
        config.continuous.student_steps = numbers["steps"]
    elif system == "moments":
        config.moments.student_steps = rows.single(row, numbers, "steps")
    else:
        # The annealing ends before the training, as in the paper, though both are shorter.
        config.consistency.update(student_steps=numbers["steps"], anneal_steps=20_000)
    common = {"dtype": "bfloat16", "remat": "full"}
    if network in _EDM2:
        width, dropout = _EDM2[network]
        config.architecture = "edm2"
        config.edm2.update(widths=tuple(level * width for level in (1, 2, 3, 4)), dropout=dropout, **common)
        # Its weights have an rms of 1, many times that of others, so that a step of this size is small.
        config.optimizer.learning_rate = 1e-4
    else:
        config.architecture = "adm"
        config.adm.update(preconditioning=ADM[network], **common)
        if preconditioning.predicts_eps(ADM[network]):
            # x_hat = (z_t - s eps) / alpha, with 1 / alpha up to 80: bfloat16 would be too coarse.
            config.adm.dtype = "float32"
        if network == "adm128":
            config.adm.update(
                widths=(256, 256, 512, 768, 1024),
                blocks=2,
                attention_levels=(False, False, True, True, True),
                heads=4,
            )
        config.optimizer.learning_rate = 2e-5
    set_schedule(config, ADM.get(network, "edm"))
    if "heun" in rest:
        default = default_config().schedule
        config.schedule.update(
            kind="karras", noise_resolution_low=default.noise_resolution_low, end_points=default.end_points
        )
        config.consistency.update(
            teacher_step="heun", teacher_steps_first=256.0, teacher_steps_last=1024.0, loss_weight="sqrt_edm"
        )
    config.optimizer.decay = "linear"
    config.training.update(num_steps=30_000, batch_size=256, accumulation_steps=8)
    return config
