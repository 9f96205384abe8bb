"""DINOv2's features of images, the class token of a vision transformer (Oquab et al., arXiv:2304.07193).

FD-DINOv2 is the Frechet distance over those of ViT-L/14, 1,024 numbers per image (Stein et al.,
arXiv:2306.04675). Images and position embeddings are resized as by EDM2's calculate_metrics.py
(arXiv:2312.02696), which made the published statistics of ImageNet. It runs the network of the repository
facebookresearch/dinov2. Two other programs differ:

- Stein et al. resize with Pillow, which rounds to bytes and clips to 0..255; EDM2 does neither.
- transformers resizes the embeddings on the grid 37/16; the repository's is 37/16.1 (`position_matrix`).
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float32, UInt8

from mcm_jax import records
from mcm_jax.evaluation.features import FeatureNetwork
from mcm_jax.system.errors import InputError
from mcm_jax.system.paths import Path
from mcm_jax.text import files, weights
from mcm_jax.text.configs import Config
from mcm_jax.text.layers import MLP, RNGS, Attention, Block, gelu, layer_norm

RESOLUTION = 224  # height and width of the network's input, whatever the images' own
# ImageNet's mean and standard deviation of red, green and blue in [0, 1].
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Scaled(nnx.Module):
    """gain * layer(x): a layer scale (Touvron et al., arXiv:2103.17239), one factor per channel."""

    def __init__(self, layer: nnx.Module, width: int):
        self.layer = layer
        self.gain = nnx.Param(jnp.ones(width))

    def __call__(self, x: Float32[Array, "B L C"], *bias: Float32[Array, "..."]) -> Float32[Array, "B L C"]:
        """bias: a second argument of the layer, if it takes one."""
        return self.gain[...].astype(jnp.float32) * self.layer(x, *bias)


class DinoV2(nnx.Module):
    """uint8 images of any size -> the class token after the last norm, in full float32."""

    def __init__(self, settings: "DinoV2Settings"):
        width, side = settings.width, settings.patch
        self._grid = settings.grid
        self.patches = nnx.Conv(
            *(3, width, (side, side)),
            strides=(side, side),
            padding="VALID",
            dtype=jnp.float32,
            rngs=RNGS,
        )
        self.class_token = nnx.Param(jnp.zeros((1, 1, width)))
        self.positions = nnx.Param(jnp.zeros((1, 1 + settings.grid**2, width)))
        self.blocks = nnx.List([settings.block() for _ in range(settings.layers)])
        self.norm = layer_norm(width, epsilon=settings.epsilon)

    def __call__(self, images: UInt8[Array, "B H W 3"]) -> Float32[Array, "B C"]:
        # By default a TPU multiplies in bfloat16 and a GPU in TF32, so distances would depend on the machine.
        with jax.default_matmul_precision("highest"):
            patches = self.patches(normalised(images))
            positions = resized(
                self.positions[...].astype(jnp.float32), source=self._grid, target=patches.shape[1]
            )
            patches = rearrange(patches, "b h w c -> b (h w) c")
            first = jnp.broadcast_to(self.class_token[...].astype(jnp.float32), patches[:, :1].shape)
            x = jnp.concatenate([first, patches], axis=1) + positions
            for block in self.blocks:
                x = block(x, jnp.zeros((1, 1, 1, x.shape[1]), jnp.float32))
            return self.norm(x[:, 0])


def normalised(images: UInt8[Array, "B H W 3"]) -> Float32[Array, "B 224 224 3"]:
    """Resizes by a bicubic filter (Keys' with -1/2) that is wider for larger images, and normalises.

    It equals torch's interpolate(mode="bicubic", antialias=True). Resized pixels are neither rounded nor
    clipped.
    """
    size = (len(images), RESOLUTION, RESOLUTION, 3)
    x = jax.image.resize(images.astype(jnp.float32), size, method="cubic", antialias=True)
    return (x / 255 - jnp.array(_MEAN)) / jnp.array(_DEVIATION)


def resized(positions: Float32[Array, "1 N C"], *, source: int, target: int) -> Float32[Array, "1 M C"]:
    """Position embeddings of the class token and source^2 patches -> of it and target^2 patches."""
    if source == target:
        return positions
    matrix = position_matrix(source, target)
    patches = rearrange(positions[0, 1:], "(h w) c -> h w c", h=source)
    patches = jnp.einsum("yh,xw,hwc->yxc", matrix, matrix, patches)
    return jnp.concatenate([positions[:, :1], rearrange(patches, "h w c -> 1 (h w) c")], axis=1)


def position_matrix(source: int, target: int) -> Float32[np.ndarray, "target source"]:
    """Weights of bicubic interpolation (Keys' with -3/4, edges repeated), as in the repository of DINOv2.

    Its grid is `src = (dst + 1/2) source / (target + 0.1) - 1/2`: the 0.1 was to keep a rounding error from
    changing the number of patches, and remains for compatibility. There is no antialiasing. Without the 0.1,
    as in transformers, the last of 16 positions moves by 0.22 of 37.
    """
    centre = (np.arange(target) + 0.5) * source / (target + 0.1) - 0.5
    low = np.floor(centre).astype(int)
    weights = np.zeros((target, source))
    for neighbour in range(-1, 3):
        at = np.clip(low + neighbour, 0, source - 1)
        np.add.at(weights, (np.arange(target), at), _cubic(np.abs(low + neighbour - centre)))
    return weights.astype(np.float32)


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Keys' kernel for distances from 0 to 2."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, far)


@dataclasses.dataclass(frozen=True)
class DinoV2Settings:
    """The sizes of a DINOv2 with a plain MLP, from S to L; see `weights.Settings`."""

    width: int
    hidden: int
    layers: int
    heads: int
    patch: int  # height and width of a patch in pixels
    grid: int  # position embeddings per side
    epsilon: float

    NAMES: ClassVar[Mapping[str, str]] = {
        "class_token": "embeddings.cls_token",
        "positions": "embeddings.position_embeddings",
        "patches": "embeddings.patch_embeddings.projection",
        "blocks.{}.attention_norm": "encoder.layer.{}.norm1",
        "blocks.{}.attention": "encoder.layer.{}.layer_scale1",
        "blocks.{}.attention.layer.q": "encoder.layer.{}.attention.attention.query",
        "blocks.{}.attention.layer.k": "encoder.layer.{}.attention.attention.key",
        "blocks.{}.attention.layer.v": "encoder.layer.{}.attention.attention.value",
        "blocks.{}.attention.layer.out": "encoder.layer.{}.attention.output.dense",
        "blocks.{}.mlp_norm": "encoder.layer.{}.norm2",
        "blocks.{}.mlp": "encoder.layer.{}.layer_scale2",
        "blocks.{}.mlp.layer.wi": "encoder.layer.{}.mlp.fc1",
        "blocks.{}.mlp.layer.wo": "encoder.layer.{}.mlp.fc2",
        "norm": "layernorm",
    }
    CLASS: ClassVar[str] = "Dinov2Model"
    DOWNLOAD: ClassVar[str] = "hf download facebook/dinov2-large config.json model.safetensors"

    @classmethod
    def of(cls, config: Config, where: str) -> "DinoV2Settings":
        """Reads the config.json of a `Dinov2Model`.

        Raises:
          InputError: it is that of another network, or a setting is missing or out of range.
        """
        if config.text("model_type") != "dinov2":
            raise InputError(f"{where}: model_type must be dinov2; {_REMEDY}")
        if config.boolean("use_swiglu_ffn", default=False):
            raise InputError(
                f"{where}: use_swiglu_ffn is true, as in DINOv2 giant, which is not supported; {_REMEDY}"
            )
        config.choice("hidden_act", ("gelu",), default="gelu")
        width, patch = config.size("hidden_size"), config.divisor("patch_size", RESOLUTION)
        resolution = config.size("image_size", at_least=patch)
        return cls(
            width=width,
            hidden=width * config.size("mlp_ratio", default=4),
            layers=config.count("num_hidden_layers"),
            heads=config.divisor("num_attention_heads", width),
            patch=patch,
            grid=resolution // patch,
            epsilon=config.epsilon("layer_norm_eps", default=1e-6),
        )

    @property
    def network(self) -> str:
        """The network's name in records."""
        return records.DINOV2 if self == _LARGE else records.DINOV2_OTHER

    def block(self) -> Block:
        """Builds one of its blocks."""
        width, head_width = self.width, self.width // self.heads
        attention = Attention(width, heads=self.heads, head_width=head_width, scale=head_width**-0.5)
        mlp = MLP(width, self.hidden, gelu)
        norms = (
            layer_norm(width, epsilon=self.epsilon),
            layer_norm(width, epsilon=self.epsilon),
        )
        return Block(Scaled(attention, width), Scaled(mlp, width), norms, norm_first=True)

    def build(self) -> DinoV2:
        return DinoV2(self)


# ViT-L/14, trained on images of 518 pixels, whose distance alone is FD-DINOv2.
_LARGE = DinoV2Settings(width=1024, hidden=4096, layers=24, heads=16, patch=14, grid=37, epsilon=1e-6)
_REMEDY = f"get ViT-L/14: {DinoV2Settings.DOWNLOAD} --local-dir DIRECTORY"


def network(directory: Path | None) -> FeatureNetwork:
    """Loads a DINOv2 from the files of Hugging Face's `transformers`, as a feature network for evaluation.

    Raises:
      InputError: there is no directory, or a file is missing, damaged or of another network.
    """
    if directory is None:
        raise InputError(f"--features=dinov2 needs its weights: add --dinov2=DIRECTORY, or {_REMEDY}")
    source = files.Directory(directory)
    if files.CONFIG not in source.names():
        raise InputError(
            f"--dinov2={directory}: there is no {files.CONFIG} of a DINOv2; get its files: "
            f"{files.get(source, DinoV2Settings.DOWNLOAD)}"
        )
    where = f"{source.where}/{files.CONFIG}"
    settings = DinoV2Settings.of(Config.read(files.read(source, files.CONFIG), where), where)
    graph, params, sha256 = weights.load(source, settings)
    return FeatureNetwork(
        params=params,
        apply=lambda params, images: {"pool": nnx.merge(graph, params)(images)},
        dimensions={"pool": settings.width},
        distance=records.DISTANCES[settings.network],
        description={"network": settings.network, "sha256": sha256},
    )
