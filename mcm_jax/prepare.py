"""Prepares a data set: python -m mcm_jax.prepare --dataset=openmoji --resolution=32

Captioned drawings whose attributes are all known: --dataset=avatars; --num=N draws N instead of 50,000.

Captioned emoji in ten designs: --dataset=emoji --manual_dir=FILE, the .tgz of: npm pack @iconify/json@2.2.535

ImageNet: --dataset=imagenet --resolution=64 --manual_dir=PATH, where PATH holds ILSVRC2012_img_train.tar and
ILSVRC2012_img_val.tar, or TFDS's imagenet2012. imagenet/adm resizes as ADM's references do, and
imagenet/resized reads TFDS's imagenet_resized.

COCO with captions: --dataset=coco --manual_dir=PATH, where PATH is TFDS's directory with coco_captions/2014.

Captions for text to image: avatars, emoji and coco have them; in a folder, put them into captions.jsonl and
give --encoder.

Your own images: --dataset=folder --manual_dir=PATH, with one subfolder per class or none, and captions in
captions.jsonl or in a .txt beside each image, or none. PATH may also contain WebDataset's tar files.

A published network as a teacher: --teacher=FILE --workdir=DIR, with the --dataset that it was trained on.

Weights of FID's feature network, converted once: --inception=FILE.
"""

import dataclasses
import re
import sys
from typing import TYPE_CHECKING

import tensorflow_datasets as tfds
from absl import flags, logging

from mcm_jax.data import avatars, embeddings, emoji, layout
from mcm_jax.data.preparation import MAX_RESOLUTION, plan, prepare, report
from mcm_jax.system import command_line, paths
from mcm_jax.system.errors import InputError

if TYPE_CHECKING:
    from mcm_jax.text import encoders


def define_flags() -> None:
    """Defines the flags; not done on import, because other programs define flags with the same names."""
    flags.DEFINE_string(
        "dataset",
        None,
        f"{', '.join(layout.DRAWN)}; {layout.COCO}; {', '.join(layout.IMAGENETS)}; or folder for a folder of "
        "images.",
    )
    paths.define_path(
        "inception",
        None,
        "Convert Inception's weights from any published format to the file that evaluate reads.",
    )
    flags.register_multi_flags_validator(
        ["dataset", "inception"],
        lambda given: (given["dataset"] is None) != (given["inception"] is None),
        message="give --dataset=NAME for a data set or --inception=FILE for the weights of FID's network, "
        "not both",
    )
    flags.DEFINE_integer("resolution", 32, f"Image height and width in pixels, 1 to {MAX_RESOLUTION}.")
    paths.define_path("data_dir", layout.DEFAULT_DATA_DIR, "Directory of prepared data sets.")
    flags.DEFINE_string(
        "manual_dir",
        None,
        "Source directory. folder: the images, in one subfolder per class or none. imagenet: its two tars, "
        "or TFDS's imagenet2012 (also gs://). imagenet/resized: TFDS's imagenet_resized. coco: "
        "TFDS's directory with coco_captions/2014. emoji: the .tgz of "
        f"the npm package {emoji.PACKAGE}, or the directory of its content.",
    )
    flags.DEFINE_integer(
        "workers",
        None,
        "imagenet, avatars, emoji, coco: number of processes; default: one per core.",
        lower_bound=0,
    )
    flags.DEFINE_integer(
        "num", None, f"avatars: number of training images; default: {avatars.NUM_TRAIN:,}.", lower_bound=1
    )
    flags.DEFINE_string(
        "host",
        "1/1",
        "imagenet: K/N for the K-th of N hosts that share data_dir; the first host waits for the others.",
    )
    flags.DEFINE_string("name", None, "folder: name of the data set; default: the folder's own name.")
    flags.DEFINE_string(
        "encoder",
        None,
        f"Text encoder that embeds the captions: {layout.MINILM}, which is installed, a directory with the "
        "files of a T5, CLIP or BERT, or none. "
        f"Default: {layout.MINILM} for {', '.join(layout.CAPTIONED)}, otherwise none.",
    )
    flags.DEFINE_integer(
        "caption_length",
        None,
        "Maximum tokens per caption; longer ones are truncated. Default: as stored, or 128, or CLIP's 77.",
        lower_bound=4,
    )
    flags.DEFINE_bool(
        "classifier",
        False,
        "avatars: also train the classifier of attributes that evaluate uses; takes minutes.",
    )
    paths.define_path(
        "teacher",
        None,
        "File of a published network to convert to a teacher in --workdir: a .pkl of EDM or EDM2, a .pt of "
        "OpenAI's ADM or consistency models, or a .safetensors of the latter. --dataset names the images "
        "that it was trained on.",
    )
    paths.define_path("workdir", None, "--teacher: directory of the converted teacher.")
    flags.DEFINE_enum(
        "kind",
        None,
        ["openai_edm", "consistency"],
        "--teacher: what a .pt of consistency_models contains; default: by the start of its name (edm_, cd_ "
        "or ct_).",
    )
    flags.DEFINE_bool("overwrite", False, "Prepare again and replace the existing data set.")


def _host(given: str) -> tuple[int, int]:
    """Parses "K/N" into (index from 0, count)."""
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", given)
    number, count = (int(part) for part in found.groups()) if found else (0, 0)
    if not 1 <= number <= count:
        raise InputError(f"--host={given}: must be K/N with K from 1 to N, such as 1/4")
    return number - 1, count


def main() -> None:
    """Prepares the data set, or converts the weights, that the flags specify."""
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()  # It shows no totals; the builders have their own progress bars.
    values = flags.FLAGS
    if values.teacher is not None and (values.inception is not None or values.host != "1/1"):
        raise InputError("--teacher excludes --inception and --host; import it with another command")
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
        num=values.num,
    )
    if values.classifier and values.dataset != avatars.NAME:
        raise InputError(f"--classifier applies only to {avatars.NAME}; remove it")
    if (values.teacher is None) != (values.workdir is None):
        raise InputError("--teacher=FILE and --workdir=DIR belong together; add the other")
    if values.kind is not None and values.teacher is None:
        raise InputError("--kind applies only to --teacher=FILE; remove it")
    teacher = None
    if values.teacher is not None:
        from mcm_jax.teachers import importer  # Slow to import.

        teacher = importer.load(values.teacher, kind=values.kind)  # Before the data, which may take hours.
    for note in chosen.notes:
        print(f"note: {note}", file=sys.stderr)
    encoder = _encoder(values.dataset, values.encoder, values.caption_length)
    info, built = prepare(chosen, data_dir=values.data_dir, overwrite=values.overwrite)
    if info is None:
        print(f"host {values.host} has written its part; host 1 completes the data set once all hosts have")
        return
    if encoder is not None:
        info = _embed(info, encoder, any_length=values.caption_length is None)
    print(report(info, built=built, data_dir=str(values.data_dir)))
    if values.classifier:
        print(_classifier(info, overwrite=values.overwrite))
    if teacher is not None:
        from mcm_jax.teachers import importer

        print(importer.write(teacher, values.workdir, dataset=info, data_dir=values.data_dir))


def _classifier(info: layout.DatasetInfo, *, overwrite: bool) -> str:
    """Trains and writes the classifier of attributes unless it exists; reports its accuracy."""
    from mcm_jax.evaluation import attributes  # Slow to import.

    path = attributes.path_of(info)
    try:
        classifier = None if overwrite else attributes.load(info)
    except InputError:
        classifier = None  # It will be replaced.
    if classifier is None:
        classifier = attributes.train(info)
        attributes.write(classifier, path)
    return f"{attributes.report(classifier)}\nclassifier: {path}"


def _encoder(dataset: str, name: str | None, length: int | None) -> "encoders.Encoder | None":
    """Loads the text encoder that the flags specify, before any long work."""
    name = name or (layout.MINILM if dataset in layout.CAPTIONED else "none")
    if name != "none" and dataset in layout.IMAGENETS:
        raise InputError(f"--encoder={name}: {dataset} has no captions; remove it")
    if name == "none":
        if length is not None:
            raise InputError(f"--caption_length={length} needs --encoder=NAME; remove it")
        return None
    from mcm_jax.text import encoders  # Slow to import.

    return encoders.load(name, length=length)


def _embed(info: layout.DatasetInfo, encoder: "encoders.Encoder", *, any_length: bool) -> layout.DatasetInfo:
    """Embeds the captions of a data set, says so, and adds the encoding to its description."""
    encoding, cut = embeddings.write(info, encoder, any_length=any_length)
    print(
        f"{encoding.num_captions:,} captions embedded by {encoding.encoder}: up to {encoding.length} tokens "
        f"of size {encoding.width}, pooled size {encoding.pooled_width}"
    )
    if cut:
        print(
            f"note: {cut:,} captions have more than {encoding.length} tokens and lose their end; "
            "--caption_length=N takes longer ones",
            file=sys.stderr,
        )
    return dataclasses.replace(info, encoding=encoding)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
