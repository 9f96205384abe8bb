"""A progress bar on terminals, nothing elsewhere."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def bar(items: Iterable[T], description: str, *, total: int | None = None) -> Iterator[T]:
    """Yields the items while a bar on stderr shows how many are done and the time left.

    total: how many there are, where they don't know.
    """
    console = Console(stderr=True)
    how = {"console": console, "transient": True, "disable": not console.is_terminal}
    yield from track(items, description, total, **how)
