"""The text encoders behind one interface: `load` one, and `encode` strings with it."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float32, Int32, PyTree

from mcm_jax.system.errors import InputError
from mcm_jax.system.paths import Path, checked_path
from mcm_jax.text import architectures, files, tokenization, weights
from mcm_jax.text.configs import Config
from mcm_jax.text.files import MINILM
from mcm_jax.text.tokenization import Tokens

DEFAULT_LENGTH = 128
# Of texts that are encoded at once; on a CPU, larger ones leave its caches.
_BATCH, _CPU_BATCH = 64, 8


class Text(NamedTuple):
    """Encoded texts; the condition of a network that draws what they say.

    Attributes:
      tokens: an embedding of each token; 0 at padding.
      mask: False at padding.
      pooled: one vector of the whole text.
    """

    tokens: Float32[np.ndarray, "B L D"]
    mask: Bool[np.ndarray, "B L"]
    pooled: Float32[np.ndarray, "B P"]


class Encoder:
    """Encodes strings with a network and its tokenizer; made by `load`.

    Attributes:
      name: the encoder's name.
      sha256: hash of everything that an embedding depends on: weights, sizes, tokenizer.
      length: L, the number of tokens of each text, padding and special tokens included.
      width: D, the size of a token's embedding.
      pooled_width: P, the size of a text's vector.
    """

    def __init__(
        self,
        settings: architectures.Settings,
        graph: Any,
        params: PyTree,
        tokenizer: tokenization.Tokenizer,
        *,
        name: str,
        sha256: str,
        length: int,
    ):
        self.name, self.sha256, self.length = name, sha256, length
        self.width, self.pooled_width = settings.width, settings.pooled_width
        self._graph, self._params, self._tokenizer = graph, params, tokenizer
        self._batch = _CPU_BATCH if jax.default_backend() == "cpu" else _BATCH

    def tokenize(self, strings: Sequence[str]) -> Tokens:
        """Splits strings into tokens; `cut` tells which of them are too long, and lose their end.

        Raises:
          InputError: a string is not valid Unicode.
        """
        return tokenization.tokenize(self._tokenizer, strings, self.length)

    def encode(self, strings: Sequence[str]) -> Text:
        """Encodes strings; an empty one has the embedding of its special tokens.

        Batches are padded to one size, so a string's embedding does not depend on the others.

        Raises:
          InputError: a string is not valid Unicode.
        """
        ids, mask, *_ = self.tokenize(strings)
        tokens = np.zeros((len(ids), self.length, self.width), np.float32)
        pooled = np.zeros((len(ids), self.pooled_width), np.float32)
        for start in range(0, len(ids), self._batch):
            rows = slice(start, start + self._batch)
            missing = self._batch - len(ids[rows])
            batch = (np.pad(array[rows], ((0, missing), (0, 0)), mode="edge") for array in (ids, mask))
            found = jax.device_get(_run(self._graph, self._params, *batch))
            count = self._batch - missing
            tokens[rows], pooled[rows] = found[0][:count], found[1][:count]
        return Text(tokens, mask, pooled)


@functools.partial(jax.jit, static_argnums=0)
def _run(
    graph: Any, params: PyTree, ids: Int32[Array, "B L"], mask: Bool[Array, "B L"]
) -> tuple[Float32[Array, "B L D"], Float32[Array, "B P"]]:
    # By default a TPU multiplies in bfloat16 and a GPU in TF32, so embeddings would depend on the machine.
    with jax.default_matmul_precision("highest"):
        tokens, pooled = nnx.merge(graph, params)(ids, mask)
    return jnp.where(mask[..., None], tokens, 0.0), pooled


def load(source: str | Path, *, length: int | None = None) -> Encoder:
    """Loads an encoder.

    Args:
      source: "minilm", which is all-MiniLM-L6-v2 from its package; or a directory, local or in a bucket,
        with config.json (model_type bert, t5, clip or clip_text_model), tokenizer.json or spiece.model, and
        model.safetensors or several of them with model.safetensors.index.json.
      length: the number of tokens of each text; by default 128, or as many as the network takes (CLIP: 77).

    Raises:
      InputError: a file is missing, damaged or of another network, or the network takes no such length.

    Examples:
      >>> encoder = load("minilm", length=16)
      >>> tokens, mask, pooled = encoder.encode(["a red cat", "a scarlet kitten", "the stock market"])
      >>> tokens.shape, mask.sum(axis=1), pooled.shape
      ((3, 16, 384), array([5, 5, 5]), (3, 384))
      >>> bool(pooled[0] @ pooled[1] > 0.5 > 0.2 > pooled[0] @ pooled[2])
      True
    """
    found = files.minilm() if source == MINILM else files.Directory(checked_path(source, "text encoder"))
    if files.CONFIG not in found.names():
        command = files.get(found, architectures.ClipSettings.DOWNLOAD)
        raise InputError(
            f"{found.where} has no {files.CONFIG}, so it is no text encoder; use {MINILM}, or a directory "
            f"with the files of one, for example from: {command}"
        )
    where = f"{found.where}/{files.CONFIG}"
    settings = architectures.settings(Config.read(files.read(found, files.CONFIG), where), where)
    length = _checked_length(length, settings.longest, found.name)
    tokenizer = tokenization.load(found, settings)
    graph, params, digest = weights.load(found, settings)
    identity = json.dumps([_sizes(settings), tokenizer.sha256, digest], sort_keys=True)
    sha256 = hashlib.sha256(identity.encode()).hexdigest()
    return Encoder(settings, graph, params, tokenizer, name=found.name, sha256=sha256, length=length)


def _sizes(settings: Any) -> dict[str, object]:
    return {"architecture": type(settings).__name__, **dataclasses.asdict(settings)}


def _checked_length(length: int | None, longest: int, name: str) -> int:
    if length is None:
        return min(DEFAULT_LENGTH, longest)
    if not tokenization.SHORTEST <= length <= longest:
        raise InputError(f"length={length}: {name} takes from {tokenization.SHORTEST} to {longest} tokens")
    return length
