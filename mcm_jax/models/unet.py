"""The U-Net that ADM's and EDM2's networks have in common: which blocks there are, and how they are joined.

    conv -> level 0 -> down -> level 1 -> ... -> level n -> in0, in1 -> level n -> up -> ... -> level 0

Every output of the encoder, from the convolution on, enters a decoder block of its level, the last one first.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from einops import repeat
from flax import nnx
from jaxtyping import Array, Float

Resampling = Literal["down", "up"]


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """A block of the U-Net.

    Attributes:
      name: its name within the level, as EDM's files have it: block0, block1, ..., down, up, in0 or in1.
      level: 0 for the top resolution.
      c_in: channels of the input, without those of the encoder's output.
      c_skip: channels of the encoder's output that enters the block; 0: there is none.
      c_out: channels of the output.
      attention: whether attention follows.
    """

    name: str
    level: int
    c_in: int
    c_skip: int
    c_out: int
    attention: bool

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
            result.append(BlockShape("down", level, width, 0, width, attention=False))
        for number in range(blocks):
            result.append(BlockShape(f"block{number}", level, width, 0, c_out, attention[level]))
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
            result.append(BlockShape("in0", level, width, 0, width, attention=True))
            result.append(BlockShape("in1", level, width, 0, width, attention=False))
        else:
            result.append(BlockShape("up", level, width, 0, width, attention=False))
        for number in range(blocks + 1):
            shape = BlockShape(f"block{number}", level, width, skips.pop(), widths[level], attention[level])
            result.append(shape)
            width = shape.c_out
    return result


def resampled(x: Float[Array, "B H W C"], resampling: Resampling | None) -> Float[Array, "B I J C"]:
    """Averages 2x2 pixels ("down"), or repeats every pixel in height and width ("up")."""
    if resampling == "down":
        return nnx.avg_pool(x, (2, 2), strides=(2, 2))
    if resampling == "up":
        return repeat(x, "b h w c -> b (h i) (w j) c", i=2, j=2)
    return x
