"""A file in EDM2's layout. Its network of one level and one block compiles in a fifth of golden's time."""

import math

import numpy as np

from tests.teachers import golden, test_nvidia

# Settings of config.edm2. Only the block between encoder and decoder has attention.
SETTINGS = {"widths": (8,), "blocks": 1, "attention_levels": (False,), "head_width": 8}
_WIDTH, _EMBEDDING, _CLASSES = 8, 32, 10


def edm2(side: int) -> bytes:
    """The pickle of a network for images of side x side pixels in ten classes."""
    level = f"{side}x{side}"
    tensors = {
        "emb_fourier.freqs": (_WIDTH,),
        "emb_fourier.phases": (_WIDTH,),
        "emb_noise.weight": (_EMBEDDING, _WIDTH),
        "emb_label.weight": (_EMBEDDING, _CLASSES),
        f"enc.{level}_conv.weight": (_WIDTH, 4, 3, 3),
        **_block(f"enc.{level}_block0"),
        **_block(f"dec.{level}_in0", attention=True),
        **_block(f"dec.{level}_in1"),
        # They take the encoder's outputs as well.
        **_block(f"dec.{level}_block0", joined=2 * _WIDTH),
        **_block(f"dec.{level}_block1", joined=2 * _WIDTH),
        "out_conv.weight": (3, _WIDTH, 3, 3),
        "out_gain": (),
    }
    tree: dict = {}
    for name, shape in tensors.items():
        part = tree
        for word in f"unet.{name}".split("."):
            part = part.setdefault(word, {})
        part["values"] = golden.formula(name, shape, edm2=True).astype(np.float16)
    return test_nvidia.content(_module(tree))


def _block(name, *, joined=_WIDTH, attention=False):
    shapes = {
        "emb_gain": (),
        "conv_res0.weight": (_WIDTH, joined, 3, 3),
        "emb_linear.weight": (_WIDTH, _EMBEDDING),
        "conv_res1.weight": (_WIDTH, _WIDTH, 3, 3),
    }
    if joined != _WIDTH:
        shapes["conv_skip.weight"] = (_WIDTH, joined, 1, 1)
    if attention:
        shapes |= {"attn_qkv.weight": (3 * _WIDTH, _WIDTH, 1, 1), "attn_proj.weight": (_WIDTH, _WIDTH, 1, 1)}
    return {f"{name}.{layer}": shape for layer, shape in shapes.items()}


def _module(tree):
    parameters, modules = {}, {}
    for name, part in tree.items():
        if "values" in part:
            values = part["values"]
            strides = tuple(math.prod(values.shape[axis + 1 :]) for axis in range(values.ndim))
            storage = test_nvidia.storage(numbers=values.ravel())
            parameters[name] = test_nvidia.parameter(values.shape, strides, of=storage)
        else:
            modules[name] = _module(part)
    return test_nvidia.module(parameters, modules, num_heads=_WIDTH // SETTINGS["head_width"])
