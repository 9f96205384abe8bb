"""Says whether and how fast a config trains on a TPU slice, without a TPU: compiles its train step for it.

    python -m mcm_jax.plan --config=configs/imagenet64.py:small,ct,steps=8 --topology=v5e:8x8

Everything it prints is the compiler's estimate or a model of ours, none of it a measurement; which is which
stands beside each number. Needs Linux on x86-64 and the extra `plan` (libtpu), no TPU and no data.
"""

import json
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from mcm_jax import command_line
from mcm_jax.errors import InputError
from mcm_jax.files import write_asked_for

# Classes of the data sets that a plan may be made for before they are prepared.
NUM_CLASSES = {"imagenet": 1000, "openmoji": 9}
COSTLIEST = 10


def plan(
    raw_config: Any, topology_name: str, *, num_classes: int | None = None
) -> tuple[dict[str, Any], str, str]:
    """Compiles the config's train step for the topology.

    Returns:
      (record, report, text): what --json, the terminal and --hlo show.

    Raises:
      InputError: the config, the topology, or libtpu that is not installed.
    """
    from mcm_jax.planning import compilation, topologies

    topology = topologies.describe(topology_name)
    # Imported after the topology is known to exist, which fails at once.
    import jax
    import jax.numpy as jnp

    from mcm_jax import experiment, trainer, validation
    from mcm_jax.planning import report
    from mcm_jax.training import sharding

    if raw_config.objective != "diffusion" and raw_config.teacher_checkpoint is None:
        raw_config.teacher_checkpoint = "any"  # Its shapes are the student's.
    config = validation.validate(raw_config)
    num_classes = num_classes or NUM_CLASSES.get(config.data.dataset)
    if num_classes is None:
        raise InputError(
            f"config.data.dataset={config.data.dataset}: nothing is known of it here; say --num_classes=N"
        )
    mesh = sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, devices=topology.devices)
    sharding.check_batch(mesh, batch_size=config.training.batch_size)
    parts = trainer.build(config, num_classes=num_classes, mesh=mesh)
    resolution, batch_size = config.data.resolution, config.training.batch_size
    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, resolution, resolution, experiment.CHANNELS), jnp.float32),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }
    teacher = parts.abstract.params if experiment.distils(config) else None
    compiled = compilation.plan(
        parts.train_step(),
        (parts.abstract, teacher, batch),
        topology,
        mesh=mesh,
        package=Path(__file__).parent,
    )
    num_params = sum(leaf.size for leaf in jax.tree.leaves(parts.abstract.params))
    published = report.published_rate(
        num_params=num_params, resolution=resolution, objective=config.objective, num_chips=topology.num_chips
    )
    record = report.record(
        compiled, topology, num_params=num_params, published=published if batch_size == 2048 else None
    )
    text = compiled.text if isinstance(compiled, compilation.Plan) else ""
    return record, report.told(compiled, record, topology, costliest=COSTLIEST), text


def main() -> None:
    """Flags in, one plan out."""
    values = flags.FLAGS
    config = command_line.loaded_config(_CONFIG)
    record, report, text = plan(config, values.topology, num_classes=values.num_classes)
    print(report)
    if values.json is not None:
        write_asked_for(Path(values.json), json.dumps(record, indent=2) + "\n")
    if values.hlo is not None:
        write_asked_for(Path(values.hlo), text)


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file(
        "config", None, "Config file and row, e.g. configs/imagenet64.py:small,ct,steps=8", lock_config=True
    )
    flags.DEFINE_string("topology", "v5e:8x8", "TPU slice: GENERATION:SHAPE.")
    flags.DEFINE_integer(
        "num_classes", None, "Classes of the data; default: known for imagenet.", lower_bound=1
    )
    flags.DEFINE_string("json", None, "Also write the numbers to this file.")
    flags.DEFINE_string("hlo", None, "Also write the compiled program's text to this file.")
    flags.mark_flags_as_required(["config"])
    command_line.run(main)
