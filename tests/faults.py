"""Injects random faults into training runs; after each, the same command must bring the run back.

    python -m tests.faults --quick
    python -m tests.faults --faults=1000 --out=results/faults

A trial is one tiny run on a local disk or in a bucket, in one or two processes, with one of the objectives.
Each of its starts meets one fault at a random time; the last start meets none and must finish. Then the run's
newest checkpoint is compared with that of an undisturbed run: all arrays and the position in the data must be
equal, bit for bit. After a change of the number of processes, whose sums have another order, parameters are
compared up to rounding.

OUT/faults.jsonl gets a line for each fault, OUT/faults.md a table of all lines. The same command continues an
interrupted one. Exit code 1: a run was not brought back, or is wrong.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import fcntl
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from rich.progress import Progress

from mcm_jax.config import validation
from mcm_jax.config.settings import stage_configs
from mcm_jax.runs import trainer
from mcm_jax.runs.run import load_run
from mcm_jax.system import files, paths, versions
from mcm_jax.system.errors import InputError
from tests import (
    buckets,
    conftest,  # Sets JAX's environment, so it comes first.
    members,
    tiny,
)

assert conftest
OBJECTIVES = (
    *("diffusion", "guidance", "cd", "ct", "scd", "sct", "moments", "ayf", "meanflow", "shortcut"),
    *("tract", "progressive"),
)
UPDATES, EVERY = 32, 4  # of each run, or each stage; and between checkpoints
# Added to each update, so that faults come in the middle of a run.
_UPDATE_SECONDS, _SLOW_UPDATE_SECONDS = 0.05, 0.5
_START_SECONDS = 120.0
_KEEP = 99
_FILLER = "filler"

# The config file of all trials, and the program that each process runs.
_CONFIG = """
from tests import faults

def get_config(objective):
    return faults.config(objective)
"""
_PROGRAM = """
import faulthandler, runpy, signal, time
faulthandler.register(signal.SIGUSR1)  # Prints where all threads are.
delta = float(os.environ.get("MCM_FAULT_CLOCK", "0"))
now, now_ns = time.time, time.time_ns
time.time, time.time_ns = lambda: now() + delta, lambda: now_ns() + int(delta * 1e9)
from mcm_jax.training import checkpoints
checkpoints._RETRY_SECONDS, checkpoints._FINAL_RETRY_SECONDS = 0.3, (0.5, 1.0)
updated = observer.RunObserver.update
observer.RunObserver.update = lambda self, step: (time.sleep(UPDATE_SECONDS), updated(self, step))
sys.argv = ["train", *json.loads(ARGUMENTS)]
runpy.run_module("mcm_jax.train", run_name="__main__")
"""


def config(objective: str):
    """The ConfigDict of a trial; the command adds the paths."""
    result = tiny.config(Path("data"), objective)
    result.training.update(num_steps=UPDATES, checkpoint_every_steps=EVERY, keep_checkpoints=_KEEP)
    # Where a gradient is zero but for its last bits, Adam would make an update of them.
    result.optimizer.eps = 1e-3
    if objective == "diffusion":
        result.diffusion.label_dropout = 0.1
    elif objective == "guidance":
        result.guidance.teacher_guidance = 1.0
    elif objective == "progressive":
        result.progressive.stages = (4, 2, 1)
    if objective in ("cd", "ct"):
        result.consistency.anneal_steps = UPDATES
    return result


class World:
    """Everything that trials share: data, a teacher, undisturbed runs, and a bucket for each worker."""

    def __init__(self, shared: Path):
        self.shared, self.directory = shared, Path(tempfile.mkdtemp(dir=shared))
        self.config, self.teacher = shared / "config.py", shared / "teacher"
        self.data, self.other_data = (shared / name / "data" for name in ("first", "other"))
        self.bucket = buckets.Bucket().__enter__()
        os.environ.update(self.bucket.variables(), MCM_LOCAL_DATA=str(self.directory / "copies"))

    @staticmethod
    def prepare(shared: Path) -> None:
        """Creates what workers share, except the undisturbed runs."""
        (shared / "config.py").write_text(_CONFIG)
        tiny.prepare_folder(shared / "first")
        tiny.prepare_folder(shared / "other", count=44)
        raw = config("diffusion")
        raw.data.data_dir = str(shared / "first" / "data")
        raw.training.checkpoint_every_steps = UPDATES
        assert trainer.train(raw, shared / "teacher")

    def undisturbed(self, objective: str, processes: int) -> Path:
        """The workdir of the last stage of an undisturbed run."""
        workdir = self.shared / f"undisturbed_{objective}_{processes}"
        with open(workdir.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not workdir.exists():
                start = Start(self, objective, processes, workdir, self.data, every=UPDATES)
                with start.processes:
                    assert start.processes.codes() == [0] * processes, start.processes.everything()
        return stages(objective, workdir)[-1][0]


def stages(objective: str, workdir: paths.Path) -> list:
    """The workdir and config of each stage."""
    raw = config(objective)
    if objective != "diffusion":
        raw.teacher_checkpoint = "teacher"
    return stage_configs(validation.validate(raw), workdir)


def _entries(workdir: paths.Path) -> list[paths.Path]:
    directory = workdir / "checkpoints"
    found = directory.iterdir() if directory.is_dir() else ()
    return [path for path in found if path.name.isdecimal()]


class Start:
    """One start of the command; `processes` is a context manager."""

    def __init__(self, world, objective: str, count: int, workdir, data, clock=0.0, **options):
        """Starts the processes.

        Args:
          clock: seconds by which their clock is wrong.
          options: proxy (whether the storage can fail), slow (longer updates), every (between checkpoints).
        """
        arguments = [f"--config={world.config}:{objective}", f"--workdir={workdir}"]
        arguments.append(f"--config.data.data_dir={data}")
        arguments.append(f"--config.training.checkpoint_every_steps={options.get('every', EVERY)}")
        if objective != "diffusion":
            arguments.append(f"--config.teacher_checkpoint={world.teacher}")
        self.logs = Path(tempfile.mkdtemp(dir=world.directory)) / "logs"
        program = _PROGRAM.replace(
            "UPDATE_SECONDS", str(_SLOW_UPDATE_SECONDS if options.get("slow") else _UPDATE_SECONDS)
        )
        self.processes = members.Members(
            program.replace("ARGUMENTS", repr(json.dumps(arguments))),
            count=count,
            devices=1,
            directory=self.logs,
            # The proxy takes longer than the server.
            environment={
                "MCM_FAULT_CLOCK": str(clock),
                **world.bucket.variables(proxy=options.get("proxy", False)),
            },
        )
        self.began, self.hung, self.problem = time.monotonic(), False, ""

    @property
    def running(self) -> bool:
        return any(process.poll() is None for process in self.processes.processes)

    def output(self) -> str:
        """What all processes have printed, on stderr too."""
        numbers = range(len(self.processes.processes))
        streams = [(number, stream) for number in numbers for stream in ("output", "err")]
        return "\n".join(self.processes.output(*one) for one in streams)

    def steps(self) -> int:
        """Number of updates that this start has reported."""
        return len(re.findall(r"^step \d+/", self.processes.output(0), re.MULTILINE))

    def position(self, line: str) -> int | None:
        """The last number that matches `line`, counted over all stages; None if nothing does."""
        stages = self.processes.output(0).split("== stage")
        for number, text in reversed(list(enumerate(stages[1:] or stages))):
            if found := re.findall(line, text, re.MULTILINE):
                return number * UPDATES + int(found[-1])
        return None

    def wait_for_steps(self, number: int) -> None:
        """Waits until so many updates are reported, or the processes end."""
        while self.running and self.steps() < number and time.monotonic() - self.began < _START_SECONDS:
            time.sleep(0.01)

    def end(self, *, kill_after: float = _START_SECONDS) -> list[int]:
        """Waits until all processes have ended, kills those that do not, and returns the exit codes.

        `hung` then says whether one had to be killed although no other had been.
        """
        until = time.monotonic() + kill_after
        while self.running and time.monotonic() < until:
            time.sleep(0.02)
        ended = [process.poll() for process in self.processes.processes]
        # A process that waits for one that was killed is killed by the cluster.
        self.hung = None in ended and not any(code is not None and code < 0 for code in ended)
        if self.hung:
            for process in self.processes.processes:
                process.send_signal(signal.SIGUSR1)
            time.sleep(1)
        for process in self.processes.processes:
            process.kill()
        return self.processes.codes()

    def close(self) -> None:
        shutil.rmtree(self.logs.parent, ignore_errors=True)


@dataclasses.dataclass
class Trial:
    """One run and what has happened to it."""

    world: World
    seed: int

    def __post_init__(self):
        self.rng = random.Random(self.seed)
        self.in_bucket = self.rng.random() < 0.4
        self.objective = OBJECTIVES[self.seed % len(OBJECTIVES)]
        self.processes = 2 if self.rng.random() < 0.2 else 1
        self.counts = {self.processes}
        self.clock = 0.0
        place = paths.as_path("gs://bucket") if self.in_bucket else self.world.directory
        self.place = place / f"trial_{self.seed}"
        self.workdir, self.data = self.place / "run", self.place / "data"
        self.put_data(self.world.data)
        self.records: list[dict[str, object]] = []

    @property
    def storage(self) -> str:
        return "bucket" if self.in_bucket else "disk"

    def put_data(self, source: Path) -> None:
        """Makes `data` a copy of a directory of prepared data."""
        name = Path("folder") / "tiny_8" / "1.0.0"
        if self.in_bucket:
            files.publish_tree(source / name, self.data / str(name), last="summary.json")
        else:
            shutil.rmtree(self.data, ignore_errors=True)
            shutil.copytree(source, self.data)

    def start(self, **options: bool) -> Start:
        where = self.workdir, self.data, self.clock
        return Start(self.world, self.objective, self.processes, *where, **options)

    def checkpoints(self) -> list[paths.Path]:
        """The complete checkpoints of the stage that was trained last, the newest first."""
        for workdir in reversed(self.stages()):
            if found := self._complete(workdir):
                return [workdir / "checkpoints" / str(step) for step in sorted(found, reverse=True)]
        return []

    def run(self, kinds: list[str]) -> list[dict[str, object]]:
        """Meets faults of these kinds, one per start, then finishes; returns a record for each."""
        for kind in kinds:
            if self.done() < UPDATES * len(self.stages()):
                self.meet(kind)
        finished, message = self.finish()
        equal = False
        try:
            equal = finished and self.is_equal()
        except (InputError, OSError) as error:
            message = str(error)
        for record in self.records:
            record |= {"recovered": finished, "equal": equal, "message": message}
        if not self.in_bucket and os.path.ismount(self.workdir):
            subprocess.run(["umount", str(self.workdir)], check=True)
        files.remove_tree(self.place)
        return self.records

    def meet(self, kind: str) -> None:
        """One start with a fault."""
        fault, began, before = FAULTS[kind], time.monotonic(), self.done()
        self.bound = fault.bound
        note = fault.before(self) if fault.before is not None else ""
        processes, start = self.processes, self.start(proxy=fault.storages == _IN_BUCKET, slow=fault.slow)
        with start.processes:
            if fault.during is not None:
                # Half of them early: while starting, or at the first save.
                start.wait_for_steps(self.rng.choice([0, 0, 1, 2, 3, 4]))
                time.sleep(self.rng.random() * (1.5 if not start.steps() else 0.1))
                note = fault.during(self, start) or note
            if fault.kills:
                codes = start.end(kill_after=fault.kills)
            else:
                # Ends it, so that something is left to train.
                start.wait_for_steps(start.steps() + self.rng.randint(1, 3))
                _signal_one(signal.SIGTERM)(self, start)
                codes = start.end()
            text, reached = start.output(), start.position(r"^step (\d+)/")
            continued = start.position(r"^continuing at update (\d+)")
        if fault.after is not None:
            fault.after(self)
        start.close()
        # Before this start, by damage, and in it.
        lost = max(before - (before if continued is None else continued), (reached or 0) - self.done(), 0)
        self.records.append(
            {
                "seed": self.seed,
                "fault": kind,
                "storage": self.storage,
                "processes": processes,
                "objective": self.objective,
                "codes": codes,
                "updates": reached,
                "lost": lost,
                "bound": self.bound,
                "seconds": round(time.monotonic() - began, 2),
                "note": note,
                "wrong": start.problem or _wrong(start.hung, codes, text, lost, self.bound),
                "output": text[-20_000:],
            }
        )

    def done(self) -> int:
        """Number of updates in complete checkpoints, over all stages."""
        return sum(max(self._complete(workdir), default=0) for workdir in self.stages())

    def stages(self) -> list[paths.Path]:
        """The workdirs of all stages, in order; for most objectives there is only one."""
        return [workdir for workdir, _ in stages(self.objective, self.workdir)]

    def _complete(self, workdir: paths.Path) -> list[int]:
        """The checkpoints that are complete and where they belong."""
        found = []
        for path in _entries(workdir):
            marked = not self.in_bucket or (path / "commit_success.txt").exists()
            text = files.read_if_exists(path / "step" / "metadata")
            if marked and text is not None and f'"step": {path.name},'.encode() in text:
                found.append(int(path.name))
        return found

    def finish(self) -> tuple[bool, str]:
        """The same command without a fault; returns whether it finished, and what it printed otherwise."""
        self.world.bucket.proxy.recover()
        start = self.start()
        with start.processes:
            codes = start.end()
            text = start.output()
        start.close()
        return codes == [0] * len(codes), "" if codes == [0] * len(codes) else f"{codes} {text[-2000:]}"

    def is_equal(self) -> bool:
        """Whether the run has ended as an undisturbed one."""
        workdir = self.stages()[-1]
        if len(self.counts) == 1:
            expected = self.world.undisturbed(self.objective, self.processes)
            same = _checksums(workdir) == _checksums(expected)
            load_run(workdir)  # Verifies the arrays.
            return same
        expected = self.world.undisturbed(self.objective, 1)
        close = [
            np.allclose(a, b, rtol=1e-3, atol=1e-4)
            for a, b in zip(
                *(jax.tree.leaves(load_run(one).params) for one in (workdir, expected)), strict=True
            )
        ]
        return all(close)


def _checksums(workdir: paths.Path) -> dict[str, int]:
    text = files.read_bytes(workdir / "checkpoints" / str(UPDATES) / "step" / "metadata")
    return json.loads(text)["checksums"]


def _wrong(hung: bool, codes: list[int], text: str, lost: int, bound: int | None) -> str:
    """Names the mistakes of a start that has met a fault; empty if there are none."""
    problems = ["a process hung"] if hung else []
    if bound is not None and lost > bound:
        problems.append(f"{lost} updates lost, at most {bound} expected")
    # A process that loses another one ends with JAX's own error.
    if "Traceback" in text and len(codes) == 1 and codes[0] >= 0:
        problems.append("a traceback")
    return "; ".join(problems)


@dataclasses.dataclass(frozen=True)
class Fault:
    """A kind of fault.

    Attributes:
      describes: for the table.
      during: acts on a running start; returns a note.
      before: acts before a start; returns a note.
      after: undoes what the start has to be protected from.
      storages: where it can happen.
      bound: most updates that it may cost; None if it lasts until the end. Damage to the newest checkpoint
        costs those since the one before.
      kills: seconds until the processes that it ends must have ended; later they are killed, as a cluster
        does. 0: the run goes on.
      slow: whether updates take longer than usual.
    """

    describes: str
    during: Callable[[Trial, Start], str | None] | None = None
    before: Callable[[Trial], str | None] | None = None
    after: Callable[[Trial], None] | None = None
    storages: tuple[str, ...] = ("disk", "bucket")
    bound: int | None = 0
    kills: float = 0.0
    slow: bool = False


def _signal_one(number: int) -> Callable[[Trial, Start], None]:
    def send(trial: Trial, start: Start) -> None:
        trial.rng.choice(start.processes.processes).send_signal(number)

    return send


def _kill_all(trial: Trial, start: Start) -> None:
    for process in start.processes.processes:
        process.kill()


def _pause(trial: Trial, start: Start) -> str:
    process, seconds = trial.rng.choice(start.processes.processes), trial.rng.uniform(0.2, 2)
    process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    process.send_signal(signal.SIGCONT)
    return f"{seconds:.1f} s"


def _mount(trial: Trial) -> None:
    """Puts the run on a file system of its own, which needs the rights of root."""
    trial.workdir.mkdir(exist_ok=True)
    if not os.path.ismount(trial.workdir):
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(trial.workdir)], check=True)


def _fill(seconds: float) -> Callable[[Trial, Start], str]:
    """Fills the file system for a while, or (0) until the processes end."""

    def fill(trial: Trial, start: Start) -> str:
        with contextlib.suppress(OSError), open(trial.workdir / _FILLER, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        if seconds:
            time.sleep(seconds)
            _make_room(trial)
        else:
            start.end()
        return f"{seconds} s" if seconds else "until the end"

    return fill


def _make_room(trial: Trial) -> None:
    (trial.workdir / _FILLER).unlink(missing_ok=True)


def _lose_permission(trial: Trial, start: Start) -> str:
    """Makes the directory of checkpoints immutable for a while, which stops even root."""
    found = [workdir / "checkpoints" for workdir in trial.stages() if (workdir / "checkpoints").is_dir()]
    for flag in ("+i", "-i"):
        subprocess.run(["chattr", flag, *map(str, found)], check=True) if found else None
        if flag == "+i":
            time.sleep(1.0)
    return "1 s" if found else "no checkpoint yet"


def _second_training(trial: Trial, start: Start) -> str:
    second = trial.start()
    with second.processes:
        codes, text = second.end(), second.output()
    second.close()
    if codes == [2] * len(codes) and " in use by " in text:
        return "refused"
    # It may have come before the first one took the lock, which was then refused, or after its last update.
    reached, last = start.position(r"^step (\d+)/"), UPDATES * len(trial.stages())
    if start.running and reached is not None and reached < last:
        start.problem = f"a second training in the workdir, which ended with {codes}"
    return "the first was refused or had ended"


def _busy(trial: Trial, start: Start) -> str:
    number = trial.rng.randint(1, 30)
    trial.world.bucket.proxy.fail(number)
    return f"{number} requests"


def _refuse(trial: Trial, start: Start) -> str:
    with trial.world.bucket.proxy.refusing("POST"):
        time.sleep(1.0)
    return "1 s"


def _cut(trial: Trial, start: Start) -> str:
    number = trial.rng.randint(1, 5)
    trial.world.bucket.proxy.cut(number)
    return f"{number} answers"


def _slow(trial: Trial) -> str:
    trial.world.bucket.proxy.slow(0.03)
    return "30 ms for each request"


def _recover(trial: Trial) -> None:
    trial.world.bucket.proxy.recover()


def _of_newest(damage: Callable[[Trial, paths.Path], str]) -> Callable[[Trial], str]:
    """Damages the newest checkpoint, if there is one."""

    def act(trial: Trial) -> str:
        found = trial.checkpoints()
        if len(found) < 2:
            return "no second checkpoint yet"  # If all were damaged, the run could not go on.
        # Saves that have failed may have made this gap larger than EVERY.
        trial.bound = int(found[0].name) - int(found[1].name)
        return damage(trial, found[0])

    return act


def _files_of(checkpoint: paths.Path) -> list[paths.Path]:
    return files._files_below(checkpoint)


def _random_file(trial: Trial, checkpoint: paths.Path) -> paths.Path:
    """A file of a checkpoint, large ones more often."""
    found = _files_of(checkpoint)
    return trial.rng.choices(found, weights=[files.size(path) + 1 for path in found])[0]


def _truncate(trial: Trial, checkpoint: paths.Path) -> str:
    path = _random_file(trial, checkpoint)
    content = files.read_bytes(path)
    files.write_whole(path, content[: trial.rng.randint(0, max(len(content) - 1, 0))])
    return str(path.relative_to(checkpoint))


def _flip(trial: Trial, checkpoint: paths.Path) -> str:
    path = _random_file(trial, checkpoint)
    content = bytearray(files.read_bytes(path))
    if content:
        content[trial.rng.randrange(len(content))] ^= 1 << trial.rng.randrange(8)
    files.write_whole(path, bytes(content))
    return str(path.relative_to(checkpoint))


def _half_delete(trial: Trial, checkpoint: paths.Path) -> str:
    found = _files_of(checkpoint)
    for path in trial.rng.sample(found, len(found) // 2):
        path.unlink()
    return f"{len(found) // 2} of {len(found)} files"


def _empty(trial: Trial, checkpoint: paths.Path) -> str:
    for path in _files_of(checkpoint):
        path.unlink()
    return "all files"


def _rename(trial: Trial, checkpoint: paths.Path) -> str:
    name = str(int(checkpoint.name) + trial.rng.choice([1, 5, 10**6]))
    files.move_directory(checkpoint, checkpoint.with_name(name))
    return f"{checkpoint.name} to {name}"


def _replace_data(trial: Trial) -> str:
    if not any((workdir / "run.json").exists() for workdir in trial.stages()):
        return "no run yet"  # It would be a run on the other data.
    trial.put_data(trial.world.other_data)
    return ""


def _restore_data(trial: Trial) -> None:
    trial.put_data(trial.world.data)


def _jump(trial: Trial) -> str:
    trial.clock = trial.rng.choice([-1, 1]) * trial.rng.choice([60.0, 3600.0, 10 * 86400.0])
    return f"{trial.clock:+.0f} s"


def _change_count(trial: Trial) -> str:
    trial.processes = 3 - trial.processes
    trial.counts.add(trial.processes)
    return f"to {trial.processes}"


_ON_DISK, _IN_BUCKET = ("disk",), ("bucket",)
# Updates since the last complete checkpoint, while the one after that is being saved.
_KILLED = 2 * EVERY
FAULTS = {
    "kill one": Fault("SIGKILL of one process", _signal_one(signal.SIGKILL), bound=_KILLED, kills=3),
    "kill all": Fault("SIGKILL of all processes", _kill_all, bound=_KILLED, kills=3),
    "SIGTERM": Fault("SIGTERM of one process", _signal_one(signal.SIGTERM), kills=60),
    "SIGINT": Fault("SIGINT of one process", _signal_one(signal.SIGINT), kills=60),
    "pause": Fault("SIGSTOP, then SIGCONT", _pause),
    "disk full": Fault("disk full for 1 s", _fill(1.0), before=_mount, storages=_ON_DISK, bound=_KILLED),
    "disk full for good": Fault(
        "disk full until the end",
        _fill(0.0),
        before=_mount,
        after=_make_room,
        storages=_ON_DISK,
        bound=None,
        kills=60,
    ),
    "permission": Fault("permission lost for 1 s", _lose_permission, storages=_ON_DISK, bound=_KILLED),
    "second training": Fault("another training in the workdir", _second_training, slow=True),
    "503": Fault("the storage is busy", _busy, storages=_IN_BUCKET, bound=_KILLED),
    "403": Fault("permission lost for 1 s", _refuse, storages=_IN_BUCKET, bound=_KILLED),
    "cut off": Fault("answers of the storage are cut off", _cut, storages=_IN_BUCKET, bound=_KILLED),
    "slow": Fault("slow storage", before=_slow, after=_recover, storages=_IN_BUCKET),
    "truncated": Fault("newest checkpoint: a file is cut off", before=_of_newest(_truncate)),
    "flipped": Fault("newest checkpoint: a bit is flipped", before=_of_newest(_flip)),
    "half deleted": Fault("newest checkpoint: half deleted", before=_of_newest(_half_delete)),
    "emptied": Fault("newest checkpoint: all files deleted", before=_of_newest(_empty)),
    "renamed": Fault("newest checkpoint: another number", before=_of_newest(_rename)),
    "data replaced": Fault("other data in the data set's place", before=_replace_data, after=_restore_data),
    "clock": Fault("the clock jumps", before=_jump),
    "process count": Fault("another number of processes", before=_change_count),
}


def kinds_of(trial: Trial, number: int) -> list[str]:
    """Random kinds of faults that are possible where the trial runs; every kind equally often."""
    possible = [kind for kind, fault in FAULTS.items() if trial.storage in fault.storages]
    return trial.rng.sample(possible, number)


_world: World | None = None


def run_trial(shared: Path, seed: int, number: int) -> list[dict[str, object]]:
    """Runs one trial in a worker process."""
    global _world
    if _world is None:
        _world = World(shared)
    trial = Trial(_world, seed)
    return trial.run(kinds_of(trial, number))


def table(records: list[dict[str, object]]) -> str:
    """The Markdown table of all faults."""
    lines = [
        "| fault | where | times | recovered | silently wrong | other mistakes | most updates lost | s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups = collections.defaultdict(list)
    for record in records:
        groups[record["fault"]].append(record)
    for kind, fault in FAULTS.items():
        if found := groups[kind]:
            lines.append(_row(fault.describes, found))
    lines.append(_row("**all**", records))
    return "\n".join(lines)


def _row(name: str, found: list[dict[str, object]]) -> str:
    where = " and ".join(sorted({record["storage"] for record in found}))
    recovered = sum(record["recovered"] for record in found)
    silent = sum(record["recovered"] and not record["equal"] for record in found)
    bounded = [record for record in found if record["bound"] is not None]
    lost = max((record["lost"] for record in bounded), default="")
    wrong = sum(bool(record["wrong"]) for record in found)
    seconds = sorted(record["seconds"] for record in found)[len(found) // 2]
    return f"| {name} | {where} | {len(found)} | {recovered} | {silent} | {wrong} | {lost} | {seconds:.1f} |"


def report(records: list[dict[str, object]], out: Path) -> str:
    """Writes the page with the table; returns it."""
    counts = collections.Counter((record["objective"], record["processes"]) for record in records)
    runs = len({record["seed"] for record in records})
    parts = ", ".join(f"{objective} in {n}: {count}" for (objective, n), count in sorted(counts.items()))
    dates = sorted({str(record["date"]) for record in records})
    version = ", ".join(f"{name} {value}" for name, value in sorted(records[-1]["versions"].items()))
    text = f"""# Faults survived

{len(records)} random faults in {runs} runs of {UPDATES} updates (for each stage), with a checkpoint every
{EVERY} updates; measured with `bash launch/faults.sh` from {dates[0]} to {dates[-1]} ({version}).

After each fault the same command was run again. *Recovered*: the run finished in the end. *Silently wrong*:
it finished with other parameters, averages, optimizer state or position in the data than an undisturbed run.
They are compared bit for bit, or up to rounding after a change of the number of processes. *Updates lost*:
those that had to be done again. Their bound: none after SIGTERM and SIGINT; {_KILLED}, twice the distance of
checkpoints, after SIGKILL and failures of the storage; after damage to the newest checkpoint, the distance to
the one before. *Other mistakes*: more updates lost, a process that hung, two trainings in one workdir, or a
traceback. *s*: median of the seconds of a start that meets the fault. *Bucket*: a server of Google Cloud
Storage's protocol on the same machine.

{table(records)}

By objective and number of processes: {parts}.
"""
    files.write_whole(out / "faults.md", text)
    return text


def _write(records: list[dict[str, object]], path: Path) -> list[dict[str, object]]:
    """Appends the records of a trial to the file, and prints those that show a mistake."""
    for record in records:
        record |= {
            "date": datetime.date.today().isoformat(),
            "versions": versions.record("jax", "orbax-checkpoint", "mcm_jax"),
        }
        if record["wrong"] or not record["recovered"] or not record["equal"]:
            print(json.dumps(record, indent=2), flush=True)
        # What was printed contains paths of this machine.
        del record["output"], record["message"]
        files.append_line(path, record)
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--faults", type=int, default=1000, help="number of faults")
    parser.add_argument("--per_run", type=int, default=6, help="faults in each run")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time")
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/faults"))
    parser.add_argument(
        "--quick", action="store_true", help="12 faults, with their table in a temporary directory"
    )
    options = parser.parse_args()
    if options.quick:
        # Some runs on disk and some in a bucket.
        options.faults, options.per_run, options.out = 12, 3, Path(tempfile.mkdtemp(prefix="faults_"))
    path = options.out / "faults.jsonl"
    options.out.mkdir(parents=True, exist_ok=True)
    records = [json.loads(line) for line in files.read_lines(path) if line] if path.exists() else []
    done = {record["seed"] for record in records}
    seeds = (seed for seed in itertools.count(options.first_seed) if seed not in done)
    failed, context = False, multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(options.workers, mp_context=context)
    with tempfile.TemporaryDirectory(prefix="faults_") as shared, pool, Progress() as bar:
        World.prepare(Path(shared))
        task = bar.add_task("faults", total=options.faults, completed=len(records))
        trials = set()
        while len(records) < options.faults or trials:
            while len(trials) < options.workers and len(records) < options.faults:
                trials.add(pool.submit(run_trial, Path(shared), next(seeds), options.per_run))
            ended, trials = concurrent.futures.wait(trials, return_when=concurrent.futures.FIRST_COMPLETED)
            for trial in ended:
                if (error := trial.exception()) is not None:
                    # A mistake of this program; the other trials still count.
                    traceback.print_exception(error)
                    failed = True
                else:
                    records += _write(trial.result(), path)
            bar.update(task, completed=len(records))
    print(report(records, options.out))
    wrong = any(not (record["recovered"] and record["equal"]) or record["wrong"] for record in records)
    return int(wrong or failed)


if __name__ == "__main__":
    sys.exit(main())
