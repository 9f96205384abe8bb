"""The BERT encoder (Devlin et al., arXiv:1810.04805) with the mean of its tokens as a sentence's vector.

all-MiniLM-L6-v2 is one of them: 6 layers of width 384, trained so that this vector, normalised, is close for
sentences of similar meaning (Reimers & Gurevych, arXiv:1908.10084).
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float32, Int32

from mcm_jax.text import layers
from mcm_jax.text.configs import Config


class Bert(nnx.Module):
    """ids, mask -> the last layer's states, and their mean over the mask with length 1."""

    def __init__(self, settings: "BertSettings"):
        width, epsilon = settings.width, settings.epsilon
        self.tokens = layers.embedding(settings.vocabulary, width)
        self.positions = layers.embedding(settings.longest, width)
        # A text is always the first of the two sentences that BERT was trained on.
        self.sentences = layers.embedding(settings.sentences, width)
        self.norm = layers.layer_norm(width, epsilon=epsilon)
        self.blocks = nnx.List([_block(settings) for _ in range(settings.layers)])

    def __call__(
        self, ids: Int32[Array, "B L"], mask: Bool[Array, "B L"]
    ) -> tuple[Float32[Array, "B L D"], Float32[Array, "B P"]]:
        x = self.tokens(ids) + self.positions(jnp.arange(ids.shape[1])) + self.sentences(jnp.zeros_like(ids))
        x, bias = self.norm(x), layers.bias_of(mask[:, None, None])
        for block in self.blocks:
            x = block(x, bias)
        mean = layers.masked_mean(x, mask)
        norm = jnp.linalg.norm(mean, axis=-1, keepdims=True)
        # As in sentence-transformers, for a mean of 0.
        return x, mean / jnp.maximum(norm, 1e-12)


def _block(settings: "BertSettings") -> layers.Block:
    return layers.biased_block(
        settings.width,
        settings.hidden,
        heads=settings.heads,
        activation=layers.gelu,
        epsilon=settings.epsilon,
        norm_first=False,
    )


@dataclasses.dataclass(frozen=True)
class BertSettings:
    """The sizes of a BERT; see `architectures.Settings`."""

    vocabulary: int
    width: int
    hidden: int
    layers: int
    heads: int
    longest: int
    sentences: int
    epsilon: float

    # Layer here -> layer in the file.
    NAMES: ClassVar[Mapping[str, str]] = {
        "tokens": "embeddings.word_embeddings",
        "positions": "embeddings.position_embeddings",
        "sentences": "embeddings.token_type_embeddings",
        "norm": "embeddings.LayerNorm",
        "blocks.{}.attention.q": "encoder.layer.{}.attention.self.query",
        "blocks.{}.attention.k": "encoder.layer.{}.attention.self.key",
        "blocks.{}.attention.v": "encoder.layer.{}.attention.self.value",
        "blocks.{}.attention.out": "encoder.layer.{}.attention.output.dense",
        "blocks.{}.attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
        "blocks.{}.mlp.wi": "encoder.layer.{}.intermediate.dense",
        "blocks.{}.mlp.wo": "encoder.layer.{}.output.dense",
        "blocks.{}.mlp_norm": "encoder.layer.{}.output.LayerNorm",
    }
    SPARE_TOKENS: ClassVar[int] = 0
    CLASS: ClassVar[str] = "BertModel"
    DOWNLOAD: ClassVar[str] = (
        "hf download sentence-transformers/all-MiniLM-L6-v2 config.json model.safetensors tokenizer.json"
    )

    @property
    def pooled_width(self) -> int:
        return self.width

    @classmethod
    def of(cls, config: Config) -> "BertSettings":
        config.choice("hidden_act", ("gelu",))
        config.choice("position_embedding_type", ("absolute",), default="absolute")
        width = config.size("hidden_size")
        return cls(
            vocabulary=config.size("vocab_size"),
            width=width,
            hidden=config.size("intermediate_size"),
            layers=config.count("num_hidden_layers"),
            heads=config.divisor("num_attention_heads", width),
            longest=config.size("max_position_embeddings"),
            sentences=config.size("type_vocab_size"),
            epsilon=config.epsilon("layer_norm_eps"),
        )

    def build(self) -> Bert:
        return Bert(self)
