"""Says whether and how fast a config trains on a TPU slice, without a TPU: compiles its train step for it.

    python -m mcm_jax.plan --config=imagenet64:small,ct,steps=8 --topology=v5e:8x8

    python -m mcm_jax.plan --config=... --program=sample      # a batch of samples; features: FID's network

    python -m mcm_jax.plan --table=DIR    # the records that --json wrote into a directory, as one table; or
    python -m mcm_jax.plan --scaling=DIR  # as tables of how the step scales with the chips

Everything it prints is the compiler's estimate or a model of ours, none of it a measurement; which is which
stands beside each number. Needs Linux on x86-64 and the extra `plan` (libtpu), no TPU and no data. A step of
full size takes minutes to compile.
"""

import datetime
import importlib.util
import json

from absl import flags
from ml_collections import ConfigDict, config_flags

from mcm_jax.planning.planner import PROGRAMS, plan, scaling, table
from mcm_jax.records import JsonObject
from mcm_jax.system import command_line, config_files, paths, versions
from mcm_jax.system.files import write_output


def _made_of(holder: flags.FlagHolder[ConfigDict] | flags.Flag[ConfigDict]) -> JsonObject:
    """What a record is of: the config, what was changed in it, the day and the versions."""
    overrides = config_flags.get_override_values(holder)
    return {
        "config": config_flags.get_config_filename(holder),
        "overrides": [f"--config.{name}={value}" for name, value in sorted(overrides.items())],
        "date": datetime.date.today().isoformat(),
        "versions": versions.record(*filter(importlib.util.find_spec, ("flax", "jax", "jaxlib", "libtpu"))),
    }


def define_flags() -> None:
    """Called by the program, not on import: other programs have flags of the same names."""
    flags.DEFINE_string("topology", "v5e:8x8", "TPU slice: GENERATION:SHAPE.")
    flags.DEFINE_enum(
        "program",
        "train",
        PROGRAMS,
        "The update; or a batch of samples, config.sampling.batch_per_device on every chip; or a batch of "
        "images through FID's network.",
    )
    flags.DEFINE_integer("num_classes", None, "Classes of the data; default: imagenet's.", lower_bound=1)
    paths.define_path("json", None, "Also write the numbers to this file.")
    paths.define_path("hlo", None, "Also write the compiled program's text to this file.")
    paths.define_path(
        "table", None, "Print the plans of this directory, all its --json files, and compile none."
    )
    paths.define_path(
        "scaling", None, "The same, as tables of how one config's train step scales with the chips."
    )
    config_files.define_flag("imagenet64:small,ct,steps=8")
    flags.register_multi_flags_validator(
        ["config", "table", "scaling"],
        lambda given: sum(value is not None for value in given.values()) == 1,
        message="give --config=NAME:ROW for a plan, or --table=DIR or --scaling=DIR for a table of plans, "
        "one of them",
    )


def main() -> None:
    """Flags in, one plan or table out."""
    values = flags.FLAGS
    if values.table is not None:
        print(table(values.table), end="")
        return
    if values.scaling is not None:
        print(scaling(values.scaling), end="")
        return
    holder = values["config"]
    made = _made_of(holder)
    record, report, text = plan(
        command_line.loaded_config(holder),
        values.topology,
        program=values.program,
        num_classes=values.num_classes,
    )
    print(report)
    if values.json is not None:
        write_output(values.json, json.dumps(made | record, indent=2) + "\n")
    if values.hlo is not None:
        write_output(values.hlo, text)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
