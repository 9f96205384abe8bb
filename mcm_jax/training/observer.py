"""Reports the progress of a run: a progress bar or plain lines, TensorBoard, and grids of samples."""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Generator

import numpy as np
from etils import epath
from jaxtyping import UInt8
from rich.progress import BarColumn, Progress, TextColumn
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from mcm_jax.system import files
from mcm_jax.system.errors import InputError
from mcm_jax.system.paths import Path
from mcm_jax.system.pictures import png_bytes, save_png
from mcm_jax.training.state import Params

# protobuf creates these classes at import time.
_Event, _SessionLog = event_pb2.Event, event_pb2.SessionLog  # pyright: ignore[reportAttributeAccessIssue]
_Summary = summary_pb2.Summary  # pyright: ignore[reportAttributeAccessIssue]

# Maps parameters to a grid of samples, or to None if they are not finite.
Draw = Callable[[Params], UInt8[np.ndarray, "height width 3"] | None]


class RunObserver:
    """Reports the progress of the training loop; a context manager that flushes all output on exit.

    On a terminal it shows a progress bar, elsewhere it prints one line per report. It also writes metrics and
    sample grids to TensorBoard (an event file in the workdir), and sample grids to workdir/samples as PNG.
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
        """Opens TensorBoard's event file.

        Args:
          first_step: number of updates done before this start.
        """
        self._samples = workdir / "samples"
        self._num_steps, self._batch_size, self._draw = num_steps, batch_size, draw
        self._log_every_steps = log_every_steps
        self._window: list[dict[str, float]] = []
        self._events = _EventFile(workdir, first_step=first_step)
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
        self._events.close()

    def update(self, step: int) -> None:
        """Moves the progress bar; at the first update also prints the start-up time."""
        if self._timed is None:
            self._say(f"first update after {time.monotonic() - self._started:.1f} s")
            self._timed = (step, time.monotonic())
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Collects metrics; reports their means every log_every_steps updates and after the last one."""
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
        self._events.scalars(step, means)
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
            with _reporting_failure(self._samples):
                save_png(grid, self._samples / f"step_{step:07d}.png")
            self._events.image(step, "samples", grid)
        if self._timed is not None:
            self._timed = (self._timed[0], self._timed[1] + time.monotonic() - start)

    def _say(self, text: str) -> None:
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.console.print(text)


class SilentObserver:
    """Observer for all processes except the first: takes part in drawing samples and reports nothing."""

    def __init__(self, *, draw: Draw):
        self._draw = draw

    def __enter__(self) -> "SilentObserver":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, step: int) -> None:
        """Does nothing."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Does nothing."""

    def pictures(self, step: int, params: Params) -> None:
        """Computes this process's share of the samples that the first process draws."""
        self._draw(params)


class _EventFile:
    """The TensorBoard event file of one start of a run.

    It is written with TensorBoard's record format alone: clu.metric_writers and TensorBoard's EventFileWriter
    import TensorFlow, which would delay every start by several seconds.
    """

    def __init__(self, workdir: Path, *, first_step: int):
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._path = path = workdir / name
        file = files.GrowingObject(path) if isinstance(path, epath.Path) else path.open("ab")
        self._records = RecordWriter(file)
        self._write(file_version="brain.Event:2")
        # Makes TensorBoard drop what an earlier start logged after first_step, as this start logs it again.
        self._write(step=first_step + 1, session_log=_SessionLog(status=_SessionLog.START))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        found = [_Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step=step, summary=_Summary(value=found))

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "height width 3"]) -> None:
        height, width, channels = image.shape
        encoded = _Summary.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=png_bytes(image)
        )
        self._write(step=step, summary=_Summary(value=[_Summary.Value(tag=name, image=encoded)]))

    def close(self) -> None:
        with _reporting_failure(self._path):
            self._records.close()

    def _write(self, **fields: object) -> None:
        with _reporting_failure(self._path):
            self._records.write(_Event(wall_time=time.time(), **fields).SerializeToString())
            self._records.flush()


@contextlib.contextmanager
def _reporting_failure(path: Path) -> Generator[None, None, None]:
    """Reports that the storage has failed; training goes on without what could not be written."""
    try:
        yield
    except (OSError, InputError) as error:
        print(f"note: {path} could not be written ({error})", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
