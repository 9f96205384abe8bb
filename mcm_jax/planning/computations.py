"""The programs that a run executes on its devices: train step, sampler, and feature network for evaluation.

Each comes with abstract arguments, so that it can be compiled for devices that are not present.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

from mcm_jax.config.settings import Config, stage_configs
from mcm_jax.evaluation import inception_weights
from mcm_jax.evaluation.features import BATCH_PER_DEVICE, program
from mcm_jax.models.conditions import Captions, Classes, Condition
from mcm_jax.runs import build, samplers, workdirs
from mcm_jax.system import sharding
from mcm_jax.system.errors import InputError
from mcm_jax.system.paths import as_path
from mcm_jax.system.sharding import Device

# Classes of the data sets that can be planned for before they are prepared.
CLASSES = {"imagenet": 1000, "openmoji": 9, "avatars": 6, "emoji": 10, "coco": 1}
# Captions as text encoders embed them, by the encoder's name, with its default number of tokens.
CAPTIONS = {
    "minilm": Captions(128, 384, 384),
    "clip-vit-large-patch14": Captions(77, 768, 768),
    "t5-v1_1-small": Captions(128, 512, 512),
    "t5-v1_1-base": Captions(128, 768, 768),
    "t5-v1_1-large": Captions(128, 1024, 1024),
    "t5-v1_1-xl": Captions(128, 2048, 2048),
    "t5-v1_1-xxl": Captions(128, 4096, 4096),
}


def condition(config: Config) -> Condition:
    """What the network is conditioned on, by the names of the text encoder and the data set.

    Raises:
      InputError: the config names others than those in CAPTIONS and CLASSES.
    """
    data = config.data
    if data.encoder is not None:
        if data.encoder not in CAPTIONS:
            raise InputError(
                f"config.data.encoder={data.encoder}: the size of its embeddings is unknown; use one of "
                f"{', '.join(CAPTIONS)}"
            )
        return CAPTIONS[data.encoder]
    num_classes = CLASSES.get(data.dataset.partition("/")[0])
    if num_classes is None:
        raise InputError(f"config.data.dataset={data.dataset}: unknown classes; set --num_classes")
    return Classes(num_classes)


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function and its abstract arguments."""

    function: jax.stages.Wrapped
    arguments: tuple[PyTree, ...]
    mesh: Mesh
    num_params: int
    images: int  # number of images in one execution, over all devices


def train(config: Config, devices: Sequence[Device], *, condition: Condition) -> Program:
    """The train step (one update), of the last stage if there are several.

    Raises:
      InputError: the mesh or the batch size of `config` does not match the number of devices, or there is no
        run at config.guide_checkpoint.
    """
    _, config = stage_configs(config, Path())[-1]
    settings = config.training
    fitted = sharding.fitted(config.mesh, devices)
    mesh = sharding.make_mesh(data=fitted.data, fsdp=fitted.fsdp, devices=devices)
    sharding.check_batch(mesh, batch_size=settings.batch_size, accumulation_steps=settings.accumulation_steps)
    guide = (
        None if config.guide_checkpoint is None else workdirs.read(as_path(config.guide_checkpoint)).config
    )
    training = build.training(config, condition=condition, mesh=mesh, guide=guide)
    batch = {
        "image": jax.ShapeDtypeStruct((settings.batch_size, *build.image_shape(config)), jnp.float32),
        **condition.abstract(settings.batch_size),
    }
    arguments = (training.abstract, training.abstract_teacher, batch)
    num_params = _count(training.abstract.params)
    return Program(training.train_step(), arguments, mesh, num_params, settings.batch_size)


def sample(config: Config, devices: Sequence[Device], *, condition: Condition) -> Program:
    """Sampling one batch per device with replicated parameters, as in `runs.run.Run.sample`."""
    mesh = sharding.make_mesh(data=-1, fsdp=1, devices=devices)
    images = config.sampling.batch_per_device * mesh.size
    network, settings = build.network(config, condition=condition), samplers.resolve(config)
    params = network.abstract_params
    x_var = jax.ShapeDtypeStruct((settings.steps,), jnp.float32) if settings.x_var == "measured" else None
    everywhere = (params, jax.eval_shape(lambda: jax.random.key(0)), x_var)
    indices = jax.ShapeDtypeStruct((images,), jnp.int32)
    arguments = (
        *_placed(everywhere, sharding.replicated(mesh)),
        *_placed((indices, condition.of(condition.abstract(images))), sharding.batch_sharding(mesh)),
    )
    function = samplers.make_sampler(config, network, settings, mesh=mesh)
    return Program(function, arguments, mesh, _count(params), images)


def features(config: Config, devices: Sequence[Device], *, condition: Condition) -> Program:
    """FID's feature network on images of the config's resolution, as in `evaluate`."""
    del condition  # The feature network takes none.
    mesh = sharding.make_mesh(data=-1, fsdp=1, devices=devices)
    network, images = inception_weights.abstract_network(), BATCH_PER_DEVICE * mesh.size
    batch = jax.ShapeDtypeStruct((images, *build.image_shape(config)), jnp.uint8)
    arguments = (
        _placed(network.params, sharding.replicated(mesh)),
        _placed(batch, sharding.batch_sharding(mesh)),
    )
    return Program(program(network, mesh), arguments, mesh, _count(network.params), images)


PROGRAMS: dict[str, Callable[..., Program]] = {"train": train, "sample": sample, "features": features}


def _placed(tree: PyTree, over: jax.sharding.Sharding) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=over), tree)


def _count(params: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
