"""Splits texts into tokens, with the libraries of the encoders' authors: `tokenizers` and `sentencepiece`.

The special tokens that an encoder expects around a text are added, and kept when a text is cut. Their names
in a text ("[SEP]", "</s>") are taken as plain text.
"""

import contextlib
import hashlib
from collections.abc import Generator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import sentencepiece
import tokenizers
from jaxtyping import Bool, Int32

from mcm_jax.system import json_text
from mcm_jax.system.errors import InputError, reason
from mcm_jax.text.architectures import Settings
from mcm_jax.text.files import Files, get, read

# A token of text between those that mark its beginning and end.
SHORTEST = 3
_FAST = "tokenizer.json"
_SENTENCEPIECE = "spiece.model"


class Tokens(NamedTuple):
    """Tokens of texts, padded to one length.

    Attributes:
      ids: 0 at padding.
      mask: False at padding.
      cut: whether the text was longer, so that its end is missing.
      unknown: whether a part of the text is not in the vocabulary, such as a word in another alphabet.
    """

    ids: Int32[np.ndarray, "B L"]
    mask: Bool[np.ndarray, "B L"]
    cut: Bool[np.ndarray, " B"]
    unknown: Bool[np.ndarray, " B"]


@runtime_checkable
class Tokenizer(Protocol):
    """A tokenizer of any library.

    Attributes:
      size: the number of tokens in its vocabulary, one more than the largest id.
      unknown: the id of what is not in its vocabulary; None if it can write everything.
      sha256: the hash of its file.
    """

    size: int
    unknown: int | None
    sha256: str

    def split(self, text: str, length: int) -> tuple[list[int], bool]:
        """At most `length` ids, special ones included, and whether the text was cut."""
        ...


def load(source: Files, settings: Settings) -> Tokenizer:
    """Reads tokenizer.json, or where there is none, T5's spiece.model.

    Raises:
      InputError: there is neither, it is damaged, or its vocabulary is not the network's.
    """
    found = source.names()
    readers = {_FAST: _Fast, _SENTENCEPIECE: _SentencePiece}
    name = next((name for name in readers if name in found), None)
    if name is None:
        raise InputError(
            f"{source.where} has no {' or '.join(readers)}; get it: {get(source, settings.DOWNLOAD)}"
        )
    content = read(source, name)
    with _library_errors(f"{source.where}/{name} is damaged ({{}}); download it again"):
        tokenizer = readers[name](content)
        special, _ = tokenizer.split("", SHORTEST)
        if not special or max(special) >= tokenizer.size:
            raise ValueError("it does not mark the end of a text")
    if not 0 <= settings.vocabulary - tokenizer.size <= settings.SPARE_TOKENS:
        raise InputError(
            f"{source.where}/{name} has {tokenizer.size:,} tokens, the network of config.json "
            f"{settings.vocabulary:,}; use the tokenizer that belongs to the weights"
        )
    return tokenizer


def tokenize(tokenizer: Tokenizer, strings: Sequence[str], length: int) -> Tokens:
    """Splits texts into `length` tokens each, cut or padded.

    Raises:
      InputError: a text contains half of a UTF-16 pair, which is no character, or the tokenizer can't split
        it.
    """
    shape = len(strings), length
    flags = [np.zeros(shape[:1], np.bool_) for _ in range(2)]
    tokens = Tokens(np.zeros(shape, np.int32), np.zeros(shape, np.bool_), *flags)
    for row, string in enumerate(strings):
        with _library_errors(f"text {row + 1} of {len(strings)} can't be split into tokens ({{}})"):
            string.encode()  # Raises for half of a pair.
            ids, tokens.cut[row] = tokenizer.split(string, length)
        tokens.ids[row, : len(ids)] = ids
        tokens.mask[row, : len(ids)] = True
        tokens.unknown[row] = tokenizer.unknown in ids
    return tokens


@contextlib.contextmanager
def _library_errors(message: str) -> Generator[None, None, None]:
    """Turns every error of a library into an InputError, with its text in place of the braces."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    # They raise Exception itself, RuntimeError and, from Rust, a BaseException.
    except BaseException as error:
        raise InputError(message.format(reason(error))) from error


class _Fast:
    """A tokenizer.json."""

    def __init__(self, content: bytes):
        model = json_text.loads(content)["model"]
        self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        name = model.get("unk_token")
        unknown = self._tokenizer.token_to_id(name) if name else model.get("unk_id")
        # CLIP's marks the end of a text too, and is never used: its vocabulary has all bytes.
        self.unknown = None if unknown in self._tokenizer.encode("").ids else unknown
        self.sha256 = hashlib.sha256(content).hexdigest()

    def split(self, text: str, length: int) -> tuple[list[int], bool]:
        self._tokenizer.enable_truncation(length)
        encoding = self._tokenizer.encode(text)
        return encoding.ids, bool(encoding.overflowing)


class _SentencePiece:
    """A spiece.model of T5, without the 100 placeholders of its pretraining."""

    def __init__(self, content: bytes):
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        self._end = self._processor.eos_id()
        if self._end < 0:
            raise ValueError("it has no token for the end of a text")
        self.size = self._processor.get_piece_size()
        self.unknown = self._processor.unk_id()
        self.sha256 = hashlib.sha256(content).hexdigest()

    def split(self, text: str, length: int) -> tuple[list[int], bool]:
        ids = self._processor.encode(text)
        return [*ids[: length - 1], self._end], len(ids) > length - 1
