"""Prepares a data set: checks the input, writes the records, describes the result."""

import contextlib
import dataclasses
import errno
import hashlib
import io
import math
import pathlib
import shlex
import tempfile
from collections.abc import Callable, Generator, Sequence

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from mcm_jax.data import (
    avatars,
    coco,
    emoji,
    folder,
    imagenet,
    layout,
    openmoji,
    pipeline,
    shards,
    tar_folder,
)
from mcm_jax.data.layout import DatasetInfo, Records
from mcm_jax.data.local_copy import local_copy, place
from mcm_jax.system import files, paths, pictures
from mcm_jax.system.errors import InputError
from mcm_jax.system.paths import Path

MAX_RESOLUTION = 2048
PREVIEW_FILE = "preview.png"
# Error numbers that point to data_dir rather than to a source image.
_NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
# Data set -> the flags of `prepare` that apply to it.
_FLAGS = {
    "openmoji": (),
    "avatars": ("num", "workers"),
    "emoji": ("manual_dir", "workers"),
    "folder": ("manual_dir", "name"),
    layout.COCO: ("manual_dir", "workers"),
    **dict.fromkeys(layout.IMAGENETS, ("manual_dir", "workers", "host")),
}
# Up to this many classes are listed one by one.
_FEW_CLASSES = 100


@dataclasses.dataclass(frozen=True)
class Plan:
    """Validated input: what to build and how to describe it.

    `source` identifies the source files. `write` writes all records into a directory below the given one and
    returns it, or returns None while other hosts have not written their part; if `resumes`, it continues from
    what it wrote before. `notes` are lines to show the user before the work starts. `reads` is the folder of
    source images, if there is one. `splits` are the splits that it has.
    """

    dataset: str
    resolution: int
    source: str
    preprocessing: str
    write: Callable[[Path], Path | None]
    resumes: bool = False
    notes: tuple[str, ...] = ()
    reads: Path | None = None
    splits: tuple[str, ...] = layout.SPLITS


def plan(
    *,
    dataset: str,
    resolution: int,
    manual_dir: str | None = None,
    name: str | None = None,
    workers: int | None = None,
    host: tuple[int, int] = (0, 1),
    num: int | None = None,
) -> Plan:
    """Checks the input and lists the folder, before any long-running work.

    Args:
      workers: number of processes that prepare ImageNet, avatars, emoji or COCO; None: one per core.
      host: (index of this host, number of hosts) for preparing ImageNet.
      num: number of avatars to train on; None: 50,000.

    Raises:
      InputError: unknown data set, resolution out of range, a missing or empty folder, a bad name, or a flag
        that does not apply to the data set.
    """
    if not 1 <= resolution <= MAX_RESOLUTION:
        raise InputError(f"--resolution={resolution}: it must be from 1 to {MAX_RESOLUTION}")
    if dataset not in _FLAGS:
        raise InputError(
            f"--dataset={dataset}: it must be {', '.join(layout.DRAWN)}, {layout.COCO}, "
            f"{', '.join(layout.IMAGENETS)} or folder (the last ones with --manual_dir=PATH)"
        )
    many = None if host == (0, 1) else host
    _check_flags(
        dataset, {"manual_dir": manual_dir, "name": name, "workers": workers, "host": many, "num": num}
    )
    if dataset == "openmoji":
        return _plan_openmoji(resolution)
    if dataset == "avatars":
        return _plan_avatars(resolution, num=avatars.NUM_TRAIN if num is None else num, workers=workers)
    if dataset == "emoji":
        return _plan_emoji(resolution, manual_dir=manual_dir, workers=workers)
    if dataset == layout.COCO:
        return _plan_coco(resolution, manual_dir=manual_dir, workers=workers)
    if dataset == "folder":
        return _plan_folder(resolution, manual_dir=manual_dir, name=name)
    return _plan_imagenet(dataset, resolution, manual_dir=manual_dir, workers=workers, host=host)


def _check_flags(dataset: str, given: dict[str, object]) -> None:
    """Raises InputError if one of the given flags, which are not None, does not apply to the data set."""
    for flag, value in given.items():
        if value is not None and flag not in _FLAGS[dataset]:
            others = " or ".join(name for name, flags in _FLAGS.items() if flag in flags)
            raise InputError(f"--{flag} applies only to --dataset={others}; remove it")


def _plan_openmoji(resolution: int) -> Plan:
    config = openmoji.OpenMojiConfig(name=layout.config_name("openmoji", resolution), resolution=resolution)
    return Plan(
        dataset="openmoji",
        resolution=resolution,
        source=openmoji.source(),
        preprocessing=openmoji.preprocessing(resolution),
        write=lambda staging: _by_builder(openmoji.OpenMoji(config=config, data_dir=staging), staging),
    )


def _plan_avatars(resolution: int, *, num: int, workers: int | None) -> Plan:
    if num < 1:
        raise InputError(f"--num={num}: it must be at least 1")
    wanted = avatars.shards(num, resolution=resolution)
    features = avatars.features(resolution)
    return Plan(
        dataset="avatars",
        resolution=resolution,
        source=avatars.source(num),
        preprocessing=avatars.preprocessing(resolution),
        write=lambda staging: _by_shards(
            _place(staging, "avatars", resolution, features), wanted, workers=workers, **avatars.INFO
        ),
        resumes=True,
        splits=avatars.SPLITS,
    )


def _plan_emoji(resolution: int, *, manual_dir: str | None, workers: int | None) -> Plan:
    if not manual_dir:
        raise InputError(
            f"--dataset=emoji needs --manual_dir=PATH, the .tgz of: {emoji.COMMAND} (or the directory of its "
            "content)"
        )
    package = emoji.read(paths.checked_path(manual_dir, "--manual_dir"))
    wanted = emoji.shards(package, resolution=resolution)
    features, info = emoji.features(resolution), emoji.info(package)
    return Plan(
        dataset="emoji",
        resolution=resolution,
        source=package.source(),
        preprocessing=emoji.preprocessing(package, resolution),
        write=lambda staging: _by_shards(
            _place(staging, "emoji", resolution, features), wanted, workers=workers, **info
        ),
        resumes=True,
        splits=emoji.SPLITS,
    )


def _plan_coco(resolution: int, *, manual_dir: str | None, workers: int | None) -> Plan:
    if not manual_dir:
        raise InputError(f"--dataset=coco needs --manual_dir=PATH, TFDS's directory with {coco.NAME}")
    source = coco.open_source(str(paths.checked_path(manual_dir, "--manual_dir")))
    wanted, features = coco.shards(source, resolution=resolution), coco.features(resolution)
    return Plan(
        dataset=layout.COCO,
        resolution=resolution,
        source=source.fingerprint,
        preprocessing=coco.preprocessing(resolution),
        write=lambda staging: _by_shards(
            _place(staging, layout.COCO, resolution, features),
            wanted,
            workers=workers,
            description="COCO 2014 with the first caption of each image.",
            homepage="https://cocodataset.org",
            license="Captions: CC BY 4.0; images: by their authors on Flickr.",
        ),
        resumes=True,
    )


def _place(
    staging: Path, dataset: str, resolution: int, features: tfds.features.FeaturesDict
) -> shards.Place:
    directory = layout.dataset_dir(staging, dataset=dataset, resolution=resolution)
    return shards.Place(directory, staging / "notes", dataset.partition("/")[0], features)


def _by_shards(
    place: shards.Place, wanted: Sequence[shards.Shard], *, workers: int | None, **info: str
) -> Path:
    """Writes all shards, then the metadata with the given fields, and returns the directory."""
    shards.write(wanted, place, workers=workers)
    shards.complete(wanted, place, version=layout.VERSION, **info)
    return place.directory


def _plan_folder(resolution: int, *, manual_dir: str | None, name: str | None) -> Plan:
    if not manual_dir:
        raise InputError("--dataset=folder needs --manual_dir=PATH, the folder that holds the images")
    root = paths.checked_path(manual_dir, "--manual_dir")
    name = name or paths.resolved(root).name
    if not layout.FOLDER_NAME.fullmatch(name):
        raise InputError(
            f"--name={name}: a name may contain only letters, digits, _ and -; choose one with --name=NAME"
        )
    dataset = f"folder/{name}"
    if found := tar_folder.find(root):
        return _plan_tars(found, dataset, resolution, root)
    try:
        listing = folder.list_images(root, single_class=name)
        source = f"files {listing.fingerprint()}"
    except OSError as error:
        raise InputError(f"--manual_dir={root}: cannot read {error.filename} ({error.strerror})") from error
    config = folder.FolderConfig(
        name=layout.config_name(dataset, resolution), resolution=resolution, listing=listing
    )
    return Plan(
        dataset=dataset,
        resolution=resolution,
        source=source,
        preprocessing=folder.preprocessing(resolution),
        write=lambda staging: _by_builder(folder.Folder(config=config, data_dir=staging), staging),
        notes=listing.notes,
        reads=root,
    )


def _plan_tars(found: list[Path], dataset: str, resolution: int, root: Path) -> Plan:
    listing, label = tar_folder.list_tars(found), dataset.partition("/")[2]
    wanted = tar_folder.shards(listing, resolution=resolution, label=label)
    features = layout.captioned_features(resolution, class_name=label)
    return Plan(
        dataset=dataset,
        resolution=resolution,
        source=f"tars {listing.fingerprint}",
        preprocessing=folder.preprocessing(resolution),
        write=lambda staging: _by_shards(
            _place(staging, dataset, resolution, features),
            wanted,
            workers=None,
            license="That of the images.",
        ),
        resumes=True,
        notes=listing.notes,
        reads=root,
    )


def _plan_imagenet(
    dataset: str, resolution: int, *, manual_dir: str | None, workers: int | None, host: tuple[int, int]
) -> Plan:
    preparation = imagenet.PREPARATIONS[dataset]
    if not manual_dir:
        files = f"{imagenet.TRAIN_TAR} and {imagenet.TEST_TAR}, or TFDS's imagenet2012"
        if preparation == "resized":
            files = f"TFDS's imagenet_resized/{resolution}x{resolution}"
        raise InputError(f"--dataset={dataset} needs --manual_dir=PATH, the directory that holds {files}")
    resized_to = resolution if preparation == "resized" else None
    source = imagenet.open_source(manual_dir, resized_to=resized_to)
    wanted = imagenet.shards(source, resolution=resolution, preparation=preparation)
    number, hosts = host

    def write(staging: Path) -> Path | None:
        place = _place(staging, dataset, resolution, imagenet.features(resolution))
        shards.write(wanted, place, workers=workers, host=number, hosts=hosts)
        if number > 0:
            return None
        shards.wait(wanted, place)
        shards.complete(wanted, place, version=layout.VERSION)
        return place.directory

    return Plan(
        dataset=dataset,
        resolution=resolution,
        source=source.fingerprint,
        preprocessing=imagenet.preprocessing(resolution, preparation),
        write=write,
        resumes=True,
    )


def prepare(chosen: Plan, *, data_dir: Path, overwrite: bool = False) -> tuple[DatasetInfo | None, bool]:
    """Builds the data set unless it is complete; returns its description and whether it was built.

    Everything is written to a hidden directory, .incomplete-*, which is renamed to the target once complete,
    so an interrupted run changes nothing. A killed run leaves the hidden directory behind; it is never read
    as a data set. If the plan resumes, the same command continues there; otherwise the directory may be
    deleted. The description is None while other hosts have not written their part.

    In a bucket, which can't rename, the complete data set is copied to the target, with its summary last.
    Plans that don't resume are written locally first.

    Raises:
      InputError: data_dir is not writable or lies inside the folder of images; a source image cannot be
        read; or the existing complete data set was made from other files.
    """
    if chosen.reads is not None and paths.resolved(data_dir).is_relative_to(paths.resolved(chosen.reads)):
        raise InputError(
            f"--data_dir={data_dir} lies inside --manual_dir={chosen.reads}, so preview pictures of prepared "
            "data would count as images; choose a directory outside it"
        )
    target = layout.dataset_dir(data_dir, dataset=chosen.dataset, resolution=chosen.resolution)
    if not overwrite and (existing := _existing(target, chosen)):
        return existing, False
    with _staging(data_dir, chosen) as staging:
        with files.writing_to(data_dir, "--data_dir", *_NO_PLACE):
            written = chosen.write(staging)
            if written is None:
                return None, False
            _describe(chosen, written)
            if not overwrite and (
                existing := _existing(target, chosen)
            ):  # Another process made it meanwhile.
                return existing, False
            _publish(written, target, retired=staging / "retired")
    if chosen.resumes:
        files.remove_tree(staging)
    return layout.read_summary(target), True


def _existing(target: Path, chosen: Plan) -> DatasetInfo | None:
    """The complete data set at `target`, if there is one.

    Raises:
      InputError: the data set was made from other files, or its summary is damaged.
    """
    try:
        existing = layout.read_summary(target)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{error}; pass --overwrite to prepare the data set again") from error
    if existing.source != chosen.source:
        raise InputError(
            f"{target} was made from other files ({existing.source}, now {chosen.source}): pass --overwrite "
            "to replace it, or use another --name or --data_dir"
        )
    return existing


@contextlib.contextmanager
def _staging(data_dir: Path, chosen: Plan) -> Generator[Path, None, None]:
    """Yields the directory to write to; it is deleted afterwards unless the plan resumes."""
    prefix = f".incomplete-{chosen.dataset.replace('/', '-')}-"
    with contextlib.ExitStack() as stack:
        with files.writing_to(data_dir, "--data_dir"):
            if chosen.resumes:
                # Only the same command maps to the same directory.
                inputs = f"{chosen.source}\n{chosen.preprocessing}\n{chosen.resolution}"
                staging = data_dir / f"{prefix}{hashlib.sha256(inputs.encode()).hexdigest()[:12]}"
                staging.mkdir(parents=True, exist_ok=True)
            else:
                data_dir = place() if isinstance(data_dir, epath.Path) else data_dir
                data_dir.mkdir(parents=True, exist_ok=True)
                temporary = tempfile.TemporaryDirectory(
                    dir=data_dir, prefix=prefix, ignore_cleanup_errors=True
                )
                staging = pathlib.Path(stack.enter_context(temporary))
        yield staging


def _by_builder(builder: tfds.core.DatasetBuilder, staging: Path) -> Path:
    """Writes the records with a TFDS builder and returns their directory."""
    # TFDS prints misleading lines about downloads and the staging path.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(
            file_format="array_record",
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            download_dir=staging / "downloads",
        )
    return paths.as_path(builder.data_dir)


def _describe(chosen: Plan, directory: Path) -> None:
    """Reads all records back, then writes a preview and, last, the summary."""
    copy = local_copy(directory)
    builder = tfds.builder_from_directory(copy)
    class_names = tuple(layout.class_names_of(builder.info))
    splits = {split: layout.stored_records(builder, split) for split in chosen.splits}
    surveys = {split: _survey(records, num_classes=len(class_names)) for split, records in splits.items()}
    _write_preview(splits["train"], directory / PREVIEW_FILE)
    info = DatasetInfo(
        dataset=chosen.dataset,
        resolution=chosen.resolution,
        class_names=class_names,
        num_examples={split: sum(counts) for split, (counts, _) in surveys.items()},
        class_counts={split: counts for split, (counts, _) in surveys.items()},
        fingerprints={split: fingerprint for split, (_, fingerprint) in surveys.items()},
        preprocessing=chosen.preprocessing,
        source=chosen.source,
        path=directory,
    )
    layout.write_summary(info, directory)
    if copy != directory:
        files.remove_tree(copy)


def _survey(records: Records, *, num_classes: int) -> tuple[tuple[int, ...], str]:
    """Image counts per class, and the SHA-256 of all images and labels (little-endian int32) in order."""
    counts = [0] * num_classes
    digest = hashlib.sha256()
    for example in records:
        counts[int(example["label"])] += 1
        digest.update(np.ascontiguousarray(example["image"]).tobytes())
        digest.update(np.array(example["label"], "<i4").tobytes())
    return tuple(counts), digest.hexdigest()


def _write_preview(records: Records, path: Path) -> None:
    """Saves 64 random images as a square grid, each enlarged by an integer factor to 64 pixels or more."""
    images, _ = pipeline.random_examples(pipeline.RecordSource(records), 64)
    columns, scale = math.ceil(math.sqrt(len(images))), math.ceil(64 / images.shape[1])
    pictures.save_png(pictures.image_grid(images, columns, scale=scale), path)


def _publish(built: Path, target: Path, *, retired: Path) -> None:
    """Replaces `target` with `built`; restores `target` on failure, except in a bucket."""
    if isinstance(target, epath.Path):
        files.publish_tree(built, target, last=layout.SUMMARY_FILE)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if target.exists():
            target.rename(retired)
        built.rename(target)
    except BaseException:
        if retired.exists() and not target.exists():
            retired.rename(target)
        raise


def report(info: DatasetInfo, *, built: bool, data_dir: str) -> str:
    """The program's final output: numbered classes, hashes, paths, and the command to run next."""
    lines = [
        f"{info.dataset} at {info.resolution}x{info.resolution}: "
        + ("prepared" if built else "already complete, reused (pass --overwrite to prepare it again)"),
        f"  {info.preprocessing}",
        *_class_table(info),
        *(f"  {split} sha256 {digest}" for split, digest in info.fingerprints.items()),
        f"  {info.path}",
        f"  {info.path / PREVIEW_FILE}",
        f"next: {_next_command(info, data_dir=data_dir)}",
    ]
    return "\n".join(lines)


def _class_table(info: DatasetInfo) -> list[str]:
    """Lists label, name and image counts of each class; with many classes, only totals and the numbering."""
    few = info.num_classes <= _FEW_CLASSES
    width = max(len(name) for name in (*info.class_names, "class"))
    lines = [f"  label  {'class':{width}}  " + "  ".join(f"{split:>7}" for split in info.num_examples)]
    for label, name in enumerate(info.class_names if few else ()):
        counts = "  ".join(f"{info.class_counts[split][label]:7}" for split in info.num_examples)
        lines.append(f"  {label:5}  {name:{width}}  {counts}")
    lines.append(f"  {'all':{width + 7}}  " + "  ".join(f"{count:7}" for count in info.num_examples.values()))
    if not few:
        first, second, *_, last = info.class_names
        numbered = f"0 is {first}, 1 is {second}, ..., {info.num_classes - 1} is {last}"
        lines.append(f"  {info.num_classes} classes: {numbered}")
    if info.dataset in layout.IMAGENETS:
        lines.append(f"  {_completeness(info)}")
    counts = zip(info.class_names, info.class_counts["train"], strict=True)
    if untrained := [name for name, count in counts if not count]:
        lines.append(
            f"  without training images, so never sampled: {', '.join(untrained[:5])}"
            + (f" and {len(untrained) - 5} more" if len(untrained) > 5 else "")
        )
    return lines


def _completeness(info: DatasetInfo) -> str:
    missing = {split: count - info.num_examples[split] for split, count in imagenet.COUNTS.items()}
    if not any(missing.values()):
        return "all of ILSVRC2012"
    return (
        f"not all of ILSVRC2012, which has {' and '.join(f'{n:,}' for n in imagenet.COUNTS.values())} images"
    )


def _next_command(info: DatasetInfo, *, data_dir: str) -> str:
    builder = info.dataset.partition("/")[0]
    paper = info.resolution in (64, 128)  # The resolutions with ImageNet configs.
    if builder == "imagenet":
        config = f"imagenet{info.resolution}" if paper else "imagenet64"
        command = f"python -m mcm_jax.train --config={config}:small,teacher"
    else:
        config = "text_to_image" if builder == layout.COCO else builder
        command = f"python -m mcm_jax.train --config={config}:teacher"
    if "/" in info.dataset or builder == layout.COCO:
        command += f" --config.data.dataset={info.dataset}"
    if builder != "imagenet" or not paper:
        command += f" --config.data.resolution={info.resolution}"
    if data_dir != layout.DEFAULT_DATA_DIR:
        command += f" --config.data.data_dir={shlex.quote(data_dir)}"
    if info.encoding is not None and (
        builder not in (avatars.NAME, "emoji") or info.encoding.encoder != layout.MINILM
    ):
        # A mirrored image may contradict its caption.
        command += f" --config.data.encoder={info.encoding.encoder} --config.data.horizontal_flip=False"
    return command + " --workdir=runs/teacher"
