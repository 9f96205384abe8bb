"""Where the metrics of a run are written: TensorBoard, JSON lines, Weights & Biases."""

import contextlib
import importlib.util
import os
import pathlib
import socket
import sys
import time
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from etils import epath
from jaxtyping import UInt8
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from mcm_jax.system import files
from mcm_jax.system.errors import InputError, reason
from mcm_jax.system.paths import Path
from mcm_jax.system.pictures import png_bytes

WriterName = Literal["tensorboard", "json", "wandb"]
METRICS_FILE = "metrics.jsonl"
_WANDB_ID = "wandb_id"

# protobuf creates these classes at import time.
_Event, _SessionLog = event_pb2.Event, event_pb2.SessionLog  # pyright: ignore[reportAttributeAccessIssue]
_Summary = summary_pb2.Summary  # pyright: ignore[reportAttributeAccessIssue]

Grid = UInt8[np.ndarray, "height width 3"]


@runtime_checkable
class Writer(Protocol):
    """Writes metrics and pictures; a failure of the storage is reported, and training goes on."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of these names after update `step`."""
        ...

    def image(self, step: int, name: str, image: Grid) -> None:
        """Writes a picture after update `step`."""
        ...

    def close(self) -> None:
        """Writes what is pending."""
        ...


def require_installed(names: Sequence[WriterName]) -> None:
    """Raises InputError if a writer needs a package that is missing."""
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        raise InputError(
            "config.training.metrics_to includes wandb, which is not installed; install it with "
            "pip install wandb, or leave it out"
        )


def opened(
    names: Sequence[WriterName], workdir: Path, *, first_step: int, config: Mapping[str, object]
) -> list[Writer]:
    """Opens the writers of these names.

    Args:
      first_step: number of updates done before this start.
      config: all settings of the run, by name.
    """
    make = {
        "tensorboard": lambda: TensorBoard(workdir, first_step=first_step),
        "json": lambda: JsonLines(workdir),
        "wandb": lambda: WandB(workdir, config),
    }
    return [make[name]() for name in dict.fromkeys(names)]


@contextlib.contextmanager
def reporting_failure(path: Path) -> Generator[None, None, None]:
    """Reports that the storage has failed; training goes on without what could not be written."""
    try:
        yield
    except (OSError, InputError) as error:
        print(f"note: {path} could not be written ({error})", file=sys.stderr, flush=True)


class TensorBoard:
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

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Writer`."""
        found = [_Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step=step, summary=_Summary(value=found))

    def image(self, step: int, name: str, image: Grid) -> None:
        """See `Writer`."""
        height, width, channels = image.shape
        encoded = _Summary.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=png_bytes(image)
        )
        self._write(step=step, summary=_Summary(value=[_Summary.Value(tag=name, image=encoded)]))

    def close(self) -> None:
        """See `Writer`."""
        with reporting_failure(self._path):
            self._records.close()

    def _write(self, **fields: object) -> None:
        with reporting_failure(self._path):
            self._records.write(_Event(wall_time=time.time(), **fields).SerializeToString())
            self._records.flush()


class JsonLines:
    """workdir/metrics.jsonl, a line for each report: {"step": 100, "time": seconds since 1970, "loss": ...}.

    A step may have several lines: a start ends with one of shares, and a run that continues from a checkpoint
    may write a step again. Of each name, the last value counts.
    """

    def __init__(self, workdir: Path):
        self._path = workdir / METRICS_FILE

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Writer`."""
        with reporting_failure(self._path):
            files.append_line(self._path, {"step": step, "time": round(time.time(), 3), **values})

    def image(self, step: int, name: str, image: Grid) -> None:
        """Does nothing: pictures are in workdir/samples."""

    def close(self) -> None:
        """Does nothing: every line is written at once."""


class WandB:
    """A run of Weights & Biases, named like the workdir; every start continues it.

    Its own environment variables apply, such as WANDB_PROJECT and WANDB_MODE=offline. Raises InputError if it
    does not start, for example because nobody has logged in.
    """

    def __init__(self, workdir: Path, config: Mapping[str, object]):
        import wandb  # An extra.

        path = workdir / _WANDB_ID
        if not path.exists():
            files.write_whole(path, uuid.uuid4().hex[:12])
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "mcm_jax"),
                name=workdir.name,
                id=files.read_bytes(path).decode(),
                resume="allow",
                # A bucket cannot hold its files.
                dir=str(workdir) if isinstance(workdir, pathlib.Path) else None,
                config=dict(config),
            )
        except Exception as error:  # It has many kinds without a common one.
            raise InputError(
                f"config.training.metrics_to includes wandb, which did not start ({reason(error)}); run "
                "`wandb login`, set WANDB_MODE=offline, or leave it out"
            ) from error
        # A run that continues from a checkpoint repeats steps, which W&B's own counter would drop.
        self._run.define_metric("*", step_metric="step")
        self._wandb, self._has_failed = wandb, False

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Writer`."""
        self._reporting_first_failure(lambda: self._run.log({"step": step, **values}))

    def image(self, step: int, name: str, image: Grid) -> None:
        """See `Writer`."""
        self._reporting_first_failure(lambda: self._run.log({"step": step, name: self._wandb.Image(image)}))

    def close(self) -> None:
        """See `Writer`."""
        self._reporting_first_failure(self._run.finish)

    def _reporting_first_failure(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # As above.
            if not self._has_failed:
                print(f"note: W&B has failed ({reason(error)})", file=sys.stderr, flush=True)
            self._has_failed = True
