"""Declares a setting: its default, meaning and range, and what depends on it.

Settings are fields of frozen dataclasses that stand beside the code that reads them; `config.settings`
composes these. Standard library only, so that the mathematics can declare its settings too.
"""

import dataclasses
import enum
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable


class Affects(enum.Flag):
    """What depends on a setting."""

    # Speed, memory, and where things are stored: any value gives the same results up to rounding.
    NOTHING = 0
    # The images drawn from given parameters.
    SAMPLES = enum.auto()
    # The parameters that a run ends with: fixed once the run has started.
    TRAINING = enum.auto()
    # The function that given parameters stand for: a student shares it with its teacher.
    NETWORK = enum.auto()
    ALL = SAMPLES | TRAINING | NETWORK


@runtime_checkable
class Settings(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


T = TypeVar("T")


def setting(
    default: T,
    doc: str,
    *,
    low: int | float | None = None,
    high: int | float | None = None,
    affects: Affects = Affects.TRAINING,
) -> T:
    """A dataclass field with its meaning, its inclusive range, and what depends on it.

    Typed as its default, as `dataclasses.field` is.

    Example:
      learning_rate: float = setting(1e-4, "peak learning rate of Adam", low=0)
    """
    metadata = {"doc": doc, "low": low, "high": high, "affects": affects}
    return dataclasses.field(default=default, metadata=metadata)


def flat(settings: Settings, affects: Affects | None = None) -> dict[str, object]:
    """{"section.name": value} of all settings, or of those that affect any of `affects`."""
    result: dict[str, object] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            result |= {f"{field.name}.{name}": inner for name, inner in flat(value, affects).items()}
        elif affects is None or field.metadata["affects"] & affects:
            result[field.name] = value
    return result
