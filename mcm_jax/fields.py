"""Declares settings with a default, a description, a range, and what they affect.

Settings are fields of frozen dataclasses next to the code that uses them; `config.settings` combines these.
This module imports only the standard library, so that the mathematical modules can declare settings too.
"""

import dataclasses
import enum
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable


class Affects(enum.Flag):
    """What a setting affects."""

    # Only speed, memory or storage locations: all values give the same results up to rounding.
    NOTHING = 0
    # The images drawn from given parameters.
    SAMPLES = enum.auto()
    # The trained parameters: fixed once the run has started.
    TRAINING = enum.auto()
    # The function computed by given parameters: must be the same for a student and its teacher.
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
    """Declares a dataclass field with a description, an inclusive range, and what it affects.

    Has the type of its default, like `dataclasses.field`.

    Examples:
      >>> @dataclasses.dataclass
      ... class Optimizer:
      ...     learning_rate: float = setting(1e-4, "peak learning rate of Adam", low=0)
      >>> flat(Optimizer())
      {'learning_rate': 0.0001}
    """
    metadata = {"doc": doc, "low": low, "high": high, "affects": affects}
    return dataclasses.field(default=default, metadata=metadata)


def flat(settings: Settings, affects: Affects | None = None) -> dict[str, object]:
    """Returns {"section.name": value} of all settings, or of those that affect any of `affects`."""
    result: dict[str, object] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            result |= {f"{field.name}.{name}": inner for name, inner in flat(value, affects).items()}
        elif affects is None or field.metadata["affects"] & affects:
            result[field.name] = value
    return result
