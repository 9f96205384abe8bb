"""CLIP's image encoder (Radford et al., arXiv:2103.00020), a vision transformer (arXiv:2010.11929).

Its projection lies in the same space as that of CLIP's text encoder (`mcm_jax.text.clip`).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float32, PyTree, UInt8

from mcm_jax.system.errors import InputError
from mcm_jax.system.paths import Path
from mcm_jax.text import files, layers, weights
from mcm_jax.text.clip import ACTIVATIONS, ClipSettings, TransformerSettings
from mcm_jax.text.configs import Config

# Mean and standard deviation of the training images' red, green and blue in [0, 1], published by OpenAI.
_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_BATCH = 32


class ClipImages(nnx.Module):
    """Normalised pixels -> the projection of the state of a learned token that is put before the patches.

    The projection is not normalised.
    """

    def __init__(self, settings: "ClipImagesSettings"):
        width, side = settings.width, settings.patch
        self.patches = nnx.Conv(
            *(3, width, (side, side)),
            strides=(side, side),
            padding="VALID",
            use_bias=False,
            dtype=jnp.float32,
            rngs=layers.RNGS,
        )
        self.class_embedding = nnx.Param(jnp.zeros(width))
        self.positions = layers.embedding((settings.resolution // side) ** 2 + 1, width)
        self.norm_before = layers.layer_norm(width, epsilon=settings.epsilon)
        self.blocks = nnx.List([settings.block() for _ in range(settings.layers)])
        self.norm_after = layers.layer_norm(width, epsilon=settings.epsilon)
        self.projection = layers.linear(width, settings.projection_width, use_bias=False)

    def __call__(self, pixels: Float32[Array, "B s s 3"]) -> Float32[Array, "B P"]:
        patches = rearrange(self.patches(pixels), "b h w c -> b (h w) c")
        first = jnp.broadcast_to(self.class_embedding[...].astype(jnp.float32), patches[:, :1].shape)
        x = jnp.concatenate([first, patches], axis=1)
        x = self.norm_before(x + self.positions(jnp.arange(x.shape[1])))
        for block in self.blocks:
            x = block(x, jnp.zeros((1, 1, 1, x.shape[1]), jnp.float32))
        return self.projection(self.norm_after(x[:, 0]))


@dataclasses.dataclass(frozen=True)
class ClipImagesSettings(TransformerSettings):
    """The sizes of a CLIP's image encoder; see `weights.Settings`."""

    resolution: int  # height and width of its images in pixels
    patch: int
    projection_width: int

    NAMES: ClassVar[Mapping[str, str]] = {
        "patches": "vision_model.embeddings.patch_embedding",
        "class_embedding": "vision_model.embeddings.class_embedding",
        "positions": "vision_model.embeddings.position_embedding",
        "norm_before": "vision_model.pre_layrnorm",
        **{
            layer: name.replace("text_model", "vision_model")
            for layer, name in ClipSettings.NAMES.items()
            if layer.startswith("blocks")
        },
        "norm_after": "vision_model.post_layernorm",
        "projection": "visual_projection",
    }
    CLASS: ClassVar[str] = ClipSettings.CLASS
    DOWNLOAD: ClassVar[str] = ClipSettings.DOWNLOAD

    @classmethod
    def of(cls, config: Config, where: str) -> "ClipImagesSettings":
        """Reads the config.json of a whole CLIP.

        Raises:
          InputError: it is not that of a CLIP with an image encoder, or a setting is out of range.
        """
        if config.text("model_type") != "clip":
            raise InputError(f"{where}: model_type must be clip, for an encoder of texts and images")
        vision = config.section("vision_config")
        # transformers leaves out what has its default, which is that of ViT-B/32.
        width = vision.size("hidden_size", default=768)
        resolution = vision.size("image_size", default=224)
        return cls(
            resolution=resolution,
            patch=vision.divisor("patch_size", resolution, default=32),
            width=width,
            hidden=vision.size("intermediate_size", default=3072),
            layers=vision.count("num_hidden_layers", default=12),
            heads=vision.divisor("num_attention_heads", width, default=12),
            projection_width=config.size("projection_dim", default=512),
            activation=vision.choice("hidden_act", tuple(ACTIVATIONS), default="quick_gelu"),
            epsilon=vision.epsilon("layer_norm_eps", default=1e-5),
        )

    def build(self) -> ClipImages:
        return ClipImages(self)


class ImageEncoder:
    """Encodes images of any size.

    Attributes:
      name: the name of its directory.
      sha256: a hash of its parameters.
    """

    def __init__(self, graph: Any, params: PyTree, *, settings: ClipImagesSettings, name: str, sha256: str):
        self._graph, self._params, self._settings = graph, params, settings
        self.name, self.sha256 = name, sha256

    def encode(self, images: UInt8[np.ndarray, "N r r 3"]) -> Float32[np.ndarray, "N P"]:
        """The projections of square images, resized to the encoder's resolution by a bicubic filter."""
        found = np.zeros((len(images), self._settings.projection_width), np.float32)
        for start in range(0, len(images), _BATCH):
            block = images[start : start + _BATCH]
            padded = np.pad(block, [(0, _BATCH - len(block)), (0, 0), (0, 0), (0, 0)], mode="edge")
            rows = _run(self._graph, self._params, padded, resolution=self._settings.resolution)
            found[start : start + len(block)] = np.asarray(rows)[: len(block)]
        return found


@functools.partial(jax.jit, static_argnums=0, static_argnames="resolution")
def _run(
    graph: Any, params: PyTree, images: UInt8[Array, "B r r 3"], *, resolution: int
) -> Float32[Array, "B P"]:
    # By default a TPU multiplies in bfloat16 and a GPU in TF32.
    with jax.default_matmul_precision("highest"):
        return nnx.merge(graph, params)(normalised(images, resolution=resolution))


def normalised(images: UInt8[Array, "B r r 3"], *, resolution: int) -> Float32[Array, "B s s 3"]:
    """Resizes images as Pillow does, by a bicubic filter that is wider for smaller images, and normalises."""
    size = (len(images), resolution, resolution, 3)
    resized = jax.image.resize(images.astype(jnp.float32), size, method="cubic", antialias=True)
    return (jnp.clip(jnp.round(resized), 0, 255) / 255 - jnp.array(_MEAN)) / jnp.array(_DEVIATION)


def load(directory: Path) -> ImageEncoder:
    """Loads the image encoder of a whole CLIP in the files of Hugging Face's `transformers`.

    Raises:
      InputError: a file is missing, damaged or of another network.
    """
    source = files.Directory(directory)
    if files.CONFIG not in source.names():
        raise InputError(
            f"{source.where} has no {files.CONFIG}, so it is no CLIP; get one: "
            f"{files.get(source, ClipImagesSettings.DOWNLOAD)}"
        )
    where = f"{source.where}/{files.CONFIG}"
    settings = ClipImagesSettings.of(Config.read(files.read(source, files.CONFIG), where), where)
    graph, params, sha256 = weights.load(source, settings)
    return ImageEncoder(graph, params, settings=settings, name=source.name, sha256=sha256)
