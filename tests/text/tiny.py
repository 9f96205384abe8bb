"""Writes tiny encoders with random weights, in the files of Hugging Face's transformers."""

import functools
import io
import json

import numpy as np
import safetensors.numpy
import sentencepiece
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

# Norms of these sizes would not notice an epsilon of 1e-6.
BERT = {
    "model_type": "bert",
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 0.3,
}
# Its heads together are not as wide as its tokens.
T5 = {
    "model_type": "t5",
    "vocab_size": 64,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 20,
    "num_layers": 2,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 0.3,
}
CLIP = {
    "model_type": "clip_text_model",
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
    "projection_dim": 6,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 0.3,
}
GELU_CLIP = {**CLIP, "hidden_act": "gelu"}
WHOLE_CLIP = {
    "model_type": "clip",
    "projection_dim": 6,
    "text_config": CLIP,
    "vision_config": {
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 8,
        "patch_size": 4,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 0.3,
    },
}
CONFIGS = {"bert": BERT, "t5": T5, "quick_gelu CLIP": CLIP, "gelu CLIP": GELU_CLIP}

WORDS = "a b c d e f g h i j k l m n o p q r s t u".split()


def bert_shapes(config):
    width, hidden = config["hidden_size"], config["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], width),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
        "pooler.dense.weight": (width, width),
    }
    for n in range(config["num_hidden_layers"]):
        block = f"encoder.layer.{n}."
        for name in ("attention.self.query", "attention.self.key", "attention.self.value"):
            shapes |= {f"{block}{name}.weight": (width, width), f"{block}{name}.bias": (width,)}
        shapes |= {f"{block}attention.output.dense.weight": (width, width)}
        shapes |= {f"{block}intermediate.dense.weight": (hidden, width)}
        shapes |= {f"{block}intermediate.dense.bias": (hidden,)}
        shapes |= {f"{block}output.dense.weight": (width, hidden)}
        for name in ("attention.output.dense.bias", "output.dense.bias"):
            shapes[block + name] = (width,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{block}{name}.weight": (width,), f"{block}{name}.bias": (width,)}
    return shapes


def t5_shapes(config):
    width, hidden = config["d_model"], config["d_ff"]
    inner = config["num_heads"] * config["d_kv"]
    first = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    shapes = {
        "shared.weight": (config["vocab_size"], width),
        first: (config["relative_attention_num_buckets"], config["num_heads"]),
        "encoder.final_layer_norm.weight": (width,),
        "decoder.final_layer_norm.weight": (width,),
    }
    for n in range(config["num_layers"]):
        block = f"encoder.block.{n}.layer."
        shapes |= {f"{block}0.SelfAttention.{name}.weight": (inner, width) for name in "qkv"}
        shapes[f"{block}0.SelfAttention.o.weight"] = (width, inner)
        shapes |= {f"{block}1.DenseReluDense.{name}.weight": (hidden, width) for name in ("wi_0", "wi_1")}
        shapes[f"{block}1.DenseReluDense.wo.weight"] = (width, hidden)
        shapes |= {f"{block}{layer}.layer_norm.weight": (width,) for layer in range(2)}
    return shapes


def clip_shapes(config):
    width, hidden = config["hidden_size"], config["intermediate_size"]
    shapes = {
        "text_model.embeddings.token_embedding.weight": (config["vocab_size"], width),
        "text_model.embeddings.position_embedding.weight": (config["max_position_embeddings"], width),
        "text_model.final_layer_norm.weight": (width,),
        "text_model.final_layer_norm.bias": (width,),
        "text_projection.weight": (config["projection_dim"], width),
        "vision_model.post_layernorm.weight": (7,),
    }
    for n in range(config["num_hidden_layers"]):
        block = f"text_model.encoder.layers.{n}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {
                f"{block}self_attn.{name}.weight": (width, width),
                f"{block}self_attn.{name}.bias": (width,),
            }
        shapes |= {f"{block}mlp.fc1.weight": (hidden, width), f"{block}mlp.fc1.bias": (hidden,)}
        shapes |= {f"{block}mlp.fc2.weight": (width, hidden), f"{block}mlp.fc2.bias": (width,)}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{block}{name}.weight": (width,), f"{block}{name}.bias": (width,)}
    return shapes


def whole_clip_shapes(config):
    vision = config["vision_config"]
    width, side = vision["hidden_size"], vision["patch_size"]
    blocks = {**CLIP, **vision, "projection_dim": config["projection_dim"]}
    shapes = {
        name.replace("text_model", "vision_model"): shape
        for name, shape in clip_shapes(blocks).items()
        if ".layers." in name
    }
    norms = [
        f"vision_model.{norm}.{kind}"
        for norm in ("pre_layrnorm", "post_layernorm")
        for kind in ("weight", "bias")
    ]
    embeddings = "vision_model.embeddings."
    return {
        **clip_shapes({**config["text_config"], "projection_dim": config["projection_dim"]}),
        **shapes,
        **dict.fromkeys(norms, (width,)),
        f"{embeddings}class_embedding": (width,),
        f"{embeddings}patch_embedding.weight": (width, 3, side, side),
        f"{embeddings}position_embedding.weight": ((vision["image_size"] // side) ** 2 + 1, width),
        "visual_projection.weight": (config["projection_dim"], width),
    }


SHAPES = {"bert": bert_shapes, "t5": t5_shapes, "clip": whole_clip_shapes, "clip_text_model": clip_shapes}


def tensors(config, seed=0):
    """Random weights with which every layer matters."""
    draw = np.random.default_rng(seed)

    def one(name, shape):
        if "norm" in name.lower() and name.endswith("weight"):
            return draw.uniform(0.5, 1.5, shape)
        if len(shape) == 1 or "embedding" in name or name == "shared.weight" or "relative" in name:
            return draw.normal(size=shape)
        return draw.normal(size=shape) / np.sqrt(shape[1])

    shapes = SHAPES[config["model_type"]](config)
    return {name: one(name, shape).astype(np.float32) for name, shape in shapes.items()}


@functools.cache
def word_tokenizer(first, last, count=24):
    """The tokenizer.json of one token a word, between special tokens (`first` may be none)."""
    special = ["[PAD]", "[UNK]", *([first] if first else []), last]
    words = [*special, *WORDS, *(f"w{n}" for n in range(count))][:count]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special)
    template = f"{first} $A {last}" if first else f"$A {last}"
    ids = [(word, words.index(word)) for word in special[2:]]
    tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=ids)
    # As in published files: to be replaced by the encoder's own.
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=7)
    return tokenizer.to_str().encode()


@functools.cache
def spiece(count=48):
    """A spiece.model with T5's special tokens: padding, end, unknown."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["".join(WORDS), *(f"{word} cat red {word}" for word in WORDS)] * 20),
        model_writer=file,
        vocab_size=count,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return file.getvalue()


def tokenizer_file(config):
    if config["model_type"] == "t5":
        return {"spiece.model": spiece()}
    special = ("[CLS]", "[SEP]") if config["model_type"] == "bert" else ("<start>", "<end>")
    return {"tokenizer.json": word_tokenizer(*special)}


def files(config, seed=0):
    """All files of an encoder, by name."""
    weights = safetensors.numpy.save(tensors(config, seed), {"format": "pt"})
    return {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": weights,
        **tokenizer_file(config),
    }


def write(directory, config, changed=(), seed=0):
    """Writes an encoder; `changed`: other content by the file's name, None to leave it out."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in (files(config, seed) | dict(changed)).items():
        if content is not None:
            (directory / name).write_bytes(content)
    return directory
