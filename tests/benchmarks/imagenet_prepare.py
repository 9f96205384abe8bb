"""Preparing ImageNet from its tar files, against plain TFDS + tf.data on the same tars.

    python -m tests.benchmarks.imagenet_prepare

Both end in a data set of uint8 images at their final size. TFDS's own builder first writes its imagenet2012
from the tars, then tf.data decodes, crops and resizes, and a builder as TFDS's guide has it writes the small
ones; what tf.data takes when its images are dropped is given too. Each has a process of its own, on --cores
cores, and takes turns with the other; imports and TensorFlow's start are not counted. The pictures are made
up: 500x375, with the spectrum of photographs, about 120 kB each, a bit more than ImageNet's are on average.
Prints a table and, last, one line of JSON; a ratio above 1 means that ours is faster.
"""

import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from PIL import Image

from mcm_jax.data import imagenet
from tests.tars import tar

# Photographs that are made, each of which stands for several.
_DISTINCT = 200

_RESOLUTION = flags.DEFINE_integer("resolution", 64, "Side of the prepared images.", lower_bound=1)
_IMAGES = flags.DEFINE_integer("images", 3000, "Training images, in 8 classes; a tenth as many to test.")
_CORES = flags.DEFINE_integer("cores", 1, "That each may use.", lower_bound=1)
_TURNS = flags.DEFINE_integer("turns", 5, "How often each is timed.", lower_bound=1)
_WORK = flags.DEFINE_enum("work", None, ["ours", "tfds"], "Do it once, in --manual_dir, and print seconds.")
_MANUAL_DIR = flags.DEFINE_string("manual_dir", None, "Where the tars are.")


def main(_: list[str]) -> None:
    """The parent, or with --work one turn."""
    if _WORK.value is not None:
        print(json.dumps(_timed_work()))
        return
    with tempfile.TemporaryDirectory() as directory:
        size = _make_tars(Path(directory))
        print(f"{_total()} images of {size / 1e3:.0f} kB each")
        turns: dict[str, list[dict[str, float]]] = {"ours": [], "tfds": []}
        for turn in range(_TURNS.value):
            for name in turns if turn % 2 else reversed(turns):
                turns[name].append(_turn(name, directory))
    _report(turns)


def _report(turns: dict[str, list[dict[str, float]]]) -> None:
    compared = {
        "TFDS + tf.data, written": ("imagenet2012", "resized, written"),
        "TFDS + tf.data, dropped": ("imagenet2012", "resized, dropped"),
    }
    ratios = {
        name: [
            sum(theirs[part] for part in parts) / ours["prepare"]
            for ours, theirs in zip(*turns.values(), strict=True)
        ]
        for name, parts in compared.items()
    }
    rates = {}
    for name, parts in turns.items():
        for part in parts[0]:
            rates[f"{name}: {part}"] = _total() / statistics.median(one[part] for one in parts)
            print(f"{name + ': ' + part:<26}{rates[f'{name}: {part}']:>6.0f} images a second")
    for name, values in ratios.items():
        spread = f"({min(values):.2f}, {max(values):.2f})"
        print(f"seconds of {name} / ours: {statistics.median(values):.2f} {spread}")
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    settings = {"resolution": _RESOLUTION.value, "images": _total(), "cores": _CORES.value}
    print(json.dumps({**settings, "images_per_second": rates, "ratio": medians, "seconds": turns}))


def _total() -> int:
    return _IMAGES.value + _IMAGES.value // 10


def _turn(name: str, manual_dir: str) -> dict[str, float]:
    arguments = [f"--work={name}", f"--manual_dir={manual_dir}"]
    arguments += [f"--{flag.name}={flag.value}" for flag in (_RESOLUTION, _IMAGES, _CORES)]
    command = [sys.executable, "-m", "tests.benchmarks.imagenet_prepare", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _timed_work() -> dict[str, float]:
    """Seconds of each part."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: _CORES.value])
    with tempfile.TemporaryDirectory() as data_dir, contextlib.redirect_stdout(sys.stderr):
        return {"ours": _ours, "tfds": _tfds}[_WORK.value](data_dir)


def _ours(data_dir: str) -> dict[str, float]:
    from mcm_jax.data import preparation
    from mcm_jax.system import host

    host.tune()  # As the program does.
    begin = time.perf_counter()
    chosen = preparation.plan(
        dataset="imagenet",
        resolution=_RESOLUTION.value,
        manual_dir=_MANUAL_DIR.value,
        workers=0 if _CORES.value == 1 else _CORES.value,
    )
    info, _ = preparation.prepare(chosen, data_dir=Path(data_dir))
    seconds = time.perf_counter() - begin
    assert sum(info.num_examples.values()) == _total()
    return {"prepare": seconds}


def _tfds(data_dir: str) -> dict[str, float]:
    import tensorflow as tf
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    tf.constant(0)  # Starts what TensorFlow starts once.
    times = [time.perf_counter()]
    source = tfds.builder("imagenet2012", data_dir=data_dir, try_gcs=False)
    source.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=_MANUAL_DIR.value, try_download_gcs=False)
    )
    times.append(time.perf_counter())
    next(_resized(source, "train"))  # So does this; it counts with neither.
    times.append(time.perf_counter())
    count = sum(1 for split in ("train", "validation") for _ in _resized(source, split))
    times.append(time.perf_counter())
    builder = _small_builder(source)(data_dir=data_dir)
    builder.download_and_prepare(file_format="array_record")
    times.append(time.perf_counter())
    assert count == sum(split.num_examples for split in builder.info.splits.values()) == _total()
    parts = ("imagenet2012", "start", "resized, dropped", "resized, written")
    return dict(zip(parts, np.diff(times).tolist(), strict=True))


def _resized(source: Any, split: str) -> Iterator[dict[str, Any]]:
    """Its images by tf.data, one by one."""
    import tensorflow as tf

    def prepared(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        image = example["image"]
        height, width = tf.shape(image)[0], tf.shape(image)[1]
        side = tf.minimum(height, width)
        image = tf.image.crop_to_bounding_box(image, (height - side) // 2, (width - side) // 2, side, side)
        image = tf.image.resize(image, [_RESOLUTION.value] * 2, tf.image.ResizeMethod.AREA)
        return {**example, "image": tf.cast(tf.round(image), tf.uint8)}

    images = source.as_dataset(split=split).map(prepared, num_parallel_calls=tf.data.AUTOTUNE)
    return images.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()


def _small_builder(source: Any) -> Any:
    import tensorflow_datasets as tfds

    class Small(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = None  # No files of metadata beside this one.

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(builder=self, features=imagenet.features(_RESOLUTION.value))

        def _split_generators(self, _: Any) -> Any:
            return {split: self._generate_examples(split) for split in ("train", "validation")}

        def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
            for example in _resized(source, split):
                name = example["file_name"].decode()
                yield name, {"image": example["image"], "label": example["label"], "file": name}

    return Small


def _make_tars(directory: Path) -> float:
    """Of ILSVRC2012's layout; returns the mean size of an image file."""
    draw = np.random.default_rng(0)
    distinct = [_photograph(draw) for _ in range(min(_DISTINCT, _total()))]
    names, files = imagenet.class_names()[:8], [distinct[n % _DISTINCT] for n in range(_total())]
    classes = {
        f"{name}.tar": tar({f"{name}_{n}.JPEG": files[n] for n in range(label, _IMAGES.value, len(names))})
        for label, name in enumerate(names)
    }
    test = {f"ILSVRC2012_val_{n + 1:08d}.JPEG": file for n, file in enumerate(files[_IMAGES.value :])}
    (directory / imagenet.TRAIN_TAR).write_bytes(tar(classes))
    (directory / imagenet.TEST_TAR).write_bytes(tar(test))
    return statistics.mean(len(file) for file in files)


def _photograph(draw: np.random.Generator, *, height: int = 375, width: int = 500) -> bytes:
    """A JPEG of noise whose amplitude falls as one over the frequency."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    amplitude = 1 / np.maximum(frequency, 1 / width)
    noise = np.fft.fft2(draw.normal(size=(3, height, width))) * amplitude
    pixels = np.fft.ifft2(noise).real.transpose(1, 2, 0)
    pixels = 128 + 50 * (pixels - pixels.mean()) / pixels.std()
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


if __name__ == "__main__":
    app.run(main)
