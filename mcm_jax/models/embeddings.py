"""Embeddings of the network's inputs besides z_t: the noise level and the condition (SPEC 6)."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mcm_jax.diffusion.conditions import Cond
from mcm_jax.models.conditions import Caption, Classes, Condition

NoiseScale = Literal["arctan", "logsnr", "smooth"]


def sinusoidal(position: Float[Array, " B"], *, width: int) -> Float[Array, "B width"]:
    """sin and cos of position / 10000^(k / (width/2)): the embedding of Vaswani et al. 2017.

    Examples:
      >>> sinusoidal(jnp.zeros(1), width=4).tolist()
      [[0.0, 0.0, 1.0, 1.0]]
    """
    half = width // 2
    frequencies = jnp.exp(-math.log(10_000.0) * jnp.arange(half) / half)
    angles = position[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def noise_position(logsnr: Float[Array, " B"], *, scale: NoiseScale) -> Float[Array, " B"]:
    """The position at which `sinusoidal` embeds a log-SNR, from 0 to 1000, or to 10 if smooth.

    Not in the paper. "arctan" (our default) is 1000 (2 / pi) arctan(exp(-lambda / 2)), which is 1000 t for
    the cosine schedule; "logsnr" is 1000 (15 - lambda) / 30, with the same resolution at all noise levels.
    "smooth" is a hundredth of "arctan", so that the network's derivative by the noise level stays small, as
    continuous-time consistency needs. All depend only on the log-SNR, so a sampler may use any grid.

    Examples:
      >>> noise_position(jnp.zeros(1), scale="arctan").round().tolist()
      [500.0]
    """
    if scale == "logsnr":
        return 1000 * (15 - logsnr) / 30
    return {"arctan": 1000, "smooth": 10}[scale] * 2 / math.pi * jnp.arctan(jnp.exp(-logsnr / 2))


class StepEnd(nnx.Module):
    """W2 swish(W1 sinusoidal(lambda_u)): the end u of the step that a student predicts, float32 [B, width].

    W2 is zero at first, so that a student starts as its teacher, which does not have this input.
    """

    def __init__(self, *, width: int, scale: NoiseScale, rngs: nnx.Rngs):
        self.scale: NoiseScale = scale
        self.dense_1 = nnx.Linear(width, width, rngs=rngs)
        self.dense_2 = nnx.Linear(width, width, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, logsnr_u: Float[Array, " B"]) -> Float[Array, "B E"]:
        h = sinusoidal(noise_position(logsnr_u, scale=self.scale), width=self.dense_1.in_features)
        return self.dense_2(jax.nn.swish(self.dense_1(h)))


class Conditioning(nnx.Module):
    """emb = W2 swish(W1 sinusoidal(lambda)) + an embedding of the condition, float32 [B, width].

    Labels have an embedding each, and one for 'any class'; a caption's pooled embedding is projected. With
    takes_end, the embedding `StepEnd` of a step's end is added.
    """

    def __init__(
        self, *, width: int, condition: Condition, scale: NoiseScale, takes_end: bool, rngs: nnx.Rngs
    ):
        self.width = width
        self.scale: NoiseScale = scale
        self.dense_1 = nnx.Linear(width, width, rngs=rngs)
        self.dense_2 = nnx.Linear(width, width, rngs=rngs)
        if isinstance(condition, Classes):
            self.classes = nnx.Embed(condition.num_classes + 1, width, rngs=rngs)
        else:
            self.pooled = nnx.Linear(condition.pooled_width, width, use_bias=False, rngs=rngs)
        if takes_end:
            self.end = StepEnd(width=width, scale=scale, rngs=rngs)

    def __call__(
        self, logsnr: Float[Array, " B"], cond: Cond, logsnr_u: Float[Array, " B"] | None
    ) -> Float[Array, "B E"]:
        h = sinusoidal(noise_position(logsnr, scale=self.scale), width=self.width)
        emb = self.dense_2(jax.nn.swish(self.dense_1(h))) + (
            self.pooled(jnp.asarray(cond.pooled)) if isinstance(cond, Caption) else self.classes(cond)
        )
        return emb if logsnr_u is None else emb + self.end(logsnr_u)
