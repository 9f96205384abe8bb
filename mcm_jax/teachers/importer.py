"""Makes a workdir of a published network, so that it samples, evaluates and teaches like a trained run."""

import dataclasses
import hashlib
import io
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mcm_jax.config import public_rows, validation
from mcm_jax.config.settings import Config, default_config
from mcm_jax.data.layout import DatasetInfo
from mcm_jax.diffusion import schedules
from mcm_jax.models.adm import ADMSettings
from mcm_jax.models.preconditioning import Preconditioning
from mcm_jax.records import CONSISTENCY, Origin
from mcm_jax.runs import build, trainer, workdirs
from mcm_jax.system import files, pth
from mcm_jax.system.errors import InputError, reason
from mcm_jax.system.paths import Path
from mcm_jax.system.tensors import TensorFile
from mcm_jax.teachers import nvidia, weights
from mcm_jax.teachers.weights import Imported
from mcm_jax.training.checkpoints import Checkpoints
from mcm_jax.training.state import TrainState

_NVIDIA = "CC BY-NC-SA 4.0: non-commercial, share-alike"
_OPENAI_PRECONDITIONING: dict[str, Preconditioning] = {**public_rows.ADM, CONSISTENCY: "consistency"}
_OPENAI = "published for research, not for commercial deployment (model card); code MIT"


class Kind(NamedTuple):
    """A kind of published network: where it is from, under which licence."""

    source: str
    licence: str


KINDS = {
    "edm2": Kind("github.com/NVlabs/edm2", _NVIDIA),
    "edm": Kind("github.com/NVlabs/edm", _NVIDIA),
    "adm64": Kind("github.com/openai/guided-diffusion", _OPENAI),
    "adm128": Kind("github.com/openai/guided-diffusion", _OPENAI),
    "openai_edm": Kind("github.com/openai/consistency_models", _OPENAI),
    CONSISTENCY: Kind("github.com/openai/consistency_models", _OPENAI),
}


class Teacher(NamedTuple):
    """A published network, and the file that it was read from."""

    network: Imported
    origin: Origin


def load(file: Path, *, kind: str | None = None) -> Teacher:
    """Reads a published file and converts its network.

    Args:
      kind: the name of one of `KINDS`, needed only where the content does not show it.

    Raises:
      InputError: the file is no such network, or is damaged.
    """
    try:
        content = files.read_bytes(file)
    except OSError as error:
        raise InputError(f"--teacher={file} can't be read ({reason(error)})") from error
    network, found = read(content, name=file.name, kind=kind)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(network.params)):
        raise InputError(f"--teacher={file} contains NaN or infinity; get the file from its source again")
    sha256 = hashlib.sha256(content).hexdigest()
    return Teacher(network, Origin(kind=found, file=file.name, sha256=sha256, **KINDS[found]._asdict()))


def write(teacher: Teacher, workdir: Path, *, dataset: DatasetInfo, data_dir: Path) -> str:
    """Writes the network to `workdir` as a finished diffusion model.

    Args:
      dataset: the images that its students will train on; their classes must be the network's, in its order.
      data_dir: the directory of prepared data sets.

    Returns:
      A description of what was written, in lines.

    Raises:
      InputError: the network does not fit the data set, or `workdir` cannot be used.
    """
    network, origin = teacher
    if network.num_classes != dataset.num_classes or dataset.encoding is not None:
        conditions = "captions" if dataset.encoding is not None else f"{dataset.num_classes} classes"
        raise InputError(
            f"--teacher={origin.file} was trained on {network.num_classes} classes, but {dataset.dataset} "
            f"has {conditions}; use the images that it was trained on"
        )
    if network.resolution != dataset.resolution:
        raise InputError(
            f"--teacher={origin.file} was trained on images of {network.resolution}x{network.resolution} "
            f"pixels; add --resolution={network.resolution}"
        )
    config = validation.validate(_config(teacher, dataset=dataset, data_dir=data_dir))
    _write(workdir, workdirs.RunRecord(config=config, dataset=dataset, origin=origin), network)
    size = sum(leaf.size for leaf in jax.tree.leaves(network.params))
    return "\n".join(
        (
            f"{origin.file}: {origin.kind} with {size:,} parameters, from {origin.source}",
            f"  licence: {origin.licence}",
            f"  sha256 {origin.sha256}",
            f"  classes are taken to be in the order of {dataset.dataset}: 0 is {dataset.class_names[0]}",
            *_notes(config),
            f"  {workdir}",
            f"next: python -m mcm_jax.sample --workdir={workdir} --num=16 --out=samples.png",
        )
    )


def _notes(config: Config) -> list[str]:
    grid = config.sampling.noise_grid
    if not schedules.is_published(grid):
        return []
    return [
        f"  two steps use the noise levels of {grid}; --noise_grid=published_cd or published_ct changes them"
    ]


def read(content: bytes, *, name: str, kind: str | None = None) -> tuple[Imported, str]:
    """Converts the content of a file; also returns the name of its kind.

    Args:
      name: the file's name, for error messages.
      kind: as in `load`.

    Raises:
      InputError: the content is no such network, is damaged, or is of another kind.
    """
    try:
        if nvidia.recognises(content):
            tensors, numbers = nvidia.read(content, name=name)
            found, convert = ("edm2", weights.edm2) if "unet.out_gain" in tensors else ("edm", weights.edm)
            imported = convert(tensors, numbers)
        elif pth.recognises(content):
            tensors = pth.read(content, name=name)
            found = _openai_kind(tensors, name=name, kind=kind)
            imported = weights.openai(tensors, preconditioning=_OPENAI_PRECONDITIONING[found])
        elif content[8:9] == b"{":
            file = TensorFile(io.BytesIO(content))
            found = CONSISTENCY
            imported = weights.diffusers({tensor: file.read(tensor) for tensor in file.shapes})
        else:
            raise InputError(
                f"--teacher={name} is neither a .pkl of EDM or EDM2, nor a .pt of OpenAI's ADM or "
                "consistency models, nor a .safetensors of the latter"
            )
    except InputError:
        raise
    # A damaged file can lack any tensor, or have one of any shape.
    except Exception as error:
        raise InputError(
            f"--teacher={name} is damaged, or not a network of the supported kinds ({reason(error)}); get "
            "the file from its source again"
        ) from error
    if kind not in (None, found):
        raise InputError(f"--teacher={name} is of kind {found}, not {kind}; remove --kind")
    return imported, found


def _openai_kind(tensors: weights.Tensors, *, name: str, kind: str | None) -> str:
    if len(tensors["out.2.weight"]) == 6:  # ADM also predicts a variance for each channel.
        levels = len(weights.openai_settings(tensors, "eps_cosine").widths)
        return "adm128" if levels == 5 else "adm64"
    # A diffusion model and a consistency model of consistency_models differ only in their files' names.
    named = {"edm_": "openai_edm", "cd_": CONSISTENCY, "ct_": CONSISTENCY}
    found = next((found for start, found in named.items() if name.startswith(start)), kind)
    if found is None:
        raise InputError(
            f"--teacher={name} is a diffusion or a consistency model, and its content does not show which; "
            "add --kind=openai_edm or --kind=consistency"
        )
    return found


def _config(teacher: Teacher, *, dataset: DatasetInfo, data_dir: Path) -> ml_collections.ConfigDict:
    config, settings = default_config(), teacher.network.settings
    config.architecture = "adm" if isinstance(settings, ADMSettings) else "edm2"
    config[config.architecture].update(dataclasses.asdict(settings))
    config.data.update(dataset=dataset.dataset, data_dir=str(data_dir), resolution=dataset.resolution)
    public_rows.set_schedule(config, settings.preconditioning)
    # It counts as finished: students start only from finished teachers.
    config.training.num_steps = 1
    config.data.in_memory_gb = 0.0
    if settings.preconditioning == "consistency":
        grid = "published_ct" if teacher.origin.file.startswith("ct_") else "published_cd"
        config.sampling.update(sampler="consistency", teacher_steps=1, noise_grid=grid, clip="every")
    else:
        config.sampling.update(sampler="heun", teacher_steps=32, noise_grid="karras")
    return config


def _write(workdir: Path, record: workdirs.RunRecord, imported: Imported) -> None:
    """Writes run.json and a checkpoint at update 1, without a state of an optimizer."""
    config, dataset = record.config, record.dataset
    network = build.network(config, condition=build.condition(dataset))
    wanted = jax.tree.map(np.shape, network.abstract_params)
    if jax.tree.map(np.shape, imported.params) != wanted:
        raise InputError("--teacher: the file's tensors have other shapes than the network; get it again")
    existing = workdirs.existing_run(workdir, config)
    if existing is not None and existing.origin != record.origin:
        raise InputError(f"--workdir={workdir} contains another network; choose another directory")
    size = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(imported.params))
    with workdirs.claim(workdir, record, existing=existing, needed_bytes=size), Checkpoints(workdir) as saved:
        params = jax.tree.map(jnp.asarray, imported.params)
        # It is finished, so no optimizer's state is needed; but Orbax rejects an empty one.
        opt_state = {"none": jnp.zeros(())}
        state = TrainState(jnp.ones((), jnp.int32), params=params, ema_params=params, opt_state=opt_state)
        saved.finish(state, trainer.train_batches(config), step=1)
