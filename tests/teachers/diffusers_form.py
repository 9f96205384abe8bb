"""Renames the tensors of OpenAI's consistency models to those of the library diffusers.

tests/parity/test_diffusers.py loads the result into that library's network.
"""

import numpy as np

_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def of(tensors: dict[str, np.ndarray], *, blocks: int) -> dict[str, np.ndarray]:
    """The tensors by diffusers' names; its attention has linear layers for queries, keys and values.

    Args:
      blocks: blocks of each level of the encoder.
    """
    result = {}
    for name, value in tensors.items():
        layer, _, kind = name.rpartition(".")
        if layer in _OUTSIDE:
            result[f"{_OUTSIDE[layer]}.{kind}"] = value
            continue
        part, index, inside = layer.split(".", 2)
        module = 0
        if part != "middle_block":
            module, _, inside = inside.partition(".")
        block, is_attention = _block(part, int(index), int(module), inside, blocks=blocks)
        if not is_attention:
            result[f"{block}.{_BLOCK[inside]}.{kind}"] = value
        elif inside == "norm":
            result[f"{block}.group_norm.{kind}"] = value
        else:
            matrix = value.reshape(value.shape[:2]) if kind == "weight" else value
            names = ["to_out.0"] if inside == "proj_out" else ["to_q", "to_k", "to_v"]
            for name, values in zip(names, np.split(matrix, len(names)), strict=True):
                result[f"{block}.{name}.{kind}"] = values
    return result


def _block(part: str, index: int, module: int, inside: str, *, blocks: int) -> tuple[str, bool]:
    """(the name of a block or of its attention, whether it is attention)."""
    is_attention = inside in ("norm", "qkv", "proj_out")
    if part == "middle_block":
        return ("mid_block.attentions.0" if index == 1 else f"mid_block.resnets.{index // 2}"), is_attention
    if part == "input_blocks":  # The first is the convolution.
        level, number = divmod(index - 1, blocks + 1)
        place = f"down_blocks.{level}"
        if number == blocks:
            return f"{place}.downsamplers.0", False
    else:
        level, number = divmod(index, blocks + 1)
        place = f"up_blocks.{level}"
        if module > 0 and not is_attention:
            return f"{place}.upsamplers.0", False
    return f"{place}.{'attentions' if is_attention else 'resnets'}.{number}", is_attention
