"""Reports the progress of a run: a progress bar or plain lines, metrics, and grids of samples."""

import contextlib
import sys
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import UInt8
from rich.progress import BarColumn, Progress, TextColumn

from mcm_jax.system.paths import Path
from mcm_jax.system.pictures import save_png
from mcm_jax.training.clock import Clock
from mcm_jax.training.profile import Tracer
from mcm_jax.training.state import Params
from mcm_jax.training.writers import Writer, reporting_failure

# Maps parameters to a grid of samples, or to None if they are not finite.
Draw = Callable[[Params], UInt8[np.ndarray, "height width 3"] | None]


class RunObserver:
    """Reports the progress of the training loop; a context manager that flushes all output on exit.

    On a terminal it shows a progress bar, elsewhere it prints one line per report. It also passes metrics and
    sample grids to its writers, and saves sample grids to workdir/samples as PNG. In the end it prints what
    the time was spent on, and the devices' peak memory if they report it.

    Attributes:
      clock: what the time is spent on; the loop sets the causes.
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
        clock: Clock,
        writers: Sequence[Writer],
        tracer: Tracer | None = None,
    ):
        """Starts nothing yet.

        Args:
          first_step: number of updates done before this start.
          clock: counts since this start began.
          writers: where metrics go; they are closed on exit.
          tracer: traces some updates.
        """
        self.clock = clock
        self._lap = clock.seconds()
        self._samples = workdir / "samples"
        self._num_steps, self._batch_size, self._draw = num_steps, batch_size, draw
        self._log_every_steps = log_every_steps
        self._window: list[dict[str, float]] = []
        self._writers, self._tracer, self._last_step = writers, tracer, first_step
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
        # Whatever fails, the others are closed.
        with contextlib.ExitStack() as stack:
            for writer in self._writers:
                stack.callback(writer.close)
            if self._timed is not None:
                stack.callback(self._report_time)
            if self._tracer is not None:
                stack.callback(self._tracer.stop)
            if self._bar is not None:
                stack.callback(self._bar.stop)

    def update(self, step: int) -> None:
        """Moves the progress bar; at the first update also prints the start-up time."""
        if self._timed is None:
            self._say(f"first update after {time.monotonic() - self._started:.1f} s")
            self._timed = (step, time.monotonic())
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Collects metrics; reports their means every log_every_steps updates and after the last one."""
        if self._tracer is not None:
            self._tracer.finished(step)
        self._window.append(values)
        if step % self._log_every_steps and step != self._num_steps:
            return
        means = {name: float(np.mean([v[name] for v in self._window])) for name in values}
        now, left = time.monotonic(), ""
        first, since = self._timed or (step, now)
        if step > first:
            rate = (step - first) / (now - since)
            means |= {"steps_per_second": rate, "images_per_second": rate * self._batch_size}
            left = f"  {_duration((self._num_steps - step) / rate)} left"
        self._timed = (step, now)
        seconds = self._seconds_since_last_report()
        self._write(
            step, means | {f"seconds/{cause}": value / len(self._window) for cause, value in seconds.items()}
        )
        self._window.clear()
        text = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in means.items())
        text = f"step {step}/{self._num_steps}  {text}{left}"
        if self._bar is None:
            self._say(text)
        else:
            self._bar.update(self._task, description=text)

    def pictures(self, step: int, params: Params) -> None:
        """Draws a grid of samples; the reported steps per second exclude the time for drawing."""
        start = time.monotonic()
        grid = self._draw(params)
        if grid is None:
            self._say(f"the samples of step {step} contain NaN or infinity and are not saved")
        else:
            with reporting_failure(self._samples):
                save_png(grid, self._samples / f"step_{step:07d}.png")
            for writer in self._writers:
                writer.image(step, "samples", grid)
        if self._timed is not None:
            self._timed = (self._timed[0], self._timed[1] + time.monotonic() - start)

    def _write(self, step: int, values: dict[str, float]) -> None:
        self._last_step = step
        for writer in self._writers:
            writer.scalars(step, values)

    def _seconds_since_last_report(self) -> dict[str, float]:
        before, self._lap = self._lap, self.clock.seconds()
        return {cause: value - before[cause] for cause, value in self._lap.items()}

    def _report_time(self) -> None:
        """Prints and writes the share of the time that was spent on each cause since this start."""
        seconds = self.clock.seconds()
        total = sum(seconds.values())
        shares = {cause: value / total for cause, value in seconds.items()}
        values = {f"share/{cause}": share for cause, share in shares.items()}
        text = f"{_duration(total)}: {shares['updates']:.1%} of the time on updates (goodput)"
        text += "".join(f", {share:.1%} on {cause}" for cause, share in shares.items() if cause != "updates")
        peak = peak_memory_bytes()
        if peak is not None:
            values["peak_memory_gib"] = peak / 2**30
            text += f"; peak memory {peak / 2**30:.2f} GiB per device"
        self._say(text)
        self._write(self._last_step, values)

    def _say(self, text: str) -> None:
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.console.print(text)


class SilentObserver:
    """Observer for all processes except the first: takes part in drawing samples and reports nothing."""

    def __init__(self, *, draw: Draw, clock: Clock, tracer: Tracer | None = None):
        self.clock = clock
        self._draw, self._tracer = draw, tracer

    def __enter__(self) -> "SilentObserver":
        return self

    def __exit__(self, *_: object) -> None:
        if self._tracer is not None:
            self._tracer.stop()

    def update(self, step: int) -> None:
        """Does nothing."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Traces the updates of a profile."""
        if self._tracer is not None:
            self._tracer.finished(step)

    def pictures(self, step: int, params: Params) -> None:
        """Computes this process's share of the samples that the first process draws."""
        self._draw(params)


def peak_memory_bytes() -> int | None:
    """The most memory that any device of this process has used; None if they do not report it, as CPUs."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    return max(
        (each["peak_bytes_in_use"] for each in stats if each and "peak_bytes_in_use" in each), default=None
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
