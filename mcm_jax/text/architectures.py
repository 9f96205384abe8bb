"""The architectures of text encoders, by the model_type of a config.json."""

from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol, runtime_checkable

from flax import nnx

from mcm_jax.system.errors import InputError, shortened
from mcm_jax.text import weights
from mcm_jax.text.bert import BertSettings
from mcm_jax.text.clip import ClipSettings
from mcm_jax.text.configs import Config
from mcm_jax.text.t5 import T5Settings


@runtime_checkable
class Settings(weights.Settings, Protocol):
    """All sizes of a text encoder's network.

    Attributes:
      SPARE_TOKENS: how many tokens more the network may have than its tokenizer.
    """

    SPARE_TOKENS: ClassVar[int]

    @property
    def vocabulary(self) -> int:
        """The number of tokens that the network knows."""
        ...

    @property
    def width(self) -> int:
        """The size of a token's embedding."""
        ...

    @property
    def pooled_width(self) -> int:
        """The size of a text's vector."""
        ...

    @property
    def longest(self) -> int:
        """The largest number of tokens of a text."""
        ...

    def build(self) -> nnx.Module:
        """Builds the network: (ids int32 [B, L], mask bool [B, L]) -> (tokens [B, L, D], pooled [B, P])."""
        ...


_ARCHITECTURES: Mapping[str, Callable[[Config], Settings]] = {
    "bert": BertSettings.of,
    "t5": T5Settings.of,
    "clip": ClipSettings.of,
    "clip_text_model": ClipSettings.of,
}


def settings(config: Config, where: str) -> Settings:
    """The sizes that a config.json gives.

    Raises:
      InputError: it is of another architecture, or a setting is missing or out of range.
    """
    model_type = config.text("model_type")
    if model_type not in _ARCHITECTURES:
        raise InputError(
            f"{where}: model_type is {shortened(model_type)}; text encoders are {', '.join(_ARCHITECTURES)}"
        )
    return _ARCHITECTURES[model_type](config)
