"""A tiny data set and a config that trains in a second, for tests that need a real run."""

from pathlib import Path

import grain
import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from mcm_jax.config import validation
from mcm_jax.config.settings import default_config
from mcm_jax.data import pipeline, preparation
from mcm_jax.models.conditions import Classes
from mcm_jax.runs import build, workdirs
from mcm_jax.training import optimizer, step
from mcm_jax.training.checkpoints import Checkpoints

# Settings of config.model: a stage of each kind.
TWO_STAGES = {
    "kinds": ("resnet", "transformer"),
    "widths": (8, 16),
    "blocks": (1, 1),
    "dropouts": (0.1, 0.1),
}


def prepare_folder(directory: Path, *, resolution: int = 8, count: int = 40) -> Path:
    """Prepares folder/tiny, two classes of random images, in directory/data; returns that data_dir."""
    rng = np.random.default_rng(0)
    for n in range(count):
        path = directory / "images" / ("even" if n % 2 == 0 else "odd") / f"{n:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (2, 2, 3), np.uint8).repeat(8, axis=0).repeat(8, axis=1)
        Image.fromarray(pixels).save(path)
    data_dir = directory / "data"
    plan = preparation.plan(
        dataset="folder", resolution=resolution, manual_dir=str(directory / "images"), name="tiny"
    )
    preparation.prepare(plan, data_dir=data_dir, overwrite=False)
    return data_dir


def config(data_dir: Path, objective: str = "diffusion", teacher: Path | None = None):
    """A ConfigDict whose train step compiles in seconds."""
    result = default_config()
    result.objective = objective
    result.teacher_checkpoint = None if teacher is None else str(teacher)
    result.data.update(dataset="folder/tiny", data_dir=str(data_dir), resolution=8)
    result.model.update(
        kinds=("transformer",),
        widths=(16,),
        blocks=(1,),
        dropouts=(0.1,),
        embedding_width=16,
        head_width=8,
        mlp_factor=2,
        noise_scale="smooth",  # scd and sct need it, in their teacher too.
    )
    result.optimizer.update(learning_rate=1e-2, ema_decay=0.9)
    result.training.update(
        num_steps=4, batch_size=16, log_every_steps=1, checkpoint_every_steps=2, sample_every_steps=0
    )
    result.sampling.update(teacher_steps=4, batch_per_device=2)
    if objective in ("cd", "ct"):
        result.consistency.update(student_steps=(2,), anneal_steps=4)
    elif objective in ("scd", "sct"):
        result.continuous.update(student_steps=(2,), warmup_steps=2)
    elif objective in ("ayf", "meanflow"):
        result.flow_map.update(warmup_steps=2)
    elif objective == "shortcut":
        result.shortcut.smallest_steps = 8
    elif objective == "moments":
        result.moments.student_steps = 2
    elif objective in ("tract", "progressive"):
        result[objective].stages = (4, 2)
    return result


def two_stage_config(data_dir: Path, objective: str = "diffusion", teacher: Path | None = None):
    """`config` with a stage of each kind, for what depends on how their parameters are split."""
    result = config(data_dir, objective, teacher)
    result.model.update(TWO_STAGES)
    return result


def made_up_teacher(data_dir: Path, workdir: Path) -> Path:
    """A finished teacher without training; see `made_up_run`."""
    return made_up_run(two_stage_config(data_dir), workdir)


def made_up_run(config: ConfigDict, workdir: Path) -> Path:
    """A finished run without training: its parameters are random, none zero as after initialisation."""
    settings = validation.validate(config)
    dataset = pipeline.describe(data_dir=settings.data.data_dir, dataset="folder/tiny", resolution=8)
    network = build.network(settings, condition=Classes(dataset.num_classes))
    rng = np.random.default_rng(0)
    start = jax.device_get(jax.jit(network.init)(jax.random.key(0)))
    params = jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype), start)
    run = workdirs.RunRecord(config=settings, dataset=dataset)
    with workdirs.claim(workdir, run, existing=None, needed_bytes=0):
        pass
    state = step.init_state(params, optimizer.adam(settings.optimizer, num_steps=settings.training.num_steps))
    data = grain.MapDataset.range(1).to_iter_dataset()
    with Checkpoints(workdir, keep=1) as checkpoints:
        checkpoints.save(state, iter(data), step=settings.training.num_steps)
    return workdir
