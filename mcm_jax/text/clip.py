"""CLIP's text encoder (Radford et al., arXiv:2103.00020): OpenAI's ViT-L/14, OpenCLIP's ViT-g/14 and bigG/14.

A transformer in which each token sees only those before it. The last token, which marks the end of the text,
therefore sees all of it, and its last state is projected into the space that texts share with images.

`tokens` are the states after the last layer but one, without a norm, as in SDXL (Podell et al.,
arXiv:2307.01952): in the last layer only the state of the last token was trained.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float32, Int32

from mcm_jax.text import layers
from mcm_jax.text.configs import Config
from mcm_jax.text.layers import Block

ACTIVATIONS = {"quick_gelu": layers.quick_gelu, "gelu": layers.gelu}


class Clip(nnx.Module):
    """ids, mask -> the states before the last layer, and the projection of the last token's final state.

    The projection is not normalised; a CLIP score is the cosine of it and an image's projection.
    """

    def __init__(self, settings: "ClipSettings"):
        width = settings.width
        self.tokens = layers.embedding(settings.vocabulary, width)
        self.positions = layers.embedding(settings.longest, width)
        self.blocks = nnx.List([settings.block() for _ in range(settings.layers)])
        self.norm = layers.layer_norm(width, epsilon=settings.epsilon)
        self.projection = layers.linear(width, settings.pooled_width, use_bias=False)

    def __call__(
        self, ids: Int32[Array, "B L"], mask: Bool[Array, "B L"]
    ) -> tuple[Float32[Array, "B L D"], Float32[Array, "B P"]]:
        at = jnp.arange(ids.shape[1])
        # Padding comes last, so no token of the text sees it.
        bias = layers.bias_of(at[None, :] <= at[:, None])[None, None]
        x = before = self.tokens(ids) + self.positions(at)
        for block in self.blocks:
            x, before = block(x, bias), x
        last = jnp.take_along_axis(self.norm(x), jnp.sum(mask, axis=1)[:, None, None] - 1, axis=1)[:, 0]
        return before, self.projection(last)


@dataclasses.dataclass(frozen=True)
class TransformerSettings:
    """The sizes of a transformer of CLIP, that of the texts or that of the images."""

    width: int
    hidden: int
    layers: int
    heads: int
    activation: str
    epsilon: float

    def block(self) -> Block:
        """Builds one of its blocks."""
        return layers.biased_block(
            self.width,
            self.hidden,
            heads=self.heads,
            activation=ACTIVATIONS[self.activation],
            epsilon=self.epsilon,
            norm_first=True,
        )


@dataclasses.dataclass(frozen=True)
class ClipSettings(TransformerSettings):
    """The sizes of a CLIP's text encoder; see `architectures.Settings`."""

    vocabulary: int
    longest: int
    pooled_width: int

    # Layer here -> layer in the file. The encoder of images is not read.
    NAMES: ClassVar[Mapping[str, str]] = {
        "tokens": "text_model.embeddings.token_embedding",
        "positions": "text_model.embeddings.position_embedding",
        "blocks.{}.attention.q": "text_model.encoder.layers.{}.self_attn.q_proj",
        "blocks.{}.attention.k": "text_model.encoder.layers.{}.self_attn.k_proj",
        "blocks.{}.attention.v": "text_model.encoder.layers.{}.self_attn.v_proj",
        "blocks.{}.attention.out": "text_model.encoder.layers.{}.self_attn.out_proj",
        "blocks.{}.attention_norm": "text_model.encoder.layers.{}.layer_norm1",
        "blocks.{}.mlp.wi": "text_model.encoder.layers.{}.mlp.fc1",
        "blocks.{}.mlp.wo": "text_model.encoder.layers.{}.mlp.fc2",
        "blocks.{}.mlp_norm": "text_model.encoder.layers.{}.layer_norm2",
        "norm": "text_model.final_layer_norm",
        "projection": "text_projection",
    }
    SPARE_TOKENS: ClassVar[int] = 0
    CLASS: ClassVar[str] = "CLIPModel"
    DOWNLOAD: ClassVar[str] = (
        "hf download openai/clip-vit-large-patch14 config.json model.safetensors tokenizer.json"
    )

    @classmethod
    def of(cls, config: Config) -> "ClipSettings":
        # A whole CLIP ("clip") has the text encoder's config inside; a text encoder of its own
        # ("clip_text_model"), as in the folders of diffusion models, has nothing else.
        text = config.section("text_config") if config.text("model_type") == "clip" else config
        # transformers leaves out of a section what has its default, which is that of ViT-B/32.
        width = text.size("hidden_size", default=512)
        return cls(
            vocabulary=text.size("vocab_size", default=49408),
            width=width,
            hidden=text.size("intermediate_size", default=2048),
            layers=text.count("num_hidden_layers", default=12),
            heads=text.divisor("num_attention_heads", width, default=8),
            longest=text.size("max_position_embeddings", default=77),
            pooled_width=config.size("projection_dim", default=512),
            activation=text.choice("hidden_act", tuple(ACTIVATIONS), default="quick_gelu"),
            epsilon=text.epsilon("layer_norm_eps", default=1e-5),
        )

    def build(self) -> Clip:
        return Clip(self)
