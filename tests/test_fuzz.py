"""Every reader of files from outside reads a damaged file or refuses it in one line, within limits.

The files are valid small ones with bytes changed, removed, inserted or moved; JSON with other values; and
pickles, archives and graphs put together from their parts. MCM_FUZZ_INPUTS=10000 tries that many inputs per
reader instead of 300.
"""

import copy
import dataclasses
import functools
import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from mcm_jax import records
from mcm_jax.bench import cells
from mcm_jax.data import folder, imagenet, layout
from mcm_jax.evaluation import compatibility, dinov2, image_files, inception_weights, unfinished
from mcm_jax.planning import planner
from mcm_jax.reporting import page, results
from mcm_jax.runs import workdirs
from mcm_jax.system import pickles, pth
from mcm_jax.teachers import nvidia
from mcm_jax.text import encoders
from tests.bench.test_cells import PROBLEMS, A
from tests.data.test_imagenet import encoded, picture
from tests.evaluation import test_dinov2
from tests.limits import refusal
from tests.planning.test_table import RECORD as PLAN
from tests.reporting import made_up
from tests.runs.test_workdirs import DATASET
from tests.runs.test_workdirs import config as run_config
from tests.system import test_archives, test_pth
from tests.tars import tar
from tests.teachers import test_nvidia
from tests.text import tiny as tiny_text

INPUTS = int(os.environ.get("MCM_FUZZ_INPUTS", "300"))

# Values at which sizes and signs change.
NUMBERS = st.sampled_from([0, 1, 2**7, 2**15 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1])


@st.composite
def damaged(draw, contents: tuple[bytes, ...]) -> bytes:
    """One of the contents, with up to four changes."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, min(len(content), draw(st.sampled_from([40, 400, len(content) + 1])))))
        end = start + draw(st.integers(0, 16))
        match draw(st.integers(0, 5)):
            case 0:
                content[start : start + 1] = bytes([draw(st.integers(0, 255))])
            case 1:
                content[start:end] = draw(st.binary(max_size=16))
            case 2:
                content[start:end] = draw(NUMBERS).to_bytes(8, "little")[
                    : draw(st.sampled_from([1, 2, 4, 8]))
                ]
            case 3:
                del content[start : draw(st.sampled_from([end, len(content)]))]
            case 4:
                content[start:start] = content[start:end] * draw(st.sampled_from([1, 2, 1000]))
            case 5:
                other = draw(st.sampled_from(contents))
                content[start:end] = other[: draw(st.integers(0, len(other)))]
    return bytes(content)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 10**15, 10**19, 1e308, -1e-308, "", "a\nb", "\0", "\ud800", "<b>", [], {}, [[]]]),
    st.integers(-(10**20) + 1, 10**20 - 1),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@st.composite
def odd_json(draw, value) -> bytes:
    """The JSON of `value`, in which up to three places have other values or are missing."""
    value = json.loads(json.dumps(value, default=str))
    for _ in range(draw(st.integers(1, 3))):
        place = value
        while isinstance(place, dict | list) and place:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            key = draw(st.sampled_from(keys))
            if not isinstance(place[key], dict | list) or not place[key] or draw(st.integers(0, 2)) == 0:
                if draw(st.integers(0, 4)) == 0:
                    del place[key]
                else:
                    # A later place may lie in this value, which hypothesis draws again.
                    place[key] = copy.deepcopy(draw(ODD))
                break
            place = place[key]
    return json.dumps(value).encode("utf-8", "surrogatepass")


def json_of(value):
    return st.one_of(odd_json(value), damaged((json.dumps(value, default=str).encode(),)))


def saved(save, **arrays) -> bytes:
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


IMAGES = np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3)
MOMENTS = {"mu": np.arange(3.0), "sigma": np.eye(3)}
NPZ = tuple(
    saved(save, arr_0=IMAGES, arr_1=np.arange(2), **MOMENTS) for save in (np.savez, np.savez_compressed)
)


@st.composite
def npz_of_parts(draw) -> bytes:
    """Members with headers that declare any shape and type, and with any number of bytes."""
    members = {}
    for name in draw(st.lists(st.sampled_from(["arr_0", "arr_1", "mu", "sigma"]), min_size=1, unique=True)):
        shape = tuple(draw(st.lists(st.one_of(st.integers(-1, 4), NUMBERS), max_size=5)))
        kind = draw(
            st.sampled_from(["|u1", "<f8", "<i8", "|O", "<U0", "|V3", "<c16", "<U1000000", ">f4", "|S9"])
        )
        header = test_archives.header(str(shape), repr(kind))
        data = bytes(draw(st.integers(0, 200)))
        members[f"{name}.npy"] = test_archives.npy(header, data, draw(st.sampled_from([1, 1, 1, 2, 3])))
    return test_archives.zipped(members, draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])))


PICKLES = tuple(
    pickle.dumps({**MOMENTS, "fid": {"mu": np.float32(1.5), "n": [1, "text", b"bytes", None]}}, protocol)
    for protocol in range(6)
)
# Instructions and arguments of pickles; in any order, most fail, some do not.
FRAGMENTS = [
    *(bytes([code]) for code in b"().0122NNR]}abdelopqrstu\x81\x85\x86\x87\x88\x8f\x90\x91\x92\x93\x94"),
    *(b"q\x00", b"h\x00", b"h\x00h\x00\x86", b"K\x01", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\x7f" * 8),
    *(b"X\x03\x00\x00\x00mu\x00", b"U\x02f8", b"U\x02V8", b"C\x08" + bytes(8), b"K\x00K\x01\x87"),
    *(b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"c_codecs\nencode\n", b"c__builtin__\nbytes\n"),
    *(f"cnumpy.core.multiarray\n{name}\n".encode() for name in ("_reconstruct", "scalar", "system")),
    *(b"cnumpy._core.numeric\n_frombuffer\n", b"ccollections\nOrderedDict\n", b"ctorch\nFloatStorage\n"),
    *(
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"U\x07storage",
        b"Q",
        b"cposix\nsystem\n",
        b"r\xff\xff\xff\x7f",
    ),
]


@st.composite
def pickle_of_parts(draw) -> bytes:
    parts = draw(st.lists(st.sampled_from(FRAGMENTS), max_size=30))
    return b"\x80\x02" + b"".join(part * draw(st.sampled_from([1, 1, 1, 30])) for part in parts) + b"."


def pths() -> tuple[bytes, ...]:
    storage = test_pth._Storage("7", 12)
    state = OrderedDict(
        w=test_pth.tensor(storage, 0, (3, 4), (4, 1)), v=test_pth.tensor(storage, 1, (4, 2), (1, 4))
    )
    return tuple(make(state, {"7": test_pth.NUMBERS}) for make in (test_pth.legacy_file, test_pth.archive))


@st.composite
def pth_of_parts(draw) -> bytes:
    content = draw(pickle_of_parts())
    if draw(st.booleans()):
        return test_archives.zipped({"a/data.pkl": content, "a/data/7": bytes(48)})
    head = test_pth.legacy_file({}, {})
    return head[: head.index(b"}", 40)] + content


SHAPES = {
    "fc.bias": (3,),
    "fc.kernel": (2, 3),
    "conv2d_1a_3x3.bias": (2,),
    "conv2d_1a_3x3.kernel": (1, 1, 3, 2),
}


def inceptions() -> tuple[bytes, ...]:
    """A network of two layers, SHAPES, in each format."""
    from tests.evaluation.test_inception_weights import as_graph, as_pickle, as_pth

    norm = {name: np.ones(2, np.float32) for name in ("scale", "bias", "mean", "variance")}
    layers = {
        "fc": {"kernel": np.ones((2, 3), np.float32), "bias": np.ones(3, np.float32)},
        "conv2d_1a_3x3": {"kernel": np.ones((1, 1, 3, 2), np.float32), **norm},
    }
    made = [as_graph(layers), as_pickle(layers), as_pth(layers, test_pth.archive)]
    return (*made, as_pth(layers, test_pth.legacy_file))


@functools.cache
def safetensors() -> tuple[bytes, ...]:
    import safetensors.numpy

    params = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception_weights, "_shapes", lambda: SHAPES)
        weights = inception_weights._checked(Path("x"), params)
    metadata = {"format": inception_weights._FORMAT, "sha256": weights.sha256}
    return (safetensors.numpy.save(params, metadata),)


@st.composite
def safetensors_of_parts(draw) -> bytes:
    (content,) = safetensors()
    size = int.from_bytes(content[:8], "little")
    header = draw(odd_json(json.loads(content[8 : 8 + size])))
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


@st.composite
def graph_of_parts(draw) -> bytes:
    from tests.evaluation import test_frozen_graph

    tensors = {}
    for name in ("softmax/weights", "softmax/biases"):
        shape = draw(st.lists(st.one_of(st.integers(-1, 4), NUMBERS.filter(lambda n: n < 2**63)), max_size=5))
        tensor = test_frozen_graph.proto(shape, [1.0] * draw(st.integers(0, 7)), draw(st.integers(0, 3)))
        tensor.tensor_content = bytes(draw(st.integers(0, 30)))
        tensors[name] = tensor
    return test_frozen_graph.graph(tensors)


FORMATS = ("jpeg", "png", "webp", "avif", "gif", "bmp", "jpeg2000", "pcx", "ppm", "qoi", "sgi", "tga", "tiff")


def pictures() -> tuple[bytes, ...]:
    return tuple(encoded(picture(0, (6, 5)), name) for name in FORMATS)


INNER = {"n01440764_1.JPEG": encoded(picture(1, (6, 5))), "n01440764_2.JPEG": encoded(picture(2, (6, 5)))}
TAR = tar({"n01440764.tar": tar(INNER), "n01443537.tar": tar({})})
TEST_TAR = tar({"ILSVRC2012_val_00000001.JPEG": INNER["n01440764_1.JPEG"]})
RUN = {"config": dataclasses.asdict(run_config()), "dataset": dataclasses.asdict(DATASET), "teacher": None}

EXPORTED = {
    "library_name": "mcm_jax",
    "version": "1",
    "checkpoint_step": 4,
    "parameters": "ema",
    "checksum": 1,
}


def read_pickle(path):
    pickles.read(path.read_bytes(), name="x")


def read_pth(path):
    pth.read(path.read_bytes(), name="x")


def read_reference(path):
    compatibility.reference_images(path)


def read_images(path):
    for _ in image_files.open_images(path).blocks(1):
        pass


def read_cache(path):
    unfinished.Unfinished(path).read(lambda arrays: arrays["mu"] + 1)


def read_inception(path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception_weights, "_shapes", lambda: SHAPES)
        inception_weights.load(path)


def read_tar(path):
    path.rename(path.parent / imagenet.TRAIN_TAR)
    (path.parent / imagenet.TEST_TAR).write_bytes(TEST_TAR)
    source = imagenet.open_source(str(path.parent))
    for unit in source.units():
        for image in source.read(unit):
            imagenet.load(image, resolution=4, preparation="area")


def read_picture(path):
    folder.load_image(path, resolution=4)


def read_pictures(path):
    read_images(path.parent)


def read_run(path):
    path.rename(path.parent / records.RUN_FILE)
    workdirs.read(path.parent)


def read_exported(path):
    path.rename(path.parent / records.EXPORTED_FILE)
    workdirs.read(path.parent)


def read_results(path):
    run = path.parent / "run"
    (run / "evaluation").mkdir(parents=True, exist_ok=True)
    path.rename(run / records.RESULTS)
    content = page.prepare(results.collect(path.parent))
    assert "<script" not in page.markdown(content)


def read_report(path):
    run = path.parent / "run"
    made_up.write(run, made_up.record(), picture=False)
    path.rename(run / records.RUN_FILE)
    page.markdown(page.prepare(results.collect(path.parent)))


def read_summary(path):
    directory = layout.dataset_dir(path.parent, dataset="openmoji", resolution=8)
    directory.mkdir(parents=True, exist_ok=True)
    path.rename(directory / layout.SUMMARY_FILE)
    layout.describe(data_dir=path.parent, dataset="openmoji", resolution=8)


def read_plan(path):
    path.rename(path.parent / "plan.json")
    planner.table(path.parent)
    planner.scaling(path.parent)


def read_cells(path):
    cells.Store(path, PROBLEMS)


CELL = {"cell": A.to_json(), "problem": dataclasses.asdict(PROBLEMS["mixture"]), "values": {"distance": 1.0}}
SUMMARY = {name: value for name, value in dataclasses.asdict(DATASET).items() if name != "path"}


def encoder_files(name):
    """The file `name` of tiny text encoders."""
    configs = tiny_text.CONFIGS.values()
    return tuple(tiny_text.files(config)[name] for config in configs if name in tiny_text.files(config))


def read_encoder(name, config=tiny_text.BERT):
    """Reads a text encoder with an input in place of the file `name`."""

    def read(path):
        directory = tiny_text.write(path.parent / "encoder", config, {name: path.read_bytes()})
        encoders.load(directory, length=8).tokenize(["", "a b c d e f g h i", "猫 [SEP]"])

    return read


@st.composite
def encoder_weights_of_parts(draw) -> bytes:
    content = tiny_text.files(tiny_text.BERT)["model.safetensors"]
    size = int.from_bytes(content[:8], "little")
    header = draw(odd_json(json.loads(content[8 : 8 + size])))
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def read_encoder_index(path):
    directory = tiny_text.write(path.parent / "encoder", tiny_text.BERT)
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    path.rename(directory / "model.safetensors.index.json")
    encoders.load(directory)


def read_dinov2(path):
    directory = test_dinov2.write(path.parent / "dinov2")
    path.rename(directory / "config.json")
    dinov2.network(directory)


ENCODER_INDEX = {"weight_map": dict.fromkeys(tiny_text.tensors(tiny_text.BERT), "a.safetensors")}

# Reader -> (makes the strategy of its inputs, reads the file of an input).
READERS = {
    "pickle": (
        lambda: damaged(PICKLES) | pickle_of_parts(),
        lambda p: pickles.read(p.read_bytes(), name="x"),
    ),
    "pth": (lambda: damaged(pths()) | pth_of_parts(), read_pth),
    "nvidia": (
        lambda: damaged((test_nvidia.network(),)) | pickle_of_parts(),
        lambda p: nvidia.read(p.read_bytes(), name="x"),
    ),
    "reference": (lambda: damaged(NPZ + PICKLES) | npz_of_parts(), read_reference),
    "images in an npz": (lambda: damaged(NPZ) | npz_of_parts(), read_images),
    "cache": (lambda: damaged(NPZ) | npz_of_parts(), read_cache),
    "inception": (lambda: damaged(inceptions()) | graph_of_parts(), read_inception),
    "safetensors": (lambda: damaged(safetensors()) | safetensors_of_parts(), read_inception),
    "tar": (lambda: damaged((TAR,)), read_tar),
    "picture": (lambda: damaged(pictures()), read_picture),
    "folder of pictures": (lambda: damaged(pictures()), read_pictures),
    "run.json": (lambda: json_of(RUN), read_run),
    "config.json": (lambda: json_of({**RUN, **EXPORTED}), read_exported),
    "run.json in a report": (lambda: json_of({"config": made_up.CONFIG, "dataset": SUMMARY}), read_report),
    "results.jsonl": (lambda: json_of(made_up.record()), read_results),
    "summary.json": (lambda: json_of(SUMMARY), read_summary),
    "plan": (lambda: json_of(PLAN), read_plan),
    "encoder's config": (lambda: json_of(tiny_text.BERT), read_encoder("config.json")),
    "encoder's weights": (
        lambda: damaged(encoder_files("model.safetensors")) | encoder_weights_of_parts(),
        read_encoder("model.safetensors"),
    ),
    "encoder's index": (lambda: json_of(ENCODER_INDEX), read_encoder_index),
    "DINOv2's config": (lambda: json_of(test_dinov2.TINY), read_dinov2),
    "tokenizer.json": (
        lambda: (
            damaged(encoder_files("tokenizer.json"))
            | odd_json(json.loads(tiny_text.word_tokenizer("[CLS]", "[SEP]")))
        ),
        read_encoder("tokenizer.json"),
    ),
    "spiece.model": (
        lambda: damaged((tiny_text.spiece(),)),
        read_encoder("spiece.model", tiny_text.T5),
    ),
    "cells": (lambda: json_of({**CELL, "seconds": 1.0}), read_cells),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_is_read_or_refused_in_one_line(reader, tmp_path):
    make_inputs, read = READERS[reader]
    count, refused = 0, 0

    @hypothesis.settings(max_examples=INPUTS)
    @hypothesis.given(make_inputs())
    def check(content):
        nonlocal count, refused
        count += 1
        directory = tmp_path / str(count)
        directory.mkdir()
        path = directory / "file.png"
        path.write_bytes(content)
        refused += refusal(lambda: read(path)) is not None

    check()
    print(f"{reader}: {count} inputs, {refused} refused")
    assert reader == "cache" or 0 < refused < count
