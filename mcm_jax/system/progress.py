"""A progress bar on terminals, nothing elsewhere."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def bar(items: Iterable[T], description: str, *, total: int | None = None) -> Iterator[T]:
    """Yields the items while a progress bar on stderr shows their number and the time left.

    Args:
      total: number of items, if `items` has no length.
    """
    console = Console(stderr=True)
    how = {"console": console, "transient": True, "disable": not console.is_terminal}
    yield from track(items, description, total, **how)
