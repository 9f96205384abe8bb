"""A residual MLP for vectors: the network of closed-form problems, whose data are not images."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mcm_jax.models.embeddings import Conditioning, NoiseScale


@dataclasses.dataclass(frozen=True)
class MLPSpec:
    """All sizes of an MLP."""

    dimension: int
    width: int
    blocks: int
    embedding_width: int = 64
    num_classes: int = 1
    dropout: float = 0.0
    noise_scale: NoiseScale = "arctan"

    def build(self, rngs: nnx.Rngs) -> "MLP":
        """The network with these sizes."""
        return MLP(self, rngs=rngs)


class MLPBlock(nnx.Module):
    """x + W2 dropout(swish(W1 norm(x) (1 + scale) + shift)); W2 is initialised to zero."""

    def __init__(self, spec: MLPSpec, *, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros
        self.norm = nnx.LayerNorm(spec.width, rngs=rngs)
        self.dense_in = nnx.Linear(spec.width, spec.width, rngs=rngs)
        self.modulation = nnx.Linear(spec.embedding_width, 2 * spec.width, kernel_init=zeros, rngs=rngs)
        self.dropout = nnx.Dropout(spec.dropout)
        self.dense_out = nnx.Linear(spec.width, spec.width, kernel_init=zeros, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B C"], emb: Float[Array, "B E"], key: jax.Array | None
    ) -> Float[Array, "B C"]:
        scale, shift = jnp.split(self.modulation(emb), 2, axis=-1)
        h = jax.nn.swish(self.dense_in(self.norm(x)) * (1 + scale) + shift)
        return x + self.dense_out(self.dropout(h, deterministic=key is None, rngs=key))


class MLP(nnx.Module):
    """(z_t, log-SNR, label, dropout key) -> v_hat, float32 [B, dimension]."""

    def __init__(self, spec: MLPSpec, *, rngs: nnx.Rngs):
        self.conditioning = Conditioning(
            width=spec.embedding_width, num_classes=spec.num_classes, scale=spec.noise_scale, rngs=rngs
        )
        self.dense_in = nnx.Linear(spec.dimension, spec.width, rngs=rngs)
        self.blocks = nnx.List(MLPBlock(spec, rngs=rngs) for _ in range(spec.blocks))
        self.norm_out = nnx.LayerNorm(spec.width, rngs=rngs)
        self.dense_out = nnx.Linear(spec.width, spec.dimension, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(
        self,
        z_t: Float[Array, "B d"],
        logsnr_t: Float[Array, "B"],
        label: Int[Array, "B"],
        key: jax.Array | None,
    ) -> Float[Array, "B d"]:
        emb = jax.nn.swish(self.conditioning(logsnr_t, label))
        h = self.dense_in(z_t)
        for n, block in enumerate(self.blocks):
            h = block(h, emb, None if key is None else jax.random.fold_in(key, n))
        return self.dense_out(jax.nn.swish(self.norm_out(h)))
