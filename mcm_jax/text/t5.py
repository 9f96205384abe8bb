"""The encoder of T5 v1.1 (Raffel et al., arXiv:1910.10683), of any size, with the mean of its tokens.

Against other transformers: position enters only through a bias of the attention, which depends on the
distance and is the same in all layers; norms have no mean and no bias; the MLP has a gate (Shazeer,
arXiv:2002.05202); no layer has a bias; and the logits of attention are not divided by sqrt(d).
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float32, Int, Int32

from mcm_jax.text import layers
from mcm_jax.text.configs import Config


class T5(nnx.Module):
    """ids, mask -> the last layer's states after the final norm, and their mean over the mask."""

    def __init__(self, settings: "T5Settings"):
        self._farthest = settings.farthest
        self.tokens = layers.embedding(settings.vocabulary, settings.width)
        self.distances = layers.embedding(settings.buckets, settings.heads)
        self.blocks = nnx.List([_block(settings) for _ in range(settings.layers)])
        self.norm = _norm(settings)

    def __call__(
        self, ids: Int32[Array, "B L"], mask: Bool[Array, "B L"]
    ) -> tuple[Float32[Array, "B L D"], Float32[Array, "B D"]]:
        at = np.arange(ids.shape[1])
        buckets = distance_buckets(at[None, :] - at[:, None], self.distances.num_embeddings, self._farthest)
        by_distance = rearrange(self.distances(jnp.asarray(buckets)), "q k h -> 1 h q k")
        bias = by_distance + layers.bias_of(mask[:, None, None])
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x, bias)
        x = self.norm(x)
        return x, layers.masked_mean(x, mask)


class GatedMLP(nnx.Module):
    """W_out (gelu_tanh(W_gate x) * W_in x), without biases."""

    def __init__(self, width: int, hidden: int):
        self.gate = layers.linear(width, hidden, use_bias=False)
        self.wi = layers.linear(width, hidden, use_bias=False)
        self.wo = layers.linear(hidden, width, use_bias=False)

    def __call__(self, x: Float32[Array, "B L C"]) -> Float32[Array, "B L C"]:
        return self.wo(layers.gelu_tanh(self.gate(x)) * self.wi(x))


def _block(settings: "T5Settings") -> layers.Block:
    return layers.Block(
        layers.Attention(
            settings.width,
            heads=settings.heads,
            head_width=settings.head_width,
            scale=1.0,
            use_bias=False,
        ),
        GatedMLP(settings.width, settings.hidden),
        (_norm(settings), _norm(settings)),
        norm_first=True,
    )


def _norm(settings: "T5Settings") -> nnx.RMSNorm:
    """x / sqrt(mean(x^2) + epsilon) scale."""
    return nnx.RMSNorm(settings.width, epsilon=settings.epsilon, dtype=jnp.float32, rngs=layers.RNGS)


def distance_buckets(
    distance: Int[np.ndarray, "*shape"], buckets: int, farthest: int
) -> Int32[np.ndarray, "*shape"]:
    """The bucket of each distance (key minus query); one half of them for keys before the query, one after.

    In each half of n buckets, distances below n/2 have buckets of their own. Beyond, buckets grow
    exponentially up to the distance `farthest`; the last one holds everything farther away.

    Examples:
      >>> distance_buckets(np.array([0, -1, 1, -8, -12, 100, -1000]), 32, 128)
      array([ 0,  1, 17,  8,  9, 31, 15], dtype=int32)
    """
    half, size = buckets // 2, np.abs(distance)
    exact = half // 2
    # In float32, as T5 was trained; float64 could place a boundary elsewhere.
    ratio = np.maximum(size, 1).astype(np.float32) / np.float32(exact)
    growth = np.log(ratio) / np.float32(np.log(farthest / exact)) * np.float32(half - exact)
    far = np.minimum(exact + growth.astype(np.int32), half - 1)
    return (np.where(size < exact, size, far) + half * (distance > 0)).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class T5Settings:
    """The sizes of a T5 encoder; see `architectures.Settings`."""

    vocabulary: int
    width: int
    hidden: int
    layers: int
    heads: int
    head_width: int
    buckets: int
    farthest: int
    epsilon: float

    # Layer here -> layer in the file. The decoder is not read.
    NAMES: ClassVar[Mapping[str, str]] = {
        "tokens": "shared",
        "distances": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        "blocks.{}.attention.q": "encoder.block.{}.layer.0.SelfAttention.q",
        "blocks.{}.attention.k": "encoder.block.{}.layer.0.SelfAttention.k",
        "blocks.{}.attention.v": "encoder.block.{}.layer.0.SelfAttention.v",
        "blocks.{}.attention.out": "encoder.block.{}.layer.0.SelfAttention.o",
        "blocks.{}.attention_norm": "encoder.block.{}.layer.0.layer_norm",
        "blocks.{}.mlp.gate": "encoder.block.{}.layer.1.DenseReluDense.wi_0",
        "blocks.{}.mlp.wi": "encoder.block.{}.layer.1.DenseReluDense.wi_1",
        "blocks.{}.mlp.wo": "encoder.block.{}.layer.1.DenseReluDense.wo",
        "blocks.{}.mlp_norm": "encoder.block.{}.layer.1.layer_norm",
        "norm": "encoder.final_layer_norm",
    }
    # 32,000 pieces, 100 placeholders for pretraining, and 28 up to a multiple of 128.
    SPARE_TOKENS: ClassVar[int] = 128
    CLASS: ClassVar[str] = "T5EncoderModel"
    DOWNLOAD: ClassVar[str] = "hf download google/t5-v1_1-xxl config.json pytorch_model.bin spiece.model"

    @property
    def longest(self) -> int:
        """It was trained on texts of up to this length."""
        return 512

    @property
    def pooled_width(self) -> int:
        return self.width

    @classmethod
    def of(cls, config: Config) -> "T5Settings":
        # T5 without a version has "relu".
        config.choice("feed_forward_proj", ("gated-gelu",))
        buckets = config.size("relative_attention_num_buckets", at_least=4)
        return cls(
            vocabulary=config.size("vocab_size"),
            width=config.size("d_model"),
            hidden=config.size("d_ff"),
            layers=config.count("num_layers"),
            heads=config.size("num_heads"),
            head_width=config.size("d_kv"),
            buckets=buckets,
            # Configs from before it was a setting do not have it.
            farthest=config.size("relative_attention_max_distance", at_least=buckets // 2, default=128),
            epsilon=config.epsilon("layer_norm_epsilon"),
        )

    def build(self) -> T5:
        return T5(self)
