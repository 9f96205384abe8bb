"""The UViT of SPEC 6 in PyTorch: the yardstick of benchmarks, and an independent check of ours.

Written from SPEC 6 in PyTorch's idiom, in the forms that PyTorch runs fastest: images are channels_last and
attention is one fused call. Parameters are float32; every layer rounds them to the dtype of its input, as
ours does.
"""

import copy
import math
from collections.abc import Mapping

import jax
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcm_jax.models.network import Network, Params
from mcm_jax.models.uvit import Stage, UViTSettings

# flax.nnx's default; PyTorch's is 1e-5.
NORM_EPSILON = 1e-6


def rounded(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(x.dtype)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, rounded(self.weight, x), rounded(self.bias, x))


class Conv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, rounded(self.weight, x), rounded(self.bias, x), padding=self.padding)


class LayerNorm(nn.LayerNorm):
    """Computes in float32 and returns the dtype of x, as do all of PyTorch's norms."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = rounded(self.weight, x), rounded(self.bias, x)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class ChannelNorm(LayerNorm):
    """Layer norm over the channels of NCHW; no copy where the memory is channels_last."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, rounded(self.weight, x), rounded(self.bias, x), self.eps)


def make_norm(width: int, settings: UViTSettings) -> nn.Module:
    """Over the channels of NCHW."""
    if settings.resnet_norm == "layer":
        return ChannelNorm(width, NORM_EPSILON)
    return GroupNorm(min(32, width // 4), width, NORM_EPSILON)


class ResNetBlock(nn.Module):
    def __init__(self, stage: Stage, settings: UViTSettings):
        super().__init__()
        width = stage.width
        self.norm_1 = make_norm(width, settings)
        self.conv_1 = Conv(width, width, 3, padding=1)
        self.norm_2 = make_norm(width, settings)
        self.dropout = nn.Dropout(stage.dropout)
        self.conv_2 = Conv(width, width, 3, padding=1)

    def forward(self, x: Tensor, scale_shift: Tensor) -> Tensor:
        h = self.conv_1(F.silu(self.norm_1(x)))
        scale, shift = scale_shift[:, :, None, None].chunk(2, dim=1)
        h = self.norm_2(h) * (1 + scale) + shift
        return x + self.conv_2(self.dropout(F.silu(h)))


class SelfAttention(nn.Module):
    def __init__(self, width: int, settings: UViTSettings):
        super().__init__()
        self.head_width = settings.head_width
        self.qkv = Linear(width, 3 * width, bias=False)
        self.norm_q = LayerNorm(settings.head_width, NORM_EPSILON)
        self.norm_k = LayerNorm(settings.head_width, NORM_EPSILON)
        self.out = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_width)).unbind(2)
        q, k = self.norm_q(q), self.norm_k(k)
        h = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.out(h.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    def __init__(self, stage: Stage, settings: UViTSettings):
        super().__init__()
        width, hidden = stage.width, settings.mlp_factor * stage.width
        self.norm_mlp = LayerNorm(width, NORM_EPSILON, bias=False)
        self.mlp_in = Linear(width, hidden)
        self.dropout = nn.Dropout(stage.dropout)
        self.mlp_out = Linear(hidden, width)
        self.norm_attention = LayerNorm(width, NORM_EPSILON, bias=False)
        self.attention = SelfAttention(width, settings)

    def forward(self, x: Tensor, scale_shift: Tensor) -> Tensor:
        h = F.silu(self.mlp_in(self.norm_mlp(x)))
        scale, shift = scale_shift[:, None].chunk(2, dim=-1)
        x = x + self.mlp_out(self.dropout(h * (1 + scale) + shift))
        return x + self.attention(self.norm_attention(x))


class Modulations(nn.Module):
    """emb -> scale and shift of every block of a stage."""

    def __init__(self, blocks: int, channels: int, settings: UViTSettings):
        super().__init__()
        self.blocks = blocks
        self.columns = Linear(settings.embedding_width, blocks * 2 * channels)

    def forward(self, emb: Tensor) -> tuple[Tensor, ...]:
        return self.columns(emb).unflatten(1, (self.blocks, -1)).unbind(1)


class ResNetStage(nn.Module):
    def __init__(self, stage: Stage, settings: UViTSettings):
        super().__init__()
        self.modulations = Modulations(stage.blocks, stage.width, settings)
        self.blocks = nn.ModuleList(ResNetBlock(stage, settings) for _ in range(stage.blocks))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for block, scale_shift in zip(self.blocks, self.modulations(emb), strict=True):
            x = block(x, scale_shift)
        return x


class TransformerStage(nn.Module):
    def __init__(self, stage: Stage, settings: UViTSettings, side: int):
        super().__init__()
        self.modulations = Modulations(stage.blocks, settings.mlp_factor * stage.width, settings)
        self.position = nn.Parameter(torch.zeros(side * side, stage.width))
        blocks = (TransformerBlock(stage, settings) for _ in range(stage.blocks))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        batch, width, height, _ = x.shape
        x = x.permute(0, 2, 3, 1).reshape(batch, -1, width) + self.position.to(x.dtype)
        for block, scale_shift in zip(self.blocks, self.modulations(emb), strict=True):
            x = block(x, scale_shift)
        return x.unflatten(1, (height, -1)).permute(0, 3, 1, 2)


class Conditioning(nn.Module):
    def __init__(self, network: Network):
        settings = network.settings
        super().__init__()
        self.scale = settings.noise_scale
        self.dense_1 = Linear(settings.embedding_width, settings.embedding_width)
        self.dense_2 = Linear(settings.embedding_width, settings.embedding_width)
        self.classes = nn.Embedding(network.condition.num_classes + 1, settings.embedding_width)

    def forward(self, logsnr: Tensor, label: Tensor) -> Tensor:
        if self.scale == "logsnr":
            position = 1000 * (15 - logsnr) / 30
        else:
            turns = {"arctan": 1000, "smooth": 10}[self.scale]
            position = turns * 2 / math.pi * torch.arctan(torch.exp(-logsnr / 2))
        half = self.dense_1.in_features // 2
        frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half, device=logsnr.device) / half)
        angles = position[:, None] * frequencies
        h = torch.cat([angles.sin(), angles.cos()], dim=1)
        return self.dense_2(F.silu(self.dense_1(h))) + self.classes(label)


class UViT(nn.Module):
    """(z_t [B, C, H, W], log-SNR [B], label [B]) -> v_hat [B, C, H, W]."""

    def __init__(self, network: Network):
        settings = network.settings
        super().__init__()
        *outer, middle = settings.stages
        widths = [stage.width for stage in settings.stages]

        def make_stage(stage: Stage, level: int) -> nn.Module:
            if stage.kind == "resnet":
                return ResNetStage(stage, settings)
            return TransformerStage(stage, settings, network.shape[0] // 2**level)

        def make_stages() -> nn.ModuleList:
            return nn.ModuleList(make_stage(stage, level) for level, stage in enumerate(outer))

        self.has_skip = [stage.kind == "resnet" for stage in outer]
        self.conditioning = Conditioning(network)
        self.conv_in = Conv(network.shape[-1], widths[0], 3, padding=1)
        self.down_stages = make_stages()
        self.down = nn.ModuleList(Conv(widths[i], widths[i + 1], 1) for i in range(len(outer)))
        self.middle = make_stage(middle, len(outer))
        self.up = nn.ModuleList(Conv(widths[i + 1], widths[i], 1) for i in range(len(outer)))
        self.up_stages = make_stages()
        self.norm_out = make_norm(widths[0], settings)
        self.dtype = getattr(torch, settings.dtype)
        self.conv_out = Conv(widths[0], network.shape[-1], 3, padding=1)

    def forward(self, z_t: Tensor, logsnr_t: Tensor, label: Tensor) -> Tensor:
        emb = F.silu(self.conditioning(logsnr_t, label)).to(self.dtype)
        h, skips = self.conv_in(z_t.to(self.dtype)), []
        for stage, down in zip(self.down_stages, self.down, strict=True):
            skips.append(stage(h, emb))
            h = down(F.avg_pool2d(skips[-1], 2))
        h = self.middle(h, emb)
        for level in reversed(range(len(skips))):
            h = F.interpolate(self.up[level](h), scale_factor=2, mode="nearest")
            if self.has_skip[level]:
                h = (h + skips[level]) / math.sqrt(2)
            h = self.up_stages[level](h, emb)
        return self.conv_out(F.silu(self.norm_out(h)).float())


def rounded_copy(model: UViT) -> UViT:
    """A copy whose layers have their parameters in the network's dtype, and need not round them."""
    result = copy.deepcopy(model)
    for name, module in result.named_children():
        if name not in ("conditioning", "conv_out"):
            module.to(model.dtype)
    return result


def random_params(network: Network, seed: int = 0) -> Params:
    """Our parameters with noise on top: at initialisation half of the gradients are zero."""
    params = network.init(jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    moved = [a + 0.05 * jax.random.normal(key, a.shape) for a, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


def with_params(network: Network, params: Params) -> UViT:
    """PyTorch's network with our parameters."""
    model = UViT(network)
    model.load_state_dict(to_torch_layout(params, model))
    return model


def to_torch_layout(params: Params, model: nn.Module) -> dict[str, Tensor]:
    """Our parameters (or gradients) under PyTorch's names, shapes and order of axes.

    Args:
      params: stacked transformer blocks lead with their axis.
      model: the UViT that names and shapes are wanted for.

    Raises:
      ValueError: an array is missing, left over or of another size.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    arrays = {".".join(str(entry.key) for entry in path): np.asarray(leaf) for path, leaf in leaves}
    used, tensors = set(), {}
    for name, parameter in model.named_parameters():
        array, path = _find(arrays, name)
        used.add(path)
        if array.ndim == 2 and path.endswith("kernel"):
            array = array.T.reshape(parameter.shape)
        elif array.ndim == 4:
            array = array.transpose(3, 2, 0, 1)
        if array.shape != tuple(parameter.shape):
            raise ValueError(f"{path} has shape {array.shape}, not {tuple(parameter.shape)}")
        tensors[name] = torch.tensor(array)
    if left := set(arrays) - used:
        raise ValueError(f"no counterpart in PyTorch: {sorted(left)}")
    return tensors


def _find(arrays: Mapping[str, np.ndarray], name: str) -> tuple[np.ndarray, str]:
    """The array of a PyTorch parameter and its path: alone, or slice i of blocks that are stacked."""
    for leaf in ("weight", "position", "bias"):
        if not name.endswith(leaf):
            continue
        stem = name.removesuffix(leaf)
        for ours in {"weight": ("kernel", "scale", "embedding")}.get(leaf, (leaf,)):
            if (path := stem + ours) in arrays:
                return arrays[path], path
            before, separator, after = path.partition(".blocks.")
            index, _, rest = after.partition(".")
            if separator and (stacked := f"{before}.blocks.{rest}") in arrays:
                return arrays[stacked][int(index)], stacked
    raise ValueError(f"our network has no counterpart of {name}")
