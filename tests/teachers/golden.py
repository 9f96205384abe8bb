"""Golden files of published networks: narrow ones with random weights, in the layout of the published files.

NAME.pkl.xz or NAME.pt.xz is such a file, written by the authors' code. NAME.npz has inputs, and what their
code computes from them with these weights (NCHW, float32). NAME.shapes.xz lists the shapes of all tensors of
the true network.
"""

import dataclasses
import json
import lzma
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
