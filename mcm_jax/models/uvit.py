"""UViT: ResNet and transformer stages on a pyramid of resolutions (SPEC 6; arXiv:2301.11093).

    conv 3x3 -> stage 0 -> down -> stage 1 -> ... middle ... -> stage 1 -> up -> stage 0 -> conv 3x3

"Down" is a 2x2 average pool and a 1x1 projection; "up" is a 1x1 projection and nearest-neighbour upsampling.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from mcm_jax.diffusion.conditions import Cond
from mcm_jax.fields import Affects, setting
from mcm_jax.models.blocks import Norm, ResNetBlock, Saved, Text, TransformerBlock, doubled, make_norm
from mcm_jax.models.conditions import Caption, Captions, Condition
from mcm_jax.models.embeddings import Conditioning, NoiseScale
from mcm_jax.models.placement import Placement
from mcm_jax.models.remat import Remat, call_block, split_key

StageKind = Literal["resnet", "transformer"]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One resolution of the pyramid: a sequence of `blocks` blocks with `width` channels."""

    kind: StageKind
    width: int
    blocks: int
    dropout: float


@dataclasses.dataclass(frozen=True)
class UViTSettings:
    """All sizes of a UViT (SPEC 6) and how it computes. Stages are listed from the top resolution down."""

    kinds: tuple[StageKind, ...] = setting(
        ("resnet", "resnet", "transformer"),
        "kind of each stage, from the top to the middle",
        affects=Affects.ALL,
    )
    patch: int = setting(
        1,
        "side in pixels of the top stage's patches (open for 512x512); 1: each pixel is a position",
        low=1,
        affects=Affects.ALL,
    )
    widths: tuple[int, ...] = setting((32, 64, 128), "channels of each stage", low=1, affects=Affects.ALL)
    blocks: tuple[int, ...] = setting(
        (1, 1, 4), "blocks of each stage, on each side", low=1, affects=Affects.ALL
    )
    dropouts: tuple[float, ...] = setting(
        (0.0, 0.0, 0.0), "dropout of each stage, to the nearest 1/256", low=0, high=0.99
    )
    embedding_width: int = setting(128, "width of the conditioning vector", low=2, affects=Affects.ALL)
    head_width: int = setting(
        32, "attention head width (open: 64 or 128 at full size)", low=1, affects=Affects.ALL
    )
    mlp_factor: int = setting(
        4, "ratio of hidden width to width in a transformer's MLP", low=1, affects=Affects.ALL
    )
    resnet_norm: Norm = setting(
        "layer",
        "norm of ResNet blocks and of the output (open); the compiler estimates less time for group on TPUs",
        affects=Affects.ALL,
    )
    noise_scale: NoiseScale = setting(
        "arctan",
        "axis of the noise level's embedding (open); continuous-time consistency (scd, sct) needs smooth, "
        "in the teacher too",
        affects=Affects.ALL,
    )
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "dtype of the activations", affects=Affects.TRAINING | Affects.SAMPLES
    )
    remat: Remat = setting(
        "none",
        "what the backward pass recomputes instead of storing: nothing (none), every block (full), all of a "
        "block except its matrix products (dots), or all except the values in `saved` (names)",
        affects=Affects.NOTHING,
    )
    saved: tuple[Saved, ...] = setting(
        ("conv_1", "mlp_in", "attention"),
        "values of every block that remat=names stores: the outputs of conv_1, mlp_in, qkv or attention",
        affects=Affects.NOTHING,
    )
    unroll: bool = setting(
        True,
        "unroll the loop over transformer blocks; False compiles faster but runs slower on a CPU",
        affects=Affects.NOTHING,
    )
    attention: Literal["fused", "einsum"] = setting(
        "fused",
        "fused: a fused kernel on TPUs if the number of positions is a multiple of 128, at most 1024, and on "
        "NVIDIA GPUs in bfloat16, otherwise einsum; einsum: never a fused kernel",
        affects=Affects.NOTHING,
    )

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages, from the top resolution to the middle."""
        columns = zip(self.kinds, self.widths, self.blocks, self.dropouts, strict=True)
        return tuple(Stage(*column) for column in columns)

    def build(
        self,
        shape: tuple[int, ...],
        *,
        condition: Condition,
        takes_end: bool,
        placement: Placement,
        rngs: nnx.Rngs,
    ) -> "UViT":
        """Builds the network for images of shape (resolution, resolution, channels)."""
        return UViT(self, shape, condition=condition, takes_end=takes_end, placement=placement, rngs=rngs)


class Modulations(nnx.Module):
    """Maps emb to the scale and shift of all blocks of a stage, with one linear layer."""

    def __init__(
        self, blocks: int, channels: int, settings: UViTSettings, *, placement: Placement, rngs: nnx.Rngs
    ):
        self.blocks, self.by_column = blocks, placement.by_column
        dtype = jnp.dtype(settings.dtype)
        # The name "columns" makes its weights stay split by column on a mesh.
        self.columns = nnx.Linear(settings.embedding_width, blocks * 2 * channels, dtype=dtype, rngs=rngs)

    def __call__(self, emb: Float[Array, "B E"]) -> Float[Array, "N B M"]:
        return rearrange(self.by_column(self.columns, emb), "b (n c) -> n b c", n=self.blocks)


class ResNetStage(nnx.Module):
    """A sequence of ResNet blocks."""

    def __init__(self, stage: Stage, settings: UViTSettings, *, placement: Placement, rngs: nnx.Rngs):
        self.remat: Remat = settings.remat
        self.saved, self.placement = settings.saved, placement
        self.modulations = Modulations(stage.blocks, stage.width, settings, placement=placement, rngs=rngs)
        self.blocks = nnx.List(
            ResNetBlock(
                stage.width,
                dropout=stage.dropout,
                norm=settings.resnet_norm,
                dtype=jnp.dtype(settings.dtype),
                rngs=rngs,
            )
            for _ in range(stage.blocks)
        )

    def __call__(
        self, x: Float[Array, "B H W C"], emb: Float[Array, "B E"], text: Text | None, key: jax.Array | None
    ) -> Float[Array, "B H W C"]:
        del text
        call = call_block(self.placement, self.remat, self.saved)
        keys = split_key(key, len(self.blocks))
        for block, scale_shift, block_key in zip(self.blocks, self.modulations(emb), keys, strict=True):
            x = call(block, x, scale_shift, block_key)
        return x


class TransformerStage(nnx.Module):
    """A learned position embedding, then transformer blocks whose parameters are stacked and scanned."""

    def __init__(
        self,
        stage: Stage,
        settings: UViTSettings,
        *,
        side: int,
        text_width: int | None,
        placement: Placement,
        rngs: nnx.Rngs,
    ):
        """side: height and width of the feature map."""
        self.num_blocks, self.unroll = stage.blocks, settings.unroll
        self.remat: Remat = settings.remat
        self.saved, self.placement = settings.saved, placement
        hidden = settings.mlp_factor * stage.width
        self.modulations = Modulations(stage.blocks, hidden, settings, placement=placement, rngs=rngs)
        self.position = nnx.Param(0.01 * jax.random.normal(rngs.params(), (side * side, stage.width)))

        @nnx.split_rngs(splits=stage.blocks)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked_blocks(rngs: nnx.Rngs) -> TransformerBlock:
            return TransformerBlock(
                stage.width,
                hidden=hidden,
                head_width=settings.head_width,
                text_width=text_width,
                attend=placement.attend,
                head_norm=placement.head_norm,
                dropout=stage.dropout,
                dtype=jnp.dtype(settings.dtype),
                rngs=rngs,
            )

        self.blocks = stacked_blocks(rngs)

    def __call__(
        self, x: Float[Array, "B H W C"], emb: Float[Array, "B E"], text: Text | None, key: jax.Array | None
    ) -> Float[Array, "B H W C"]:
        side = x.shape[1]
        keys = None if key is None else jax.random.split(key, self.num_blocks)
        call = call_block(self.placement, self.remat, self.saved)

        @nnx.scan(in_axes=(nnx.Carry, 0, 0, 0), out_axes=nnx.Carry, unroll=self.unroll)
        def run(
            x: Float[Array, "B L C"],
            block: TransformerBlock,
            scale_shift: Float[Array, "B M"],
            key: jax.Array | None,
        ) -> Float[Array, "B L C"]:
            return call(block, x, scale_shift, text, key)

        x = rearrange(x, "b h w c -> b (h w) c") + self.position[...].astype(x.dtype)
        x = self.placement.constrain(x)
        return rearrange(run(x, self.blocks, self.modulations(emb), keys), "b (h w) c -> b h w c", h=side)


class UViT(nnx.Module):
    """(z_t, log-SNR, cond, dropout key) -> v_hat, in float32 whatever precision the layers compute in."""

    def __init__(
        self,
        settings: UViTSettings,
        shape: tuple[int, ...],
        *,
        condition: Condition,
        takes_end: bool,
        placement: Placement,
        rngs: nnx.Rngs,
    ):
        """shape: (resolution, resolution, channels) of an image."""
        dtype = jnp.dtype(settings.dtype)
        resolution, channels = shape[0] // settings.patch, shape[-1] * settings.patch**2
        text_width = condition.width if isinstance(condition, Captions) else None
        stages, widths = settings.stages, settings.widths

        def make_stage(level: int) -> nnx.Module:
            if stages[level].kind == "resnet":
                return ResNetStage(stages[level], settings, placement=placement, rngs=rngs)
            side = resolution >> level
            return TransformerStage(
                stages[level],
                settings,
                side=side,
                text_width=text_width,
                placement=placement,
                rngs=rngs,
            )

        def project(c_in: int, c_out: int) -> nnx.Linear:
            return nnx.Linear(c_in, c_out, dtype=dtype, rngs=rngs)

        self.skips = tuple(stage.kind == "resnet" for stage in stages[:-1])
        self.conditioning = Conditioning(
            width=settings.embedding_width,
            condition=condition,
            scale=settings.noise_scale,
            takes_end=takes_end,
            rngs=rngs,
        )
        if text_width is not None:
            self.norm_text = nnx.LayerNorm(text_width, dtype=dtype, rngs=rngs)
        self.conv_in = nnx.Conv(channels, widths[0], (3, 3), dtype=dtype, rngs=rngs)
        pairs = list(zip(widths, widths[1:], strict=False))
        self.down_stages = nnx.List(make_stage(level) for level in range(len(stages) - 1))
        self.down = nnx.List(project(wide, narrow) for wide, narrow in pairs)
        self.middle = make_stage(len(stages) - 1)
        self.up = nnx.List(project(below, above) for above, below in pairs)
        self.up_stages = nnx.List(make_stage(level) for level in range(len(stages) - 1))
        self.norm_out = make_norm(settings.resnet_norm, widths[0], dtype=dtype, rngs=rngs)
        self.conv_out = nnx.Conv(
            widths[0],
            channels,
            (3, 3),
            kernel_init=nnx.initializers.zeros,
            dtype=jnp.float32,
            rngs=rngs,
        )
        self.patch, self.dtype, self.constrain = settings.patch, dtype, placement.constrain

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
          cond: labels or a `Caption`, as the network's condition says.
          key: the randomness of dropout; None disables it.
          logsnr_u: the log-SNR at the end of the step, if the network takes it.
        """
        levels = len(self.down)
        keys = split_key(key, 2 * levels + 1)
        emb = self.constrain(jax.nn.swish(self.conditioning(logsnr_t, cond, logsnr_u)).astype(self.dtype))
        text = self._text(cond)
        patches = rearrange(z_t, "b (h i) (w j) c -> b h w (i j c)", i=self.patch, j=self.patch)
        h = self.constrain(self.conv_in(patches.astype(self.dtype)))
        skips = []
        for level in range(levels):
            h = self.down_stages[level](h, emb, text, keys[level])
            skips.append(h)
            h = self.constrain(_pooled(self.down[level], h))
        h = self.middle(h, emb, text, keys[levels])
        for level in reversed(range(levels)):
            h = self.constrain(doubled(self.up[level](h)))
            if self.skips[level]:
                # Both terms have unit variance at initialisation, and so does their sum over sqrt 2.
                h = (h + skips[level]) * 0.5**0.5
            h = self.up_stages[level](h, emb, text, keys[2 * levels - level])
        h = jax.nn.swish(self.norm_out(h))
        patches = self.conv_out(h.astype(jnp.float32))
        return rearrange(patches, "b h w (i j c) -> b (h i) (w j) c", i=self.patch, j=self.patch)

    def _text(self, cond: Cond) -> Text | None:
        """The normalised tokens of a caption; None for labels."""
        if not isinstance(cond, Caption):
            return None
        tokens = self.norm_text(jnp.asarray(cond.tokens, self.dtype))
        return Text(self.constrain(tokens), self.constrain(jnp.asarray(cond.mask)))


def _pooled(projection: nnx.Linear, x: Float[Array, "B H W C"]) -> Float[Array, "B H//2 W//2 D"]:
    """projection(average_pool_2x2(x)), as one convolution."""
    kernel = projection.kernel[...].astype(x.dtype) / 4
    taps = jnp.broadcast_to(kernel, (2, 2, *kernel.shape))
    y = jax.lax.conv_general_dilated(x, taps, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert projection.bias is not None
    return y + projection.bias[...].astype(x.dtype)
