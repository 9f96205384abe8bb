"""The U-Net that ADM's and EDM2's networks have in common: which blocks there are, and how they are joined.

    conv -> level 0 -> down -> level 1 -> ... -> level n -> in0, in1 -> level n -> up -> ... -> level 0

Every output of the encoder, from the convolution on, enters a decoder block of its level, the last one first.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from mcm_jax.diffusion.conditions import Cond
from mcm_jax.fields import Affects, setting
from mcm_jax.models.attention import AttentionFn
from mcm_jax.models.blocks import doubled
from mcm_jax.models.placement import Placement
from mcm_jax.models.preconditioning import Preconditioning, v_hat
from mcm_jax.models.remat import Remat, call_block, split_key

Resampling = Literal["down", "up"]


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """A block of the U-Net.

    Attributes:
      part: enc or dec, for the encoder or the decoder.
      name: its name within the level, as EDM's files have it: block0, block1, ..., down, up, in0 or in1.
      level: 0 for the top resolution.
      c_in: channels of the input, without those of the encoder's output.
      c_skip: channels of the encoder's output that enters the block; 0: there is none.
      c_out: channels of the output.
      attention: whether attention follows.
    """

    part: Literal["enc", "dec"]
    name: str
    level: int
    c_in: int
    c_skip: int
    c_out: int
    attention: bool

    @property
    def c_joined(self) -> int:
        """Channels of the input together with those of the encoder's output."""
        return self.c_in + self.c_skip

    @property
    def resampling(self) -> Resampling | None:
        """Whether the block halves or doubles the resolution."""
        if self.name == "down":
            return "down"
        return "up" if self.name == "up" else None


def encoder(widths: Sequence[int], blocks: int, attention: Sequence[bool]) -> list[BlockShape]:
    """The blocks after the first convolution, in the order in which they compute.

    Args:
      widths: channels of each level.
      blocks: blocks of each level.
      attention: whether the blocks of each level have attention.

    Examples:
      >>> [(block.name, block.c_in, block.c_out) for block in encoder([8, 16], 1, [False, True])]
      [('block0', 8, 8), ('down', 8, 8), ('block0', 8, 16)]
    """
    result, width = [], widths[0]
    for level, c_out in enumerate(widths):
        if level > 0:
            result.append(BlockShape("enc", "down", level, width, 0, width, attention=False))
        for number in range(blocks):
            result.append(BlockShape("enc", f"block{number}", level, width, 0, c_out, attention[level]))
            width = c_out
    return result


def decoder(widths: Sequence[int], blocks: int, attention: Sequence[bool]) -> list[BlockShape]:
    """The blocks after those of `encoder`, in the order in which they compute; arguments as there.

    Examples:
      >>> [(block.name, block.c_skip) for block in decoder([8, 16], 1, [False, True])][:4]
      [('in0', 0), ('in1', 0), ('block0', 16), ('block1', 8)]
    """
    skips = [widths[0], *(block.c_out for block in encoder(widths, blocks, attention))]
    result, width = [], widths[-1]
    for level in reversed(range(len(widths))):
        if level == len(widths) - 1:
            result.append(BlockShape("dec", "in0", level, width, 0, width, attention=True))
            result.append(BlockShape("dec", "in1", level, width, 0, width, attention=False))
        else:
            result.append(BlockShape("dec", "up", level, width, 0, width, attention=False))
        for number in range(blocks + 1):
            shape = BlockShape(
                "dec", f"block{number}", level, width, skips.pop(), widths[level], attention[level]
            )
            result.append(shape)
            width = shape.c_out
    return result


@dataclasses.dataclass(frozen=True)
class UNetSettings:
    """The sizes of both U-Nets, and how they compute. Levels are listed from the top resolution down."""

    widths: tuple[int, ...] = setting(
        (192, 384, 576, 768), "channels of each level", low=1, affects=Affects.ALL
    )
    blocks: int = setting(3, "blocks of each level in the encoder", low=1, affects=Affects.ALL)
    attention_levels: tuple[bool, ...] = setting(
        (False, True, True, True), "whether the blocks of each level have attention", affects=Affects.ALL
    )
    head_width: int = setting(64, "channels of an attention head", low=1, affects=Affects.ALL)
    dropout: float = setting(0.0, "dropout of every block, to the nearest 1/256", low=0, high=0.99)
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "dtype of the activations", affects=Affects.TRAINING | Affects.SAMPLES
    )
    remat: Literal["none", "full"] = setting(
        "none", "what the backward pass recomputes: nothing (none) or every block", affects=Affects.NOTHING
    )
    attention: Literal["fused", "einsum"] = setting(
        "fused",
        "fused: a fused kernel on TPUs if the number of positions is a multiple of 128, at most 1024, and on "
        "NVIDIA GPUs in bfloat16, otherwise einsum; einsum: never a fused kernel",
        affects=Affects.NOTHING,
    )

    @property
    def encoder(self) -> list[BlockShape]:
        """See `encoder`."""
        return encoder(self.widths, self.blocks, self.attention_levels)

    @property
    def decoder(self) -> list[BlockShape]:
        """See `decoder`."""
        return decoder(self.widths, self.blocks, self.attention_levels)

    def num_heads(self, width: int) -> int:
        """Heads of attention over `width` channels."""
        return max(1, width // self.head_width)


class UNet(nnx.Module):
    """(z_t, log-SNR, label, dropout key) -> v_hat, in float32 whatever precision the layers compute in."""

    def __init__(
        self,
        settings: UNetSettings,
        preconditioning: Preconditioning,
        *,
        channels: int,
        placement: Placement,
        make_block: Callable[[BlockShape], nnx.Module],
    ):
        """channels: of an image."""
        self.channels, self.placement = channels, placement
        self.preconditioning: Preconditioning = preconditioning
        self.remat: Remat = settings.remat
        self.encoder = nnx.List(make_block(shape) for shape in settings.encoder)
        self.decoder = nnx.List(make_block(shape) for shape in settings.decoder)
        self.takes_skip = tuple(shape.c_skip > 0 for shape in settings.decoder)

    def __call__(
        self,
        z_t: Float[Array, "B H W C"],
        logsnr_t: Float[Array, " B"],
        cond: Cond,
        key: jax.Array | None,
        logsnr_u: Float[Array, " B"] | None = None,
    ) -> Float[Array, "B H W C"]:
        """Predicts v.

        Args:
          cond: labels; the network was not trained for the last one, 'any class', whose embedding is zero.
          key: the randomness of dropout; None disables it.
          logsnr_u: the log-SNR at the end of the step, if the network takes it.
        """
        return v_hat(
            self.preconditioning,
            lambda x, level: self.predict(x, level, cond, key, logsnr_u)[..., : self.channels],
            z_t,
            logsnr_t,
        )

    def predict(
        self,
        x: Float[Array, "B H W C"],
        level: Float[Array, " B"],
        cond: Cond,
        key: jax.Array | None,
        logsnr_u: Float[Array, " B"] | None = None,
    ) -> Float[Array, "B H W D"]:
        """F: what the network predicts, for an input and a noise level as it was trained to see them."""
        raise NotImplementedError

    def blocks(
        self,
        h: Float[Array, "B H W C"],
        emb: Float[Array, "B E"],
        key: jax.Array | None,
        *,
        join: Callable[[Array, Array], Array],
    ) -> Float[Array, "B H W C"]:
        """Computes all blocks. join: (input, encoder's output) -> the input of a block that both enter."""
        call = call_block(self.placement, self.remat)
        keys = iter(split_key(key, len(self.encoder) + len(self.decoder)))
        skips = [h]
        for block in self.encoder:
            h = call(block, h, emb, next(keys))
            skips.append(h)
        for block, takes_skip in zip(self.decoder, self.takes_skip, strict=True):
            h = call(block, join(h, skips.pop()) if takes_skip else h, emb, next(keys))
        return h


def attended(
    qkv: Float[Array, "B H W D"],
    *,
    heads: int,
    attend: AttentionFn,
    normalise: Callable[[Array], Array] = lambda qkv: qkv,
) -> Float[Array, "B H W C"]:
    """softmax(q k^T / sqrt(d)) v of every head, over all positions.

    Args:
      qkv: the channels of q, of k and of v, in each of these by head.
      normalise: applied to [3, B, heads, positions, d].
    """
    q, k, v = normalise(rearrange(qkv, "b h w (n heads d) -> n b heads (h w) d", n=3, heads=heads))
    h = attend(q * q.shape[-1] ** -0.5, k, v)
    return rearrange(h, "b heads (h w) d -> b h w (heads d)", h=qkv.shape[1])


def resampled(x: Float[Array, "B H W C"], resampling: Resampling | None) -> Float[Array, "B I J C"]:
    """Averages 2x2 pixels ("down"), or repeats every pixel in height and width ("up")."""
    if resampling == "down":
        return nnx.avg_pool(x, (2, 2), strides=(2, 2))
    return doubled(x) if resampling == "up" else x
