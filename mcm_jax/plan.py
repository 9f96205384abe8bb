"""Estimates memory and speed of a config on a TPU slice by compiling its train step, without a TPU.

    python -m mcm_jax.plan --config=imagenet64:small,ct,steps=8 --topology=v5e:8x8

    python -m mcm_jax.plan --config=... --program=sample      # or features, for FID's network

    python -m mcm_jax.plan --table=DIR    # prints all records that --json wrote into DIR as one table
    python -m mcm_jax.plan --scaling=DIR  # prints them as tables of scaling with the number of chips

All numbers are the compiler's estimates or our models, not measurements; the output states which is which.
Requires Linux on x86-64 and the extra `plan` (libtpu), but no TPU and no data. Compiling a full-size step
takes minutes.
"""

import datetime
import importlib.util
import json

from absl import flags
from ml_collections import ConfigDict, config_flags

from mcm_jax.planning.planner import PROGRAMS, plan, scaling, table
from mcm_jax.records import JsonObject
from mcm_jax.system import command_line, config_files, paths, versions
from mcm_jax.system.files import require_output, write_output


def _provenance(holder: flags.FlagHolder[ConfigDict] | flags.Flag[ConfigDict]) -> JsonObject:
    """The config, overrides, date and software versions of a record."""
    overrides = config_flags.get_override_values(holder)
    return {
        "config": config_flags.get_config_filename(holder),
        "overrides": [f"--config.{name}={value}" for name, value in sorted(overrides.items())],
        "date": datetime.date.today().isoformat(),
        "versions": versions.record(*filter(importlib.util.find_spec, ("flax", "jax", "jaxlib", "libtpu"))),
    }


def define_flags() -> None:
    """Defines the flags; not done on import, because other programs define flags with the same names."""
    flags.DEFINE_string("topology", "v5e:8x8", "TPU slice: GENERATION:SHAPE.")
    flags.DEFINE_enum(
        "program",
        "train",
        PROGRAMS,
        "train: one update. sample: a batch of config.sampling.batch_per_device samples on each chip. "
        "features: FID's network on a batch of images.",
    )
    flags.DEFINE_integer("num_classes", None, "Number of classes. Default: the data set's.", lower_bound=1)
    paths.define_path("json", None, "Also write the numbers to this file.")
    paths.define_path("hlo", None, "Also write the compiled program's text to this file.")
    paths.define_path(
        "table", None, "Print all plans in this directory (files from --json) as a table; compile nothing."
    )
    paths.define_path(
        "scaling", None, "As --table, but show how a config's train step scales with the number of chips."
    )
    config_files.define_flag("imagenet64:small,ct,steps=8")
    flags.register_multi_flags_validator(
        ["config", "table", "scaling"],
        lambda given: sum(value is not None for value in given.values()) == 1,
        message="give --config=NAME:ROW for a plan, or --table=DIR or --scaling=DIR for a table of plans, "
        "but only one of them",
    )


def main() -> None:
    """Prints the plan or table that the flags specify."""
    values = flags.FLAGS
    if values.table is not None:
        print(table(values.table), end="")
        return
    if values.scaling is not None:
        print(scaling(values.scaling), end="")
        return
    for flag, path in (("--json", values.json), ("--hlo", values.hlo)):
        if path is not None:
            require_output(path, flag)
    holder = values["config"]
    provenance = _provenance(holder)
    record, report, text = plan(
        command_line.loaded_config(holder),
        values.topology,
        program=values.program,
        num_classes=values.num_classes,
    )
    print(report)
    if values.json is not None:
        write_output(values.json, json.dumps(provenance | record, indent=2) + "\n")
    if values.hlo is not None:
        write_output(values.hlo, text)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
