"""One update, on one and on eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from mcm_jax.system import sharding
from mcm_jax.training import step


def mesh_of(data, fsdp):
    devices = jax.devices()[: data * fsdp]
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def init_params():
    # Large enough for fsdp to split the matrix; the bias stays whole.
    return {"w": jax.random.normal(jax.random.key(0), (256, 64)) / 16, "b": jnp.zeros(64)}


def loss_fn(params, teacher_params, target_params, batch, key, train_step):
    del teacher_params, target_params, train_step
    noise = jax.random.normal(key, batch["image"].shape)
    prediction = (batch["image"] + 0.1 * noise) @ params["w"] + params["b"]
    return jnp.mean((prediction - batch["label"][:, None]) ** 2, axis=1)


def gathering(mesh):
    """`loss_fn` of parameters that are gathered first, as real losses are."""
    return lambda params, *rest: loss_fn(sharding.gathered(mesh, params), *rest)


def batches(count):
    rng = np.random.default_rng(0)
    return [
        {
            "image": rng.normal(size=(16, 256)).astype(np.float32),
            "label": rng.integers(0, 5, 16).astype(np.int32),
        }
        for _ in range(count)
    ]


def run(
    mesh,
    *,
    updates=3,
    ema_decay=0.9,
    target_decay=None,
    accumulation_steps=1,
    seed=0,
    loss=loss_fn,
    optimizer=None,
):
    optimizer = optimizer or optax.adam(1e-2)
    init = functools.partial(step.init_state, optimizer=optimizer, target_decay=target_decay)
    abstract = jax.eval_shape(lambda: init(init_params()))
    shardings = sharding.params_sharding(mesh, abstract)
    state = jax.jit(init, out_shardings=shardings)(init_params())
    update = step.Update(
        loss_fn=loss,
        optimizer=optimizer,
        ema_decay=ema_decay,
        seed=seed,
        target_decay=target_decay,
        accumulation_steps=accumulation_steps,
    )
    train_step = step.make_train_step(update, mesh=mesh, state_sharding=shardings, teacher_sharding=None)
    losses = []
    for batch in batches(updates):
        state, metrics = train_step(state, None, sharding.global_batch(mesh, batch))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.multi_device
@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (1, 8)])
@pytest.mark.parametrize("gathered", [False, True])
def test_eight_devices_train_like_one(shape, gathered):
    one, losses_one = run(mesh_of(1, 1))
    mesh = mesh_of(*shape)
    many, losses_many = run(mesh, loss=gathering(mesh) if gathered else loss_fn)
    # Sums over the batch are taken in another order.
    np.testing.assert_allclose(losses_many, losses_one, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-6)


def example_by_example(params, teacher_params, target_params, batch, key, train_step):
    """Without randomness: a part of the batch has the same losses as in the whole."""
    prediction = batch["image"] @ params["w"] + params["b"]
    return jnp.mean((prediction - batch["label"][:, None]) ** 2, axis=1)


def test_parts_of_a_batch_add_up_to_it():
    """Without randomness the mean over parts is the mean over the batch."""
    whole, losses = run(mesh_of(1, 1), loss=example_by_example)
    parts, losses_of_parts = run(mesh_of(1, 1), loss=example_by_example, accumulation_steps=4)
    np.testing.assert_allclose(losses_of_parts, losses, rtol=1e-6)
    # Sums in another order, three updates of Adam on.
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-6)


def test_every_part_has_randomness_of_its_own():
    """The mean over parts i of the gradient of examples i, i + 2, ... with the key fold_in(key, i)."""
    key, batch = jax.random.key(3), jax.tree.map(jnp.asarray, batches(1)[0])
    params = init_params()

    def value_and_grad(part, key):
        return jax.value_and_grad(lambda p: jnp.mean(loss_fn(p, None, None, part, key, 0)))(params)

    value, gradient = step.accumulated(value_and_grad, batch, key, parts=2)
    ones = [
        value_and_grad({name: array[i::2] for name, array in batch.items()}, jax.random.fold_in(key, i))
        for i in range(2)
    ]
    np.testing.assert_allclose(value, (ones[0][0] + ones[1][0]) / 2, rtol=1e-6)
    expected = jax.tree.map(lambda a, b: (a + b) / 2, ones[0][1], ones[1][1])
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.multi_device
def test_parts_of_a_batch_on_eight_devices():
    one, losses_one = run(mesh_of(1, 1), accumulation_steps=2)
    mesh = mesh_of(2, 4)
    many, losses_many = run(mesh, accumulation_steps=2, loss=gathering(mesh))
    np.testing.assert_allclose(losses_many, losses_one, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-6)


@pytest.mark.multi_device
def test_fsdp_splits_what_is_large():
    state, _ = run(mesh_of(1, 8), updates=1)
    for tree in (state.params, state.ema_params, state.opt_state[0].mu):
        assert tree["w"].addressable_shards[0].data.shape == (32, 64)
        assert tree["b"].addressable_shards[0].data.shape == (64,)


def test_update_equals_optax_by_hand():
    params, ema_decay = init_params(), 0.9
    optimizer = optax.adam(1e-2)
    opt_state, ema = optimizer.init(params), params
    for i, batch in enumerate(batches(3)):
        key = jax.random.fold_in(jax.random.key(5), i)
        gradient = jax.grad(lambda p, b=batch, k=key: loss_fn(p, None, None, b, k, 0).mean())(params)
        updates, opt_state = optimizer.update(gradient, opt_state)
        params = jax.tree.map(jnp.add, params, updates)
        ema = jax.tree.map(lambda e, p: ema_decay * e + (1 - ema_decay) * p, ema, params)
    state, _ = run(mesh_of(1, 1), ema_decay=ema_decay, seed=5)
    for a, b in zip(
        jax.tree.leaves((state.params, state.ema_params)), jax.tree.leaves((params, ema)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert int(state.step) == 3


def test_one_compilation_for_the_whole_run():
    """Nothing depends on the step in Python: the step is an array."""
    traces = []

    def counted(params, teacher_params, target_params, batch, key, train_step):
        traces.append(train_step)
        return loss_fn(params, teacher_params, target_params, batch, key, train_step) * (1 + train_step)

    run(mesh_of(1, 1), updates=4, loss=counted)
    assert len(traces) == 1


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95, 0.9999])
def test_the_target_average_is_bias_corrected(decay):
    """sum_j m^(k-j) theta_j / sum_j m^(k-j) of the parameters after each update, and nothing of the first."""
    optimizer = optax.adam(1e-2)
    history = []

    def watch(params, teacher_params, target_params, batch, key, train_step):
        return loss_fn(params, teacher_params, None, batch, key, train_step)

    for updates in (1, 2, 3):
        state, _ = run(mesh_of(1, 1), updates=updates, loss=watch, optimizer=optimizer, target_decay=decay)
        history.append(np.asarray(state.params["w"], np.float64))
    weights = np.array([decay ** (3 - j) for j in (1, 2, 3)])
    expected = np.tensordot(weights / weights.sum(), history, 1)
    np.testing.assert_allclose(state.target_params["w"], expected, rtol=1e-4, atol=1e-6)


def test_the_loss_sees_the_target_network():
    """At the first update it is the student itself, later the average."""

    def of_target(params, teacher_params, target_params, batch, key, train_step):
        gap = jnp.sum(jnp.abs(params["w"] - target_params["w"]))
        return loss_fn(params, None, None, batch, key, train_step) * 0 + gap

    def slow(params, teacher_params, target_params, batch, key, train_step):
        gap = jax.lax.stop_gradient(of_target(params, None, target_params, batch, key, train_step))
        return loss_fn(params, None, None, batch, key, train_step) * 1e-3 + gap

    _, losses = run(mesh_of(1, 1), loss=slow, target_decay=0.9)
    # After one update the bias-corrected average is the student; after two it lags behind.
    assert losses[0] < 0.1 and losses[1] < 0.1 and losses[2] > 1
