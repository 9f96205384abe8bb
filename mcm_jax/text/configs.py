"""Reads the config.json beside an encoder's weights; whatever is wrong with it is one line."""

from collections.abc import Mapping
from typing import Any

from mcm_jax.system import json_text
from mcm_jax.system.errors import InputError, reason, shortened

# The largest vocabularies have 256,000 tokens, the widest layers 65,536 channels,
# the deepest encoders 48 layers.
_LARGEST_SIZE = 2**20
_MOST_LAYERS = 64


class Config:
    """The settings in a config.json, or in one of its sections.

    Every method takes the name of a setting, and returns `default` if the setting is missing and there is a
    default. Each raises InputError if the value is missing or not what it must be.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        """where: the file, and the section if it is one, for messages."""
        self._values, self._where = values, where

    @classmethod
    def read(cls, content: bytes, where: str) -> "Config":
        """Parses the content of the file.

        Raises:
          InputError: it is not a JSON object.
        """
        try:
            values = json_text.loads(content)
            if not isinstance(values, dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            raise InputError(f"{where} is damaged ({reason(error)}); download it again") from error
        return cls(values, where)

    def section(self, name: str) -> "Config":
        """A section with settings of its own."""
        value = self._values.get(name)
        if not isinstance(value, dict):
            raise self._error(name, "must be a section of settings")
        return Config(value, f"{self._where}, {name}")

    def text(self, name: str) -> str:
        """A text."""
        value = self._values.get(name)
        if not isinstance(value, str):
            raise self._error(name, "must be a text")
        return value

    def choice(self, name: str, allowed: tuple[str, ...], *, default: str | None = None) -> str:
        """One of the allowed texts."""
        value = self._values.get(name, default)
        if value not in allowed:
            raise self._error(name, f"must be {' or '.join(allowed)}")
        return value

    def boolean(self, name: str, *, default: bool) -> bool:
        """True or false."""
        value = self._values.get(name, default)
        if not isinstance(value, bool):
            raise self._error(name, "must be true or false")
        return value

    def size(self, name: str, *, at_least: int = 1, default: int | None = None) -> int:
        """A number of channels, tokens or heads."""
        return self._integer(name, at_least, _LARGEST_SIZE, default)

    def count(self, name: str, *, default: int | None = None) -> int:
        """A number of layers."""
        return self._integer(name, 1, _MOST_LAYERS, default)

    def divisor(self, name: str, width: int, *, default: int | None = None) -> int:
        """A number of heads that divides `width` channels."""
        value = self.size(name, default=default)
        if width % value:
            raise self._error(name, f"must divide the width, {width}")
        return value

    def epsilon(self, name: str, *, default: float | None = None) -> float:
        """A small positive number."""
        value = self._values.get(name, default)
        if not isinstance(value, float) or not 0 < value < 1:
            raise self._error(name, "must be a number between 0 and 1")
        return value

    def _integer(self, name: str, least: int, most: int, default: int | None) -> int:
        value = self._values.get(name, default)
        # A bool is an int for isinstance.
        if type(value) is not int or not least <= value <= most:
            raise self._error(name, f"must be an integer from {least} to {most:,}")
        return value

    def _error(self, name: str, rule: str) -> InputError:
        found = f"is {shortened(repr(self._values[name]))}" if name in self._values else "is missing"
        return InputError(
            f"{self._where}: {name} {found}; it {rule}; use the config.json that belongs to the weights"
        )
