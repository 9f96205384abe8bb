"""How a run is seen: a bar or plain lines, TensorBoard, and a grid of samples now and then."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from clu import metric_writers
from jaxtyping import UInt8
from rich.progress import BarColumn, Progress, TextColumn

from mcm_jax.system.pictures import save_png

Draw = Callable[[Any], UInt8[np.ndarray, "height width 3"]]


class RunObserver:
    """The loop's observer; use it as a context, so that everything is flushed at the end.

    On a terminal it shows one bar, elsewhere a line whenever metrics come. Metrics and pictures also go to
    TensorBoard (event files in the workdir), pictures to workdir/samples as PNG.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        first_step: int,
        num_steps: int,
        batch_size: int,
        log_every_steps: int,
        draw: Draw,
    ):
        """draw: parameters -> a grid of samples."""
        self._samples = workdir / "samples"
        self._num_steps, self._batch_size, self._draw = num_steps, batch_size, draw
        self._log_every_steps = log_every_steps
        self._window: list[dict[str, float]] = []
        self._writer = metric_writers.AsyncMultiWriter([metric_writers.SummaryWriter(str(workdir))])
        self._started = time.monotonic()
        self._timed: tuple[int, float] | None = None
        self._bar = None
        if sys.stderr.isatty():
            columns = (BarColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, transient=False)
            self._task = self._bar.add_task("compiling", total=num_steps, completed=first_step)

    def __enter__(self) -> "RunObserver":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._writer.flush()
        self._writer.close()

    def update(self, step: int) -> None:
        """Moves the bar; says how long the start took."""
        if self._timed is None:
            self._say(f"first update after {time.monotonic() - self._started:.1f} s")
            self._timed = (step, time.monotonic())
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Collects; every log_every_steps the means go to a line or the bar, and to TensorBoard."""
        self._window.append(values)
        if step % self._log_every_steps and step != self._num_steps:
            return
        means = {name: float(np.mean([v[name] for v in self._window])) for name in values}
        self._window.clear()
        now, left = time.monotonic(), ""
        first, since = self._timed or (step, now)
        if step > first:
            rate = (step - first) / (now - since)
            means |= {"steps_per_second": rate, "images_per_second": rate * self._batch_size}
            left = f"  {_duration((self._num_steps - step) / rate)} left"
        self._timed = (step, now)
        self._writer.write_scalars(step, means)
        text = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in means.items())
        text = f"step {step}/{self._num_steps}  {text}{left}"
        if self._bar is None:
            self._say(text)
        else:
            self._bar.update(self._task, description=text)

    def pictures(self, step: int, params: Any) -> None:
        """Draws a grid; the time it takes does not count in the steps a second."""
        start = time.monotonic()
        grid = self._draw(params)
        save_png(grid, self._samples / f"step_{step:07d}.png")
        self._writer.write_images(step, {"samples": grid[None]})
        if self._timed is not None:
            self._timed = (self._timed[0], self._timed[1] + time.monotonic() - start)

    def _say(self, text: str) -> None:
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.console.print(text)


class SilentObserver:
    """The observer of all processes but the first: it takes part in drawing, and tells nobody."""

    def __init__(self, *, draw: Draw):
        """draw: parameters -> a grid of samples."""
        self._draw = draw

    def __enter__(self) -> "SilentObserver":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, step: int) -> None:
        """Nothing."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Nothing."""

    def pictures(self, step: int, params: Any) -> None:
        """Samples on this process's devices what the first process draws."""
        self._draw(params)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
