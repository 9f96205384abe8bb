"""A progress bar on terminals, nothing elsewhere."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def bar(items: Sequence[T], description: str) -> Iterator[T]:
    """Yields the items while a bar on stderr shows how many are done and the time left."""
    console = Console(stderr=True)
    yield from track(items, description, console=console, transient=True, disable=not console.is_terminal)
