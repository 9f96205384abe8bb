"""Golden files of published networks: narrow ones with random weights, in the layout of the published files.

NAME.pkl.xz or NAME.pt.xz is such a file, written by the authors' code. NAME.npz has inputs, and what their
code computes from them with these weights (NCHW, float32). NAME.shapes.xz lists the shapes of all tensors of
the true network.
"""

import dataclasses
import json
import lzma
import zlib
from pathlib import Path

import numpy as np

from mcm_jax.models.preconditioning import Preconditioning
from mcm_jax.system import pth
from mcm_jax.teachers import nvidia, weights
from mcm_jax.teachers.weights import Imported

DIRECTORY = Path(__file__).parent / "golden"
OPENAI: dict[str, tuple[Preconditioning, ...]] = {
    "guided-diffusion-64": ("eps_cosine",),
    "guided-diffusion-128": ("eps_linear",),
    "consistency-models-64": ("edm_1000", "consistency"),
}
NETWORKS = [
    ("edm2-img64", "edm"),
    ("edm-imagenet64-adm", "edm"),
    *((name, kind) for name, kinds in OPENAI.items() for kind in kinds),
]


def file(name: str) -> bytes:
    """The content of the file as published."""
    (path,) = (path for path in DIRECTORY.glob(f"{name}.p*.xz"))
    return lzma.decompress(path.read_bytes())


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of the true network, by name."""
    content = json.loads(lzma.decompress((DIRECTORY / f"{name}.shapes.xz").read_bytes()))
    return {name: tuple(shape) for name, shape in content.items()}


def expected(name: str) -> dict[str, np.ndarray]:
    """Inputs and outputs."""
    with np.load(DIRECTORY / f"{name}.npz") as arrays:
        return dict(arrays)


def imported(name: str, preconditioning: Preconditioning) -> Imported:
    """The converted network. The narrow numbers of heads and groups are not in OpenAI's files."""
    if name == "edm2-img64":
        return weights.edm2(*nvidia.read(file(name), name=name))
    if name == "edm-imagenet64-adm":
        return weights.edm(*nvidia.read(file(name), name=name))
    tensors = pth.read(file(name), name=name)
    settings = dataclasses.replace(
        weights.openai_settings(tensors, preconditioning), groups=4, group_width=1, head_width=8
    )
    return weights.openai(tensors, settings, preconditioning=preconditioning)


def formula(name: str, shape: tuple[int, ...], *, edm2: bool) -> np.ndarray:
    """The tensor of this name in the golden files: NumPy guarantees its legacy generator's stream."""
    random, leaf = np.random.RandomState(zlib.crc32(name.encode())), name.split(".")[-1]
    if leaf == "phases":
        values = 2 * np.pi * random.random_sample(shape)
    else:
        normal = random.standard_normal(shape)
        if leaf == "freqs":
            values = 2 * np.pi * normal
        elif leaf == "out_gain":
            values = 1 + 0.1 * normal
        elif leaf == "emb_gain":
            values = 0.5 * normal
        elif leaf == "resample_filter":
            values = np.full(shape, 0.25)
        elif len(shape) == 1:
            values = 1 + 0.2 * normal if leaf == "weight" else 0.2 * normal
        elif edm2:
            rows = np.exp(0.3 * random.standard_normal(shape[0]))
            values = normal * rows.reshape(-1, *[1] * (len(shape) - 1))
        elif name.endswith(("label_emb.weight", "map_label.weight")):
            values = 0.5 * normal
        else:
            values = normal / np.sqrt(np.prod(shape[1:]))
    single = np.asarray(values, np.float32)
    return single.astype(np.float16).astype(np.float32) if edm2 else single
