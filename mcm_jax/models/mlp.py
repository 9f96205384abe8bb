"""A residual MLP for vectors, used for closed-form problems, whose data are not images."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mcm_jax.diffusion.conditions import Cond
from mcm_jax.models.conditions import Condition
from mcm_jax.models.embeddings import Conditioning, NoiseScale
from mcm_jax.models.placement import Placement


@dataclasses.dataclass(frozen=True)
class MLPSettings:
    """All sizes of an MLP."""

    width: int
    blocks: int
    embedding_width: int = 64
    dropout: float = 0.0
    noise_scale: NoiseScale = "arctan"

    def build(
        self,
        shape: tuple[int, ...],
        *,
        condition: Condition,
        takes_end: bool,
        placement: Placement,
        rngs: nnx.Rngs,
    ) -> "MLP":
        """Builds the network for vectors of shape (dimension,); it is small and ignores the placement."""
        del placement
        return MLP(self, *shape, condition=condition, takes_end=takes_end, rngs=rngs)


class MLPBlock(nnx.Module):
    """x + W2 dropout(swish(W1 norm(x) (1 + scale) + shift)); W2 is initialised to zero."""

    def __init__(self, settings: MLPSettings, *, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros
        self.norm = nnx.LayerNorm(settings.width, rngs=rngs)
        self.dense_in = nnx.Linear(settings.width, settings.width, rngs=rngs)
        self.modulation = nnx.Linear(
            settings.embedding_width, 2 * settings.width, kernel_init=zeros, rngs=rngs
        )
        self.dropout = nnx.Dropout(settings.dropout)
        self.dense_out = nnx.Linear(settings.width, settings.width, kernel_init=zeros, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B C"], emb: Float[Array, "B E"], key: jax.Array | None
    ) -> Float[Array, "B C"]:
        scale, shift = jnp.split(self.modulation(emb), 2, axis=-1)
        h = jax.nn.swish(self.dense_in(self.norm(x)) * (1 + scale) + shift)
        return x + self.dense_out(self.dropout(h, deterministic=key is None, rngs=key))


class MLP(nnx.Module):
    """(z_t, log-SNR, cond, dropout key) -> v_hat, float32 [B, dimension]."""

    def __init__(
        self,
        settings: MLPSettings,
        dimension: int,
        *,
        condition: Condition,
        takes_end: bool,
        rngs: nnx.Rngs,
    ):
        self.conditioning = Conditioning(
            width=settings.embedding_width,
            condition=condition,
            scale=settings.noise_scale,
            takes_end=takes_end,
            rngs=rngs,
        )
        self.dense_in = nnx.Linear(dimension, settings.width, rngs=rngs)
        self.blocks = nnx.List(MLPBlock(settings, rngs=rngs) for _ in range(settings.blocks))
        self.norm_out = nnx.LayerNorm(settings.width, rngs=rngs)
        self.dense_out = nnx.Linear(settings.width, dimension, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(
        self,
        z_t: Float[Array, "B d"],
        logsnr_t: Float[Array, " B"],
        cond: Cond,
        key: jax.Array | None,
        logsnr_u: Float[Array, " B"] | None = None,
    ) -> Float[Array, "B d"]:
        emb = jax.nn.swish(self.conditioning(logsnr_t, cond, logsnr_u))
        h = self.dense_in(z_t)
        for n, block in enumerate(self.blocks):
            h = block(h, emb, None if key is None else jax.random.fold_in(key, n))
        return self.dense_out(jax.nn.swish(self.norm_out(h)))
