"""What is saved comes back as it was, the newest unless another is asked for."""

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from mcm_jax.system import sharding
from mcm_jax.system.errors import InputError
from mcm_jax.training.checkpoints import Checkpoints
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


def saved(workdir, *steps, keep=9):
    with Checkpoints(workdir, keep=keep) as checkpoints:
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
        checkpoints.save(state, data, step=3)
        checkpoints.wait()
        assert checkpoints.all_steps() == [3]


@pytest.mark.parametrize("end", [Checkpoints.wait, lambda checkpoints: checkpoints.__exit__()])
def test_it_waits_for_the_last_save(end, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=9)
    checkpoints.save(state_at(3), batches(), step=3)
    end(checkpoints)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
    checkpoints.__exit__()


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
