"""Several processes train as one would: same batches, same numbers, one voice, one end."""

import functools
import json
import re
import shutil
import signal
import socket
import time

import jax
import numpy as np
import pytest
from PIL import Image

from mcm_jax.runs import workdirs
from mcm_jax.runs.run import load_run
from mcm_jax.system import distributed, software
from mcm_jax.system.errors import InputError
from mcm_jax.training.checkpoints import Checkpoints
from tests import tiny
from tests.members import Members, free_port, logged

DEVICES = 4  # in all

# Trains one run after another, each with a log of its losses and of the examples in its batches. Runs with
# equal settings share their compiled functions.
TRAIN = """
from tests import compiled

name = None
def recorded(of, method, record):
    original = getattr(of, method)
    def wrapped(self, *arguments):
        result = original(self, *arguments)
        record(self, *arguments, result)
        return result
    setattr(of, method, wrapped)

for kind in (observer.RunObserver, observer.SilentObserver):
    recorded(kind, "metrics", lambda self, step, values, _: log(name + "-metrics", [step, values]))

import numpy as np
gather = pipeline.ArraySource.gather
def read(self, indices):
    log(name + "-read", indices.tolist())
    return gather(self, indices)
pipeline.ArraySource.gather = read

sharding._SMALLEST_SHARDED = 1
finished = True
with distributed.joined(), compiled.shared({}):
    first_only()
    for run in json.loads('''RUNS'''):
        name = Path(run["workdir"]).name
        make = tiny.two_stage_config if run["two_stages"] else tiny.config
        config = make(Path(run["data"]), *run["objective"])
        config.training.update(run["training"])
        config.mesh.fsdp = run["fsdp"]
        # Where a gradient is zero but for its last bits, Adam would make an update of them.
        config.optimizer.eps = 1e-3
        finished &= trainer.train(config, Path(run["workdir"]))
assert "tensorflow" not in sys.modules  # It would delay every start by seconds.
sys.exit(0 if finished else 130)
"""


def a_run(data, workdir, *, fsdp=1, objective=(), two_stages=False, **settings):
    """The description of one run of TRAIN; `settings` are of config.training."""
    settings = {"num_steps": 4, "checkpoint_every_steps": 2, "log_every_steps": 1, **settings}
    objective = [str(argument) for argument in objective]
    return {
        "data": str(data),
        "workdir": str(workdir),
        "fsdp": fsdp,
        "training": settings,
        "objective": objective,
        "two_stages": two_stages,
    }


def training(*runs, count, directory, before=""):
    code = TRAIN.replace("RUNS", json.dumps(runs))
    return Members(before + code, count=count, devices=DEVICES // count, directory=directory)


def checkpoint_steps(workdir):
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.all_steps()


def params_of(workdir):
    return {kind: jax.device_get(load_run(workdir, parameters=kind).params) for kind in ("raw", "ema")}


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory):
    """number of processes -> (directory of runs named OBJECTIVE-FSDP, the processes that trained them)."""
    teacher = tiny.made_up_teacher(tiny_data, tmp_path_factory.mktemp("made_up") / "teacher")
    objectives = {"diffusion": ("diffusion",), "cd": ("cd", teacher)}

    @functools.cache
    def run(count):
        cases = ALONE_CASES if count == 1 else [case[::2] for case in CASES if case[1] == count]
        directory = tmp_path_factory.mktemp(f"of_{count}")
        runs = [
            a_run(
                tiny_data,
                directory / f"{objective}-{fsdp}",
                fsdp=fsdp,
                objective=objectives[objective],
                two_stages=True,
                checkpoint_every_steps=10,  # At the end only; others save on the way.
                sample_every_steps=4,
            )
            for objective, fsdp in cases
        ]
        with training(*runs, count=count, directory=directory / "logs") as members:
            assert members.codes() == [0] * count, members.everything()
        # One voice: the others are silent, and what they may not do ends them.
        assert members.output(0).count("step 4/4") == len(runs)
        assert not any(members.output(index) for index in range(1, count)), members.everything()
        return directory

    return run


# (objective, processes, fsdp): parameters are split within a process, and over all of them.
CASES = [("diffusion", 2, 2), ("cd", 2, 4)]
ALONE_CASES = [("diffusion", 1), ("cd", 1)]


@pytest.mark.parametrize(("objective", "count", "fsdp"), CASES)
def test_several_processes_are_one(objective, count, fsdp, trained):
    """Losses, parameters, pictures and examples, with split parameters; the next test has whole ones.

    Sums over devices in another order change the last bits.
    """
    alone, directory = trained(1), trained(count)
    of_one, of_several = f"{objective}-1", f"{objective}-{fsdp}"
    places = (directory / of_several, alone / of_one)
    expected = logged(alone / "logs", f"{of_one}-metrics", 0)
    assert [step for step, _ in expected] == [1, 2, 3, 4]
    for index in range(count):
        found = logged(directory / "logs", f"{of_several}-metrics", index)
        assert [step for step, _ in found] == [1, 2, 3, 4]
        for (_, a), (_, b) in zip(found, expected, strict=True):
            np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4)
            np.testing.assert_allclose(a["gradient_norm"], b["gradient_norm"], rtol=1e-3)
    a, b = (params_of(place) for place in places)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)

    # The examples of every batch are shared out: each read by one process, all by one of them.
    whole = logged(alone / "logs", f"{of_one}-read", 0)
    parts = [logged(directory / "logs", f"{of_several}-read", index) for index in range(count)]
    for number in range(2):  # The first epoch has 39 examples, two batches and a part.
        together = [example for part in parts for example in part[number]]
        assert together == whole[number] and len(set(together)) == 16
        assert all(len(part[number]) == 16 // count for part in parts)

    names = [{path.name for path in place.iterdir()} - {"samples"} for place in places]
    events = [[name for name in found if "tfevents" in name] for found in names]
    assert len(events[0]) == len(events[1]) == 1
    assert names[0] - set(events[0]) == names[1] - set(events[1])
    assert workdirs.read(directory / of_several).config.mesh.fsdp == fsdp
    pictures = [np.asarray(Image.open(place / "samples/step_0000004.png"), int) for place in places]
    assert np.abs(pictures[0] - pictures[1]).max() <= 2


def test_a_signal_to_one_stops_all_and_the_run_continues(tiny_data, tmp_path):
    """After the same update; two processes go on, bit for bit, and so does one but for the last bits.

    An interrupt of the other one stops them too.
    """

    def run(name, num_steps):
        return a_run(tiny_data, tmp_path / name, num_steps=num_steps, checkpoint_every_steps=10**6)

    # A save after every update takes no vote away; saves by time are due before each of them too.
    saving = a_run(tiny_data, tmp_path / "saving", num_steps=10**6, checkpoint_every_steps=1)
    saving["training"]["checkpoint_every_minutes"] = 1e-6
    with training(run("two", 10**6), saving, count=2, directory=tmp_path / "stopped") as members:
        members.wait_for(r"step 1\d/")
        members.processes[1].send_signal(signal.SIGTERM)
        members.wait_for(r"(?s)first update.*first update.*step 4/")
        members.processes[0].send_signal(signal.SIGINT)
        assert members.codes(timeout=60) == [130, 130], members.everything()
    (stopped,) = checkpoint_steps(tmp_path / "two")
    last = [logged(tmp_path / "stopped", "two-metrics", index)[-1] for index in (0, 1)]
    assert last[0] == last[1] and last[0][0] == stopped >= 10

    num_steps = stopped + 3
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    checkpoint = tmp_path / "two/checkpoints" / str(stopped)
    # All processes set both aside: one that has another number, and one that Orbax cannot read.
    shutil.copytree(checkpoint, checkpoint.with_name(str(10**6)))
    unreadable = shutil.copytree(checkpoint, checkpoint.with_name(str(stopped + 1)))
    record = json.loads((unreadable / "step/metadata").read_text())
    (unreadable / "step/metadata").write_text(json.dumps(record | {"step": stopped + 1}))
    shutil.rmtree(unreadable / "params")
    runs = run("two", num_steps), run("at once", num_steps)
    with training(*runs, count=2, directory=tmp_path / "continued") as members:
        assert members.codes() == [0, 0], members.everything()
        assert members.output(0).count(f"continuing at update {stopped}") == 1 and not members.output(1)
        assert members.output(0).count("checkpoint 1000000 is damaged (it was saved as") == 1
        assert members.output(0).count(f"checkpoint {stopped + 1} is damaged (") == 1
    with training(run("one", num_steps), count=1, directory=tmp_path / "by one") as members:
        assert members.codes() == [0], members.everything()
    whole = params_of(tmp_path / "at once")
    jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path / "two"), whole)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        params_of(tmp_path / "one"),
        whole,
    )


def test_a_failure_of_one_ends_all(tiny_data, tmp_path):
    """As soon as JAX misses heartbeats for 10 seconds, and not when it gives up waiting (five minutes)."""
    code = """
distributed._HEARTBEAT_SECONDS = 10
def fail(self, step, values):
    raise OSError("this host is broken\\nbeyond repair")
observer.SilentObserver.metrics = fail
"""
    run = a_run(tiny_data, tmp_path / "run", num_steps=10**6)
    with training(run, count=2, directory=tmp_path / "logs", before=code) as members:
        assert all(members.codes(timeout=120)), members.everything()
    first, second = (members.output(index, "err").splitlines() for index in range(2))
    assert second[0] == (
        f"error: process 1 of 2, on {socket.gethostname()}, fails: OSError: this host is broken; "
        "the others end within 10 s"
    )
    # JAX's own words name the process that is gone.
    assert "unhealthy" in first[0] and first[1] == "1"


def test_a_checkpoint_that_the_first_cannot_complete_ends_all(tiny_data, tmp_path):
    """The others wait for it; it must not wait for them, which Orbax does for 20 minutes."""
    code = """
import orbax.checkpoint
from etils import epath
if INDEX == "0":
    rename = type(epath.Path("/")).rename
    def fail(self, target):
        if Path(target).name == "2":
            raise PermissionError(13, "Permission denied", str(target))
        return rename(self, target)
    type(epath.Path("/")).rename = fail
"""
    run = a_run(tiny_data, tmp_path / "run", num_steps=10**6)
    with training(run, count=2, directory=tmp_path / "logs", before=code) as members:
        assert all(members.codes(timeout=120)), members.everything()
    assert "Permission denied" in members.output(0, "err")
    assert checkpoint_steps(tmp_path / "run") == []


# Without training.


def joined(code, directory, *, count=2, **environment):
    """What `count` processes log as "seen" in this code, which runs after they have joined."""
    with Members(code, count=count, devices=1, directory=directory, environment=environment) as members:
        assert members.codes() == [0] * count, members.everything()
    return [logged(directory, "seen", index) for index in range(count)]


MISTAKES = """
distributed._SHARED_SECONDS = 1.0
place, data = Path(sys.argv[1]), Path(DATA)
def attempt(config, workdir):
    refused(lambda: trainer.train(config, workdir))
def refused(call):
    try:
        call()
    except InputError as error:
        log("seen", str(error))
with distributed.joined():
    mine = jax.process_index() == 1
    os.chdir(place if mine else data.parent)
    attempt(tiny.config(data.name), place / "run")
    config = tiny.config(data)
    config.seed = jax.process_index()
    attempt(config, place / "run")
    attempt(tiny.config(data), place / ("elsewhere" if mine else "run"))
    config.objective = "gan" if mine else "diffusion"
    attempt(config, place / "run")
    assert not list(place.glob("*/run.json"))
    from mcm_jax.system import software
    distributed.require_same_code()
    versions, source = software.library_versions(), software.source_hash()
    software.library_versions = lambda: versions | {"jax": "0.1"} if mine else versions
    refused(distributed.require_same_code)
    software.source_hash = lambda: "edited" if mine else source
    refused(distributed.require_same_code)
"""


def test_a_mistake_in_one_process_is_told_in_all(tiny_data, tmp_path):
    code = MISTAKES.replace("DATA", repr(str(tiny_data)))
    first, second = joined(code, tmp_path / "logs")
    elsewhere = "process 1 of 2 has failed; see its output"
    differ = "the configs and workdirs of processes 0 and 1 differ; start all processes with the same command"
    other_code = [
        f"the {what} of processes 0 and 1 differ; start all processes with the same command, from the same"
        for what in ("versions of Python and its libraries", "source files of mcm_jax")
    ]
    for line, start in zip(first, [elsewhere, differ, elsewhere, elsewhere, *other_code], strict=True):
        assert line.startswith(start)
    for line, part in zip(
        second,
        ["folder/tiny", differ, "elsewhere is another directory in process 1", "'gan'", *other_code],
        strict=True,
    ):
        assert part in line


SEEN = """
with distributed.joined():
    log("seen", [jax.process_count(), jax.device_count(), distributed.is_first()])
"""


def test_slurm_is_recognised(tmp_path):
    """By jax.distributed, from what srun sets; its coordinator is on the first host."""
    code = (
        "os.environ['SLURM_PROCID'] = os.environ['SLURM_LOCALID'] = os.environ.pop('MCM_PROCESS_ID')\n" + SEEN
    )
    step = {"SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}
    port = {"JAX_COORDINATOR_PORT": str(free_port())}
    seen = joined(code, tmp_path / "logs", MCM_COORDINATOR="", MCM_NUM_PROCESSES="", **step, **port)
    assert seen == [[[2, 2, True]], [[2, 2, False]]]


ALONE = """
import warnings
warnings.simplefilter("error")
step = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "a", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
for environment in [
    {},
    {"MCM_NUM_PROCESSES": "1", "SLURM_NTASKS": "2", **step},
    {"MCM_NUM_PROCESSES": "1", "MCM_COORDINATOR": "10.0.0.1:99", "MCM_PROCESS_ID": "0"},
    {"SLURM_NTASKS": "1", **step},
    {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
]:
    os.environ.update(environment)
    with distributed.joined():
        log("seen", jax.distributed.is_initialized())
    for name in environment:
        del os.environ[name]
with distributed.joined(), distributed.fail_together():
    distributed.require_same(1, "numbers")
    distributed.require_shared(Path("/nonexistent"), "--workdir")
    assert distributed.broadcast(True) and not distributed.exists(Path("/nonexistent"))
"""


def test_a_process_alone_is_left_so(tmp_path):
    """What jax.distributed does in one process would cost it all devices but one on SLURM."""
    assert joined(ALONE, tmp_path / "logs", count=1) == [[False] * 5]


def test_a_cluster_is_left_to_jax(monkeypatch):
    """Without variables of ours it gets no argument: what it finds out is its own."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **named: calls.append((given, named)))
    with distributed.joined():
        assert calls == [((), {"heartbeat_timeout_seconds": 100})]


def test_processes_that_join_must_run_the_same_code(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: None)
    compared = []
    monkeypatch.setattr(distributed, "require_same", lambda value, what: compared.append((what, value)))
    with distributed.joined():
        assert compared == [
            ("the source files of mcm_jax", software.source_hash()),
            ("the versions of Python and its libraries", software.library_versions()),
        ]


def test_an_error_of_the_cluster_is_told(monkeypatch):
    def fail(**_):
        raise ValueError("invalid literal for int() with base 10: 'two'")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(ValueError, match="invalid literal"), distributed.joined():
        pass


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("host:1", "2", None), "MCM_PROCESS_ID is not set"),
        ((None, "2", None), "MCM_COORDINATOR, MCM_PROCESS_ID is not set"),
        (("host:1", None, "0"), "MCM_NUM_PROCESSES is not set"),
        (("host", "2", "0"), "MCM_COORDINATOR=host is not HOST:PORT"),
        (("host:", "2", "0"), "MCM_COORDINATOR=host: is not HOST:PORT"),
        (("host:1", "two", "0"), "MCM_NUM_PROCESSES=two is not a number"),
        (("host:1", "2", "-1"), "MCM_PROCESS_ID=-1 is not a number"),
        (("host:1", "2", "2"), "MCM_PROCESS_ID=2 of MCM_NUM_PROCESSES=2: process IDs start at 0"),
    ],
)
def test_variables_that_do_not_say_who_is_who(given, message, monkeypatch):
    for name, value in zip(
        (distributed.COORDINATOR, distributed.COUNT, distributed.INDEX), given, strict=True
    ):
        monkeypatch.setenv(name, value or "")
    with pytest.raises(InputError, match=re.escape(message)), distributed.joined():
        pass


def test_one_that_does_not_come_is_waited_for_aloud(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "_WAITING_SECONDS", 0.01)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: time.sleep(0.3))
    values = {distributed.COORDINATOR: "host:1", distributed.COUNT: "3", distributed.INDEX: "1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with distributed.joined():
        assert capsys.readouterr().err == "waiting for other processes: 2 more, with MCM_COORDINATOR=host:1\n"


def test_a_process_that_is_wrong_alone_does_not_wait_for_the_others(tmp_path):
    code = """
distributed._EXIT_SECONDS = 1.0
with distributed.joined():
    if INDEX == "1":
        raise InputError("no such file here")
    distributed.require_same(1, "numbers")
"""
    with Members(code, count=2, devices=1, directory=tmp_path / "logs") as members:
        codes = members.codes(timeout=150)
        assert codes[1] == 2 and codes[0] != 0, members.everything()
