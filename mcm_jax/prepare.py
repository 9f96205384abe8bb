"""Prepares a data set: python -m mcm_jax.prepare --dataset=openmoji --resolution=32

For ImageNet: --dataset=imagenet --resolution=64 --manual_dir=PATH, which holds ILSVRC2012_img_train.tar and
ILSVRC2012_img_val.tar, or TFDS's imagenet2012; imagenet/adm prepares it as ADM's references were, and
imagenet/resized takes TFDS's imagenet_resized.

For your own images: --dataset=folder --manual_dir=PATH, with one subfolder per class or none.

For FID, once, the weights of its feature network: --inception=FILE.
"""

import re
import sys

import tensorflow_datasets as tfds
from absl import flags, logging

from mcm_jax.data import layout
from mcm_jax.data.preparation import MAX_RESOLUTION, plan, prepare, report
from mcm_jax.system import command_line, paths
from mcm_jax.system.errors import InputError


def define_flags() -> None:
    """Called by the program, not on import: other programs have flags of the same names."""
    flags.DEFINE_string(
        "dataset", None, f"openmoji; {', '.join(layout.IMAGENETS)}; or folder for a folder of images."
    )
    paths.define_path(
        "inception",
        None,
        "Convert Inception's weights, in any form they are passed around in, to what evaluate reads.",
    )
    flags.register_multi_flags_validator(
        ["dataset", "inception"],
        lambda given: (given["dataset"] is None) != (given["inception"] is None),
        message="give --dataset=NAME for a data set or --inception=FILE for the weights of FID's network, "
        "one of them",
    )
    flags.DEFINE_integer("resolution", 32, f"Side of the images in pixels, 1 to {MAX_RESOLUTION}.")
    paths.define_path("data_dir", layout.DEFAULT_DATA_DIR, "Where prepared data sets go.")
    flags.DEFINE_string(
        "manual_dir",
        None,
        "folder: where the images are, one subfolder a class or none. imagenet: where its tars are, or "
        "TFDS's imagenet2012 (also gs://). imagenet/resized: TFDS's directory with imagenet_resized.",
    )
    flags.DEFINE_integer("workers", None, "imagenet: processes; default: one a core.", lower_bound=0)
    flags.DEFINE_string(
        "host",
        "1/1",
        "imagenet: K/N on the K-th of N hosts that share data_dir; the first waits for the others.",
    )
    flags.DEFINE_string("name", None, "folder: what to call the data set; default: the folder's own name.")
    flags.DEFINE_bool("overwrite", False, "Prepare again and replace what is there.")


def _host(given: str) -> tuple[int, int]:
    """(index from 0, count) of "K/N"."""
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", given)
    number, count = (int(part) for part in found.groups()) if found else (0, 0)
    if not 1 <= number <= count:
        raise InputError(f"--host={given}: it must be K/N with K from 1 to N, such as 1/4")
    return number - 1, count


def main() -> None:
    """Flags in, one call out."""
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()  # It knows no totals; the builders show their own.
    values = flags.FLAGS
    if values.inception is not None:
        from mcm_jax.evaluation import inception_weights  # Slow to import.

        target = values.data_dir / inception_weights.FILE
        print(inception_weights.convert(values.inception, target))
        return
    chosen = plan(
        dataset=values.dataset,
        resolution=values.resolution,
        manual_dir=values.manual_dir,
        name=values.name,
        workers=values.workers,
        host=_host(values.host),
    )
    for note in chosen.notes:
        print(f"note: {note}", file=sys.stderr)
    info, built = prepare(chosen, data_dir=values.data_dir, overwrite=values.overwrite)
    if info is None:
        print(f"host {values.host} has written its part; host 1 completes the data set when all have")
        return
    print(report(info, built=built, data_dir=str(values.data_dir)))


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
