"""Converts the tensors of published networks to the parameters of `models.adm` and `models.edm2`.

In PyTorch's layout, a convolution's weights are [out, in, height, width], a linear layer's [out, in].
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from einops import rearrange

from mcm_jax.models.adm import ADMSettings
from mcm_jax.models.edm2 import EDM2Settings
from mcm_jax.models.network import Params
from mcm_jax.models.preconditioning import Preconditioning
from mcm_jax.models.unet import BlockShape

# Levels of OpenAI's networks -> height and width of their images.
_OPENAI_RESOLUTIONS = {4: 64, 5: 128}
Tensors = Mapping[str, np.ndarray]
Numbers = Mapping[str, int | float]


class Imported(NamedTuple):
    """A network for images of 3 channels and class labels, with its parameters in float32."""

    settings: ADMSettings | EDM2Settings
    resolution: int
    num_classes: int
    params: Params


def edm2(tensors: Tensors, numbers: Numbers) -> Imported:
    """Converts the network in a pickle of EDM2; `nvidia.read` returns both arguments.

    Raises:
      KeyError: a tensor is missing.
      ValueError: there is a tensor too many.
    """
    reader, sides = _Reader(tensors), _sides(tensors, "unet.enc")
    first = [f"unet.enc.{side}x{side}_block0" for side in sides]
    settings = EDM2Settings(
        widths=tuple(len(tensors[f"{name}.conv_res0.weight"]) for name in first),
        blocks=sum(f"unet.enc.{sides[0]}x{sides[0]}_block{i}.emb_gain" in tensors for i in range(99)),
        attention_levels=tuple(f"{name}.attn_qkv.weight" in tensors for name in first),
        head_width=_head_width(tensors, numbers, "unet.dec.{0}x{0}_in0".format(sides[-1]), "attn_proj"),
    )

    def block(shape: BlockShape) -> Params:
        name = f"unet.{shape.part}.{sides[shape.level]}x{sides[shape.level]}_{shape.name}"
        params: Params = {
            "conv_0": reader.weights(f"{name}.conv_res0"),
            "emb_gain": reader.tensor(f"{name}.emb_gain"),
            "emb": reader.weights(f"{name}.emb_linear"),
            "conv_1": reader.weights(f"{name}.conv_res1"),
        }
        if shape.c_joined != shape.c_out:
            params["skip"] = reader.weights(f"{name}.conv_skip")
        if shape.attention:
            qkv, proj = (reader.kernel(f"{name}.{layer}") for layer in ("attn_qkv", "attn_proj"))
            heads = settings.num_heads(shape.c_out)
            params["attention"] = {"qkv": {"kernel": _NVIDIA_QKV(qkv, heads)}, "proj": {"kernel": proj}}
        return params

    params = {
        "frequencies": reader.tensor("unet.emb_fourier.freqs"),
        "phases": reader.tensor("unet.emb_fourier.phases"),
        "noise": reader.weights("unet.emb_noise"),
        "labels": reader.weights("unet.emb_label"),
        "conv_in": reader.weights(f"unet.enc.{sides[0]}x{sides[0]}_conv"),
        "encoder": {i: block(shape) for i, shape in enumerate(settings.encoder)},
        "decoder": {i: block(shape) for i, shape in enumerate(settings.decoder)},
        "conv_out": reader.weights("unet.out_conv"),
        "out_gain": reader.tensor("unet.out_gain"),
    }
    # The weight of its own training loss, which is not used here.
    reader.check_unread(ignored=("logvar_fourier.", "logvar_linear."))
    return Imported(settings, sides[0], len(params["labels"]["kernel"]), params)


def edm(tensors: Tensors, numbers: Numbers) -> Imported:
    """Converts the ADM network in a pickle of EDM; arguments and errors as in `edm2`."""
    sides = _sides(tensors, "model.enc")
    first = [f"model.enc.{side}x{side}_block0" for side in sides]
    deepest = "model.dec.{0}x{0}_in0".format(sides[-1])
    settings = ADMSettings(
        widths=tuple(len(tensors[f"{name}.conv0.weight"]) for name in first),
        blocks=sum(f"model.enc.{sides[0]}x{sides[0]}_block{i}.conv0.weight" in tensors for i in range(99)),
        attention_levels=tuple(f"{name}.qkv.weight" in tensors for name in first),
        head_width=_head_width(tensors, numbers, deepest, "proj"),
        preconditioning="edm",
    )

    def block_name(shape: BlockShape) -> tuple[str, str]:
        name = f"model.{shape.part}.{sides[shape.level]}x{sides[shape.level]}_{shape.name}"
        return name, name

    return _adm(
        tensors,
        settings,
        _Names(
            block_name=block_name,
            block=("norm0", "conv0", "affine", "norm1", "conv1", "skip"),
            attention=("norm2", "qkv", "proj"),
            outside=(
                "model.map_layer0",
                "model.map_layer1",
                f"model.enc.{sides[0]}x{sides[0]}_conv",
                "model.out_norm",
                "model.out_conv",
            ),
        ),
        resolution=sides[0],
        labels=lambda reader: reader.kernel("model.map_label"),
        qkv=_NVIDIA_QKV,
        ignored=(".resample_filter",),
    )


def openai(
    tensors: Tensors, settings: ADMSettings | None = None, *, preconditioning: Preconditioning
) -> Imported:
    """Converts a network of openai/guided-diffusion or openai/consistency_models; errors as in `edm2`.

    Args:
      settings: its sizes, if its heads and groups are not those of the published networks; None: as the
        shapes say.
    """
    settings = settings or openai_settings(tensors, preconditioning)
    names = {}
    for i, shape in enumerate(settings.encoder):
        names[shape] = (f"input_blocks.{i + 1}.0", f"input_blocks.{i + 1}.1")
    i, attends = -1, False
    for shape in settings.decoder:
        if shape.name == "in0":
            name, attention = "middle_block.0", "middle_block.1"
        elif shape.name == "in1":
            name, attention = "middle_block.2", ""
        elif shape.name == "up":  # The last module of the block before.
            name, attention = f"output_blocks.{i}.{2 if attends else 1}", ""
        else:
            i, attends = i + 1, shape.attention
            name, attention = f"output_blocks.{i}.0", f"output_blocks.{i}.1"
        names[shape] = (name, attention)
    return _adm(
        tensors,
        settings,
        _Names(
            block_name=names.__getitem__,
            block=(
                "in_layers.0",
                "in_layers.2",
                "emb_layers.1",
                "out_layers.0",
                "out_layers.3",
                "skip_connection",
            ),
            attention=("norm", "qkv", "proj_out"),
            outside=("time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2"),
        ),
        resolution=_OPENAI_RESOLUTIONS[len(settings.widths)],
        labels=lambda reader: reader.tensor("label_emb.weight"),
        qkv=_LEGACY_QKV if settings.heads else _OPENAI_QKV,
    )


def diffusers(tensors: Tensors, settings: ADMSettings | None = None) -> Imported:
    """Converts a consistency model in the form of the library diffusers; see `openai`."""
    levels = sum(name.startswith("down_blocks.") and ".resnets.0.conv1.weight" in name for name in tensors)
    if levels not in _OPENAI_RESOLUTIONS:
        raise ValueError(f"{levels} levels; the published networks for 64x64 have 4")
    settings = settings or ADMSettings(
        widths=tuple(len(tensors[f"down_blocks.{level}.resnets.0.conv1.weight"]) for level in range(levels)),
        blocks=sum(f"down_blocks.0.resnets.{i}.conv1.weight" in tensors for i in range(99)),
        attention_levels=tuple(
            f"down_blocks.{level}.attentions.0.to_q.weight" in tensors for level in range(levels)
        ),
        preconditioning="consistency",
    )

    def block_name(shape: BlockShape) -> tuple[str, str]:
        if shape.name in ("in0", "in1"):
            return f"mid_block.resnets.{shape.name[2:]}", "mid_block.attentions.0"
        if shape.name == "down":  # The last module of the level above.
            return f"down_blocks.{shape.level - 1}.downsamplers.0", ""
        # Levels of the decoder count from the deepest.
        if shape.name == "up":
            return f"up_blocks.{levels - 2 - shape.level}.upsamplers.0", ""
        within = (
            f"down_blocks.{shape.level}" if shape.part == "enc" else f"up_blocks.{levels - 1 - shape.level}"
        )
        number = shape.name.removeprefix("block")
        return f"{within}.resnets.{number}", f"{within}.attentions.{number}"

    joined = dict(tensors)
    for name in tensors:
        attention, _, kind = name.partition(".to_q.")
        if kind:
            parts = [joined.pop(f"{attention}.to_{part}.{kind}") for part in "qkv"]
            joined[f"{attention}.qkv.{kind}"] = np.concatenate(parts)
    return _adm(
        joined,
        settings,
        _Names(
            block_name=block_name,
            block=("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut"),
            attention=("group_norm", "qkv", "to_out.0"),
            outside=(
                "time_embedding.linear_1",
                "time_embedding.linear_2",
                "conv_in",
                "conv_norm_out",
                "conv_out",
            ),
        ),
        resolution=_OPENAI_RESOLUTIONS[levels],
        labels=lambda reader: reader.tensor("class_embedding.weight"),
        qkv=_OPENAI_QKV,
    )


def openai_settings(tensors: Tensors, preconditioning: Preconditioning) -> ADMSettings:
    """The sizes of a published network, from the names and shapes of its tensors; raises KeyError."""
    levels = 1 + sum(name.endswith(".in_layers.2.weight") for name in tensors if _is_up(name))
    if levels not in _OPENAI_RESOLUTIONS:
        raise ValueError(f"{levels} levels; the published networks for 64x64 and 128x128 have 4 and 5")
    per_level = len({name.split(".")[1] for name in tensors if name.startswith("input_blocks.")}) // levels
    # The first block of each level follows the convolution or the block that halves the resolution.
    first = [1 + per_level * level for level in range(levels)]
    widths = tuple(len(tensors[f"input_blocks.{i}.0.in_layers.2.weight"]) for i in first)
    settings = ADMSettings(
        widths=widths,
        blocks=per_level - 1,
        attention_levels=tuple(f"input_blocks.{i}.1.qkv.weight" in tensors for i in first),
        preconditioning=preconditioning,
    )
    # The network for 128x128 has five levels, and four heads at all of them.
    return dataclasses.replace(settings, heads=4) if preconditioning == "eps_linear" else settings


def _is_up(name: str) -> bool:
    parts = name.split(".")
    return parts[0] == "output_blocks" and parts[2] in ("1", "2")


class _Reader:
    """Reads tensors as float32 in this project's layout; KeyError if there is none of that name."""

    def __init__(self, tensors: Tensors):
        self._tensors, self._unread = tensors, set(tensors)

    def tensor(self, name: str) -> np.ndarray:
        """The tensor as it is."""
        self._unread.discard(name)
        return self._tensors[name].astype(np.float32, copy=False)

    def kernel(self, name: str) -> np.ndarray:
        """The weights of a linear layer or a convolution, with the output last; of a 1x1 one [in, out]."""
        weight = self.tensor(f"{name}.weight")
        if set(weight.shape[2:]) == {1}:
            weight = weight.reshape(weight.shape[:2])
        return np.moveaxis(weight, (0, 1), (-1, -2))

    def weights(self, name: str) -> Params:
        """A layer without biases."""
        return {"kernel": self.kernel(name)}

    def layer(self, name: str) -> Params:
        """A linear layer or a convolution."""
        return {"kernel": self.kernel(name), "bias": self.tensor(f"{name}.bias")}

    def norm(self, name: str) -> Params:
        """A norm."""
        return {"scale": self.tensor(f"{name}.weight"), "bias": self.tensor(f"{name}.bias")}

    def check_unread(self, ignored: Sequence[str]) -> None:
        """Raises ValueError if tensors were not read, except those whose names contain any of `ignored`."""
        unread = [name for name in sorted(self._unread) if not any(part in name for part in ignored)]
        if unread:
            raise ValueError(f"unknown tensors: {', '.join(unread[:3])}")


@dataclasses.dataclass(frozen=True)
class _Names:
    """How a file names the layers of an ADM network.

    Attributes:
      block_name: block -> its name, and that of its attention.
      block: a block's layers, in the order norm_0, conv_0, affine, norm_1, conv_1, skip.
      attention: norm, qkv, proj.
      outside: dense_1, dense_2, conv_in, norm_out, conv_out.
    """

    block_name: Callable[[BlockShape], tuple[str, str]]
    block: tuple[str, str, str, str, str, str]
    attention: tuple[str, str, str]
    outside: tuple[str, str, str, str, str]


def _adm(
    tensors: Tensors,
    settings: ADMSettings,
    names: _Names,
    *,
    resolution: int,
    labels: Callable[[_Reader], np.ndarray],
    qkv: "_Reorder",
    ignored: Sequence[str] = (),
) -> Imported:
    reader = _Reader(tensors)

    def block(shape: BlockShape) -> Params:
        name, attention_name = names.block_name(shape)
        norm_0, conv_0, affine, norm_1, conv_1, skip = (f"{name}.{layer}" for layer in names.block)
        params: Params = {
            "norm_0": reader.norm(norm_0),
            "conv_0": reader.layer(conv_0),
            "affine": reader.layer(affine),
            "norm_1": reader.norm(norm_1),
            "conv_1": reader.layer(conv_1),
        }
        if shape.c_joined != shape.c_out:
            params["skip"] = reader.layer(skip)
        if shape.attention:
            norm, qkv_name, proj = (f"{attention_name}.{layer}" for layer in names.attention)
            heads = settings.num_heads(shape.c_out)
            reordered = {key: qkv(value, heads) for key, value in reader.layer(qkv_name).items()}
            params["attention"] = {"norm": reader.norm(norm), "qkv": reordered, "proj": reader.layer(proj)}
        return params

    dense_1, dense_2, conv_in, norm_out, conv_out = names.outside
    params = {
        "dense_1": reader.layer(dense_1),
        "dense_2": reader.layer(dense_2),
        "labels": labels(reader),
        "conv_in": reader.layer(conv_in),
        "encoder": {i: block(shape) for i, shape in enumerate(settings.encoder)},
        "decoder": {i: block(shape) for i, shape in enumerate(settings.decoder)},
        "norm_out": reader.norm(norm_out),
        "conv_out": reader.layer(conv_out),
    }
    reader.check_unread(ignored)
    return Imported(settings, resolution, len(params["labels"]), params)


# (weights or biases with the channels of q, k and v last, heads) -> the same, ordered (qkv, head, channel)
_Reorder = Callable[[np.ndarray, int], np.ndarray]


def _reorder(theirs: str) -> _Reorder:
    def reorder(values: np.ndarray, heads: int) -> np.ndarray:
        return rearrange(values, f"... ({theirs}) -> ... (n heads d)", n=3, heads=heads)

    return reorder


_NVIDIA_QKV, _OPENAI_QKV, _LEGACY_QKV = (_reorder(order) for order in ("heads d n", "n heads d", "heads n d"))


def _sides(tensors: Tensors, part: str) -> list[int]:
    """The sides of all levels, descending, from names such as "unet.enc.64x64_block0.emb_gain"."""
    names = {name.removeprefix(f"{part}.").split("x")[0] for name in tensors if name.startswith(f"{part}.")}
    return sorted(map(int, names), reverse=True)


def _head_width(tensors: Tensors, numbers: Numbers, block: str, proj: str) -> int:
    return len(tensors[f"{block}.{proj}.weight"]) // int(numbers[f"{block}.num_heads"])
