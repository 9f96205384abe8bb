"""What is saved comes back as it was, the newest unless another is asked for."""

import contextlib
import errno
import os
import re
import resource
import shutil
import signal
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from mcm_jax.system import files, sharding
from mcm_jax.system.errors import InputError
from mcm_jax.training import checkpoints as module
from mcm_jax.training.checkpoints import Checkpoints, DamagedError
from mcm_jax.training.state import TrainState

ADAM = optax.adam(0.1)
MESH = jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])


def state_at(step):
    """Every array differs from every other and from those of another step."""
    params = {"w": jnp.arange(6.0).reshape(2, 3) + 100 * step, "b": jnp.full(3, step + 0.5)}
    moments = jax.tree.map(lambda leaf: (leaf * 7 + step).astype(leaf.dtype), ADAM.init(params))
    ema = jax.tree.map(lambda leaf: leaf + 0.25, params)
    return TrainState(jnp.int32(step), params, ema, moments)


def batches(taken=0):
    dataset = grain.MapDataset.range(100).to_iter_dataset(grain.ReadOptions(num_threads=0))
    iterator = iter(dataset)
    for _ in range(taken):
        next(iterator)
    return iterator


def saved(workdir, *steps, keep=9, **options):
    with Checkpoints(workdir, keep=keep, **options) as checkpoints:
        for step in steps:
            checkpoints.save(state_at(step), batches(taken=step), step=step)
    return workdir


def targets(mesh=MESH):
    abstract = jax.eval_shape(lambda: state_at(0))
    return abstract, sharding.params_sharding(mesh, abstract)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_newest_state_and_the_place_in_the_data_come_back(tmp_path):
    saved(tmp_path, 3, 20, 100)
    data = batches()
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        state = checkpoints.restore(*targets(), data)
    assert_equal(state, state_at(100))
    data = batches()
    with Checkpoints(saved(tmp_path / "other", 3, 20), keep=9) as checkpoints:
        assert_equal(checkpoints.restore(*targets(), data), state_at(20))
    assert next(data) == 20


@pytest.mark.parametrize("parameters", ["ema", "raw"])
@pytest.mark.parametrize("step", [None, 3, 20])
def test_parameters_alone(parameters, step, tmp_path):
    saved(tmp_path, 3, 20, 100)
    abstract, shardings = targets()
    with Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore_params(
            abstract.params, shardings.params, parameters=parameters, step=step
        )
    state = state_at(100 if step is None else step)
    assert_equal(found, state.ema_params if parameters == "ema" else state.params)


def test_what_there_is(tmp_path):
    with Checkpoints(saved(tmp_path, 3, 20, 100, keep=2)) as checkpoints:
        assert checkpoints.latest_step() == 100
        assert checkpoints.all_steps() == checkpoints.require() == [20, 100]


def test_multiples_of_a_number_are_kept_for_good(tmp_path):
    with Checkpoints(saved(tmp_path, 10, 20, 30, 50, 60, keep=1, keep_every=20)) as checkpoints:
        assert checkpoints.all_steps() == [20, 60]


def test_nothing_there(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None and checkpoints.all_steps() == []
        with pytest.raises(InputError, match=r"no checkpoint under .*checkpoints; train there first"):
            checkpoints.require()
        with pytest.raises(InputError, match="no checkpoint under"):
            checkpoints.restore_params(*(tree.params for tree in targets()), parameters="ema")
    # Whoever only reads leaves nothing behind.
    assert not list(tmp_path.iterdir())


def test_a_step_that_is_not_there(tmp_path):
    with Checkpoints(saved(tmp_path, 3, 20)) as checkpoints:
        with pytest.raises(InputError, match=r"no checkpoint of step 4 under .*; available steps: \[3, 20\]"):
            checkpoints.restore_params(*(tree.params for tree in targets()), parameters="ema", step=4)


def test_a_step_is_saved_once(tmp_path):
    saved(tmp_path, 3, 3)
    saved(tmp_path, 3)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.all_steps() == [3]


def test_saving_is_no_transfer_by_mistake(tmp_path):
    state, data = state_at(3), batches()
    with Checkpoints(tmp_path, keep=9) as checkpoints, jax.transfer_guard("disallow"):
        checkpoints.finish(state, data, step=3)
        assert checkpoints.all_steps() == [3]


def test_it_waits_for_the_last_save(tmp_path):
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        checkpoints.finish(state_at(2), batches(), step=2)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
        checkpoints.save(state_at(3), batches(), step=3)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2", "3"}


@contextlib.contextmanager
def no_room(limit=50):
    """Every file that grows beyond `limit` bytes is refused, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_failed_save_is_reported_and_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "_RETRY_SECONDS", 0.2)
    with Checkpoints(saved(tmp_path, 3), keep=9) as checkpoints:
        checkpoints.restore(*targets(), batches())
        assert checkpoints.saved == 3 and not checkpoints.retry_is_due()
        with no_room():
            checkpoints.save(state_at(5), batches(taken=5), step=5)
            until = time.monotonic() + 20
            while not checkpoints.retry_is_due() and time.monotonic() < until:
                time.sleep(0.01)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
        assert re.fullmatch(r"note: a checkpoint could not be saved \(.+\); the save will be repeated", line)
        assert checkpoints.saved == 3 and checkpoints.retry_is_due()
        checkpoints.save(state_at(6), batches(taken=6), step=6)
        assert not checkpoints.retry_is_due()
        checkpoints.finish(state_at(7), batches(taken=7), step=7)
        assert checkpoints.saved == 7 and checkpoints.all_steps() == [3, 6, 7]
        state, data = checkpoints.restore(*targets(), data := batches()), data
    assert_equal(state, state_at(7))


def test_a_failed_save_deletes_no_older_checkpoint(tmp_path, monkeypatch, capsys):
    """Even if it is noticed while Orbax still writes. Without capsys, stderr would be a file without room."""
    monkeypatch.setattr(module, "_RETRY_SECONDS", 0.0)
    large = np.random.default_rng(0).normal(size=200_000).astype(np.float32)  # Does not compress.
    for step in range(4, 10):
        state = state_at(step)._replace(params={"w": jnp.asarray(large), "b": jnp.zeros(3)})
        with Checkpoints(saved(tmp_path, 3, keep=1), keep=1) as checkpoints:
            with no_room(200_000):
                checkpoints.save(state, batches(), step=step)
                until = time.monotonic() + 20
                while not checkpoints.retry_is_due() and time.monotonic() < until:
                    pass
            assert checkpoints.retry_is_due() and checkpoints.all_steps() == [3]
        assert (tmp_path / "checkpoints" / "3" / "params").is_dir()


def test_a_directory_that_cannot_be_created_stops_no_training(tmp_path, monkeypatch, capsys):
    """Orbax would create it in a thread, and if that failed wait 20 minutes for it."""
    makedirs = os.makedirs

    def refuse(path, *arguments, **named):
        if "orbax-checkpoint-tmp" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        makedirs(path, *arguments, **named)

    with Checkpoints(saved(tmp_path, 3), keep=9) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(os, "makedirs", refuse)
            start = time.monotonic()
            checkpoints.save(state_at(5), batches(taken=5), step=5)
            assert time.monotonic() - start < 30
        assert "note: a checkpoint could not be saved" in capsys.readouterr().err
        checkpoints.finish(state_at(6), batches(taken=6), step=6)
        assert checkpoints.all_steps() == [3, 6]


@pytest.mark.parametrize("save", [Checkpoints.save, Checkpoints.finish])
def test_a_process_that_cannot_save_waits_for_no_other(save, tmp_path, monkeypatch):
    """The others wait for it in Orbax, until it ends."""
    checkpoints = Checkpoints(saved(tmp_path, 3), keep=9)

    def fail(*_, **__):
        raise PermissionError("no")

    with monkeypatch.context() as patch:
        patch.setattr(module.distributed, "is_multi_process", lambda: True)
        patch.setattr(checkpoints._manager, "save", fail)
        patch.setattr(checkpoints._manager, "close", lambda: pytest.fail("it waits"))
        with pytest.raises(PermissionError, match="no"), checkpoints:
            save(checkpoints, state_at(5), batches(), step=5)
    checkpoints._manager.close()


def test_the_last_save_is_repeated_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "_FINAL_RETRY_SECONDS", (0.0, 0.0))
    with Checkpoints(saved(tmp_path, 3), keep=9) as checkpoints:
        with no_room(), pytest.raises((OSError, ValueError), match="File too large"):
            checkpoints.finish(state_at(5), batches(taken=5), step=5)
        assert capsys.readouterr().err.count("note: a checkpoint could not be saved") == 2
        assert checkpoints.all_steps() == [3]
        checkpoints.finish(state_at(5), batches(taken=5), step=5)
        assert checkpoints.all_steps() == [3, 5]


@pytest.mark.multi_device
def test_a_checkpoint_of_one_device_is_split_over_eight(tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "_SMALLEST_SHARDED", 1)
    mesh = sharding.make_mesh(data=4, fsdp=2)
    abstract, shardings = targets(mesh)
    with Checkpoints(saved(tmp_path, 3), keep=9) as checkpoints:
        state = checkpoints.restore(abstract, shardings, batches())
        params = checkpoints.restore_params(abstract.params, shardings.params, parameters="raw")
    assert_equal(jax.device_get(state), jax.device_get(state_at(3)))
    for tree in (state.params, state.ema_params, state.opt_state[0].mu, params):
        assert tree["w"].addressable_shards[0].data.shape == (1, 3)
    assert len(state.step.sharding.device_set) == 8


# Damage.


def flip_a_bit(checkpoint, rng):
    """In one of the files, weighted by size."""
    found = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    sizes = np.array([path.stat().st_size for path in found])
    path = found[rng.choice(len(found), p=sizes / sizes.sum())]
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    path.write_bytes(content)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("two"), 3, 20)


def test_no_flipped_bit_is_trained_on(two_checkpoints, tmp_path, capsys):
    """The state is that of the newest checkpoint or, with a message, that of the one before."""
    used = []
    for seed in range(30):
        workdir = tmp_path / str(seed)
        shutil.copytree(two_checkpoints, workdir)
        flip_a_bit(workdir / "checkpoints/20", np.random.default_rng(seed))
        data = batches()
        with Checkpoints(workdir, keep=9) as checkpoints:
            state = checkpoints.restore(*targets(), data)
        step = int(state.step)
        assert_equal(state, state_at(step))
        assert next(data) == step
        told = "checkpoint 20 is damaged" in capsys.readouterr().out
        assert told == (step == 3) == (workdir / "damaged_checkpoints/20").exists()
        used.append(step)
    # Some bits change nothing.
    assert set(used) == {3, 20} and used.count(3) >= 5


def test_no_flipped_bit_is_sampled_from(two_checkpoints, tmp_path):
    messages = []
    abstract, shardings = targets()
    for seed in range(30):
        workdir = tmp_path / str(seed)
        shutil.copytree(two_checkpoints, workdir)
        flip_a_bit(workdir / "checkpoints/20/ema_params", np.random.default_rng(seed))
        with Checkpoints(workdir) as checkpoints:
            try:
                found = checkpoints.restore_params(abstract.params, shardings.params, parameters="ema")
            except DamagedError as error:
                messages.append(str(error))
                continue
        assert_equal(found, state_at(20).ema_params)
    assert 0 < len(messages) < 30
    for message in messages:
        assert re.fullmatch(r"checkpoint 20 under .* is damaged \(.*\); use another one of \[3\]", message)


@pytest.mark.parametrize("item", ["params", "ema_params"])
def test_arrays_of_another_step_are_no_parameters(item, two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "run")
    newest = tmp_path / "run/checkpoints/20"
    shutil.rmtree(newest / item)
    shutil.copytree(newest.with_name("3") / item, newest / item)
    abstract, shardings = targets()
    parameters = {"params": "raw", "ema_params": "ema"}[item]
    with Checkpoints(tmp_path / "run") as checkpoints:
        with pytest.raises(DamagedError, match=f"its {item} differ from what was saved"):
            checkpoints.restore_params(abstract.params, shardings.params, parameters=parameters)


def replace_by_file(path):
    shutil.rmtree(path)
    path.write_text("")


DAMAGE = {
    "empty": lambda newest: [path.write_bytes(b"") for path in newest.rglob("*") if path.is_file()],
    "emptied": lambda newest: (shutil.rmtree(newest), newest.mkdir()),
    "half deleted": lambda newest: shutil.rmtree(newest / "opt_state"),
    "a file": replace_by_file,
    "another number": lambda newest: newest.rename(newest.with_name("25")),
    "a great number": lambda newest: newest.rename(newest.with_name(str(10**30))),
    "no position in the data": lambda newest: shutil.rmtree(newest / "data"),
    "moments of another step": lambda newest: (
        shutil.rmtree(newest / "opt_state"),
        shutil.copytree(newest.with_name("3") / "opt_state", newest / "opt_state"),
    ),
    "another position": lambda newest: shutil.copytree(
        newest.with_name("3") / "data", newest / "data", dirs_exist_ok=True
    ),
    "no JSON": lambda newest: (newest / "step/metadata").write_bytes(b"\xff["),
    "nested JSON": lambda newest: (newest / "step/metadata").write_text("[" * 100_000),
    "no record": lambda newest: (newest / "step/metadata").write_text("[]"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_checkpoint_before_a_damaged_one_is_used(kind, two_checkpoints, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(two_checkpoints, workdir)
    DAMAGE[kind](workdir / "checkpoints/20")
    (moved,) = (path for path in (workdir / "checkpoints").iterdir() if path.name != "3")
    data = batches()
    with Checkpoints(workdir, keep=9) as checkpoints:
        assert checkpoints.any()
        assert_equal(checkpoints.restore(*targets(), data), state_at(3))
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f"checkpoint {moved.name} is damaged (")
        assert line.endswith(f"was moved to {workdir}/damaged_checkpoints/{moved.name}; using checkpoint 3")
        assert checkpoints.all_steps() == [3] and checkpoints.latest_step() == 3
        checkpoints.save(state_at(20), batches(taken=20), step=20)
    # Damaged once more, it does not replace what was set aside before.
    DAMAGE[kind](workdir / "checkpoints/20")
    with Checkpoints(workdir, keep=9) as checkpoints:
        assert_equal(checkpoints.restore(*targets(), batches()), state_at(3))
    assert {path.name for path in (workdir / "damaged_checkpoints").iterdir()} == {
        moved.name,
        f"{moved.name}_again",
    }


def test_if_all_are_damaged_they_stay(two_checkpoints, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(two_checkpoints, workdir)
    for step in (3, 20):
        (workdir / f"checkpoints/{step}/step/metadata").write_text("")
    with Checkpoints(workdir, keep=9) as checkpoints:
        with pytest.raises(InputError, match=r"no checkpoint .* can be restored \(20: .*; 3: .*\); restore"):
            checkpoints.restore(*targets(), batches())
        assert checkpoints.all_steps() == [3, 20]
        assert checkpoints.any() and checkpoints.latest_step() is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PermissionError(13, "Permission denied"), InputError),
        (OSError(errno.EIO, "Input/output error"), InputError),
        (MemoryError(), MemoryError),
    ],
)
def test_a_failure_of_the_machine_is_no_damage(error, expected, two_checkpoints, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(two_checkpoints, workdir)
    read_bytes = files.read_bytes

    def fail(path):
        if str(path) == str(workdir / "checkpoints/20/step/metadata"):
            raise error
        return read_bytes(path)

    with Checkpoints(workdir, keep=9) as checkpoints:
        monkeypatch.setattr(files, "read_bytes", fail)
        with pytest.raises(expected) as raised:
            checkpoints.restore(*targets(), batches())
        assert not isinstance(raised.value, DamagedError)
    assert not (workdir / "damaged_checkpoints").exists()


class HttpError(Exception):
    """As gcsfs raises it."""

    __module__ = "gcsfs.retry"


@pytest.mark.parametrize(
    "error",
    [
        ValueError("UNAVAILABLE: Error reading object"),
        HttpError("Service Unavailable, 503"),
        OSError(errno.EIO, "the server is busy", "gs://bucket/x"),
    ],
)
def test_storage_that_fails_is_no_damage(error, two_checkpoints, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(two_checkpoints, workdir)

    def fail(*_, **__):
        raise error

    with Checkpoints(workdir, keep=9) as checkpoints:
        monkeypatch.setattr(module.ocp.CheckpointManager, "restore", fail)
        with pytest.raises(type(error)):
            checkpoints.restore(*targets(), batches())
    assert not (workdir / "damaged_checkpoints").exists()


@pytest.fixture
def ctrl_c():
    """SIGINT interrupts, as in a terminal: in the background, a shell may have these tests ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_that_is_ignored_stays_ignored(two_checkpoints, ctrl_c):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with module._interruptible():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_ctrl_c_while_its_handler_is_installed_is_not_lost(ctrl_c, monkeypatch):
    """Python may deliver a signal within `signal.signal`, before that returns."""
    install = signal.signal

    def delivered(number, handler):
        before = install(number, handler)
        signal.raise_signal(signal.SIGINT)
        return before

    monkeypatch.setattr(signal, "signal", delivered)
    with pytest.raises(KeyboardInterrupt), module._interruptible():
        pass


def test_an_interrupted_read_is_no_damage(two_checkpoints, tmp_path, capsys, ctrl_c):
    """Ctrl-C at any time: most delays lie within the read, where Orbax would make an error of it."""
    shutil.copytree(two_checkpoints, workdir := tmp_path / "run")
    restored, arguments = [], (*targets(), batches())

    def restore(checkpoints):
        restored.append(checkpoints.restore(*arguments))
        time.sleep(5)  # A signal after the read interrupts this.

    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    for delay in np.linspace(0.001, 0.06, 30):
        with Checkpoints(workdir) as checkpoints:
            signal.setitimer(signal.ITIMER_REAL, delay)
            with pytest.raises(KeyboardInterrupt):
                restore(checkpoints)
    assert len(restored) < 25
    assert "damaged" not in capsys.readouterr().out
    assert sorted(os.listdir(workdir / "checkpoints")) == ["20", "3"]


def test_checkpoints_of_older_versions_have_no_checksums(two_checkpoints, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(two_checkpoints, workdir)
    (workdir / "checkpoints/20/step/metadata").write_text('{"step": 20}')
    with Checkpoints(workdir, keep=9) as checkpoints:
        assert_equal(checkpoints.restore(*targets(), batches()), state_at(20))
