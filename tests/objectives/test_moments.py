"""Moment matching against closed forms of linear Gaussian models, in float64, and its alternating updates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from mcm_jax.diffusion import process, schedules, segments
from mcm_jax.objectives.moments import Moments
from mcm_jax.objectives.objective import Networks
from mcm_jax.runs import build
from mcm_jax.training import step
from mcm_jax.training.state import Moved

KEY = jax.random.key(3)
SCHEDULE = schedules.cosine()
# The data are N(MEAN, STD^2).
MEAN, STD = 0.3, 0.4
# Log-SNRs at t and s, if there is only one jump.
T, S = -2.0, 0.5
COUNT = 100_000


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def one_jump(monkeypatch, float64):
    """Every example jumps from T to S; time is the log-SNR itself."""

    def draw_jumps(key, batch_size, student_steps):
        return jnp.full(batch_size, T), jnp.full(batch_size, S)

    monkeypatch.setattr(segments, "draw_jumps", draw_jumps)


def level(logsnr):
    """(alpha, sigma)."""
    return 1 / np.sqrt(1 + np.exp(-logsnr)), 1 / np.sqrt(1 + np.exp(logsnr))


def predicting(x_fn):
    """The network whose x_hat(z, key) is x_fn."""

    def model_fn(z, logsnr, cond, key):
        alpha, sigma = process.alpha(logsnr)[:, None], process.sigma(logsnr)[:, None]
        return (alpha * z - x_fn(z, key)) / sigma

    return model_fn


def posterior(logsnr):
    """(slope, intercept, std) of x given z at this log-SNR, for the data."""
    alpha, sigma = level(logsnr)
    precision = 1 / STD**2 + alpha**2 / sigma**2
    return alpha / sigma**2 / precision, MEAN / STD**2 / precision, precision**-0.5


def regression(slope, intercept, std):
    """(slope, intercept) of E[x~ | z_s], for x~ ~ N(slope z_t + intercept, std^2) and z_s ~ q(z_s | z_t, x~).

    q(z_s | z_t, x) is Gaussian by Bayes' rule, from z_s = alpha_s x + sigma_s eps and z_t given z_s.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = level(T), level(S)
    gain = alpha_t / alpha_s
    variance = sigma_t**2 - gain**2 * sigma_s**2  # of z_t given z_s
    precision = 1 / sigma_s**2 + gain**2 / variance
    from_z, from_x = gain / variance / precision, alpha_s / sigma_s**2 / precision
    var_z = alpha_t**2 * STD**2 + sigma_t**2
    var_x = slope**2 * var_z + std**2
    mean_x = slope * alpha_t * MEAN + intercept
    var_s = from_z**2 * var_z + from_x**2 * var_x + 2 * from_z * from_x * slope * var_z + 1 / precision
    found = (from_z * slope * var_z + from_x * var_x) / var_s
    return found, mean_x - found * (from_z * alpha_t * MEAN + from_x * mean_x)


def data(dimension=1, count=COUNT):
    return MEAN + STD * jax.random.normal(jax.random.key(9), (count, dimension))


def networks(student, target, teacher=None, schedule=SCHEDULE):
    slope, intercept, _ = posterior(S)
    teacher = teacher or predicting(lambda z, _: slope * z + intercept)
    return Networks(student=student, target=target, teacher=teacher, schedule=schedule, null_cond=-1)


def affine_student(slope, intercept, std):
    """Draws x~ ~ N(slope z + intercept, std^2); its noise comes from the key of dropout."""
    return predicting(lambda z, key: slope * z + intercept + std * jax.random.normal(key, z.shape))


def call(loss, found, x, key=KEY):
    return loss(found, x, jnp.zeros(len(x), jnp.int32), key, jnp.int32(0))


# Students: the mean of the data's posterior, a draw from it, and something else.
STUDENTS = {
    "mean": (*posterior(T)[:2], 0.0),
    "posterior": posterior(T),
    "other": (0.9, -0.2, 0.3),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_the_target_networks_minimum_is_between_the_moment_and_the_teacher(name, one_jump):
    """The least squares of `target_loss` are the mean of E[x~ | z_s] and the teacher, both in closed form."""
    x, student = data(), affine_student(*STUDENTS[name])

    @jax.jit
    def loss(phi):
        target = predicting(lambda z, _: phi[0] * z + phi[1])
        found = networks(student, target, schedule=lambda t: t)
        return jnp.mean(call(Moments(student_steps=2).target_loss, found, x))

    # One step of Newton's method minimises a quadratic function.
    start = jnp.zeros(2)
    found = start - jnp.linalg.solve(jax.hessian(loss)(start), jax.grad(loss)(start))
    moment, teacher = np.array(regression(*STUDENTS[name])), np.array(posterior(S)[:2])
    # Four standard errors of 100,000 examples; x~ given z_s has a deviation below 0.5.
    np.testing.assert_allclose(found, (moment + teacher) / 2, atol=4 * 0.5 / np.sqrt(COUNT))
    if name == "posterior":
        np.testing.assert_allclose(moment, teacher, rtol=1e-10)
    else:
        assert np.max(np.abs(moment - teacher)) > 0.05


@pytest.mark.parametrize("name", STUDENTS)
def test_only_a_student_that_matches_the_data_is_left_alone(name, one_jump):
    """The student's expected gradient with the g_phi of its own minimum, in closed form."""
    x = data()
    phi = (np.array(regression(*STUDENTS[name])) + np.array(posterior(S)[:2])) / 2
    target = predicting(lambda z, _: phi[0] * z + phi[1])

    @jax.jit
    def loss(student):
        found = networks(affine_student(*student), target, schedule=lambda t: t)
        return jnp.mean(call(Moments(student_steps=2), found, x))

    gradient = jax.grad(loss)(tuple(map(jnp.float64, STUDENTS[name])))
    if name == "posterior":
        np.testing.assert_allclose(gradient, 0, atol=1e-9)
    else:
        assert np.max(np.abs(np.array(gradient))) > 0.02


def test_at_random_times_the_teacher_is_the_moment_of_the_data(float64):
    """The gradient of `target_loss` at g_phi = g_theta is zero for x~ ~ q(x | z_t), for all t and s."""
    x = data(count=COUNT)

    def exact(z, logsnr):
        alpha, sigma = process.alpha(logsnr)[:, None], process.sigma(logsnr)[:, None]
        precision = 1 / STD**2 + alpha**2 / sigma**2
        return (alpha / sigma**2 * z + MEAN / STD**2) / precision, precision**-0.5

    def v_of(x_hat, z, logsnr):
        return (process.alpha(logsnr)[:, None] * z - x_hat) / process.sigma(logsnr)[:, None]

    def student(z, logsnr, cond, key):
        mean, std = exact(z, logsnr)
        return v_of(mean + std * jax.random.normal(key, z.shape), z, logsnr)

    def target(phi, z, logsnr, cond, key):
        return v_of(exact(z, logsnr)[0], z, logsnr) + phi[0] + phi[1] * z

    @jax.jit
    @jax.jacobian
    def gradients(phi):
        found = networks(student, functools.partial(target, phi), functools.partial(target, jnp.zeros(2)))
        losses = call(Moments(student_steps=2).target_loss, found, x)
        return jnp.mean(losses.reshape(100, -1), axis=1)

    each = np.asarray(gradients(jnp.zeros(2)))
    error = np.std(each, axis=0, ddof=1) / 10
    np.testing.assert_allclose(np.mean(each, axis=0) / error, 0, atol=4)
    assert np.all(error < 0.02)


@pytest.mark.parametrize("weight", ["snr_plus_one", "max_snr_one"])
def test_the_students_gradient_is_the_weighted_gap_pushed_back(weight, float64):
    """w(s) (g_phi(z_s) - g_theta(z_s)) / d is the cotangent of x~; nothing flows through z_s."""
    x, seen = data(dimension=3, count=5), []

    def student(theta):
        return predicting(lambda z, _: jnp.tanh(theta[0] * z) + theta[1])

    def watched(model_fn):
        def watching(z, logsnr, cond, key):
            seen.append((z, logsnr))
            return model_fn(z, logsnr, cond, key)

        return watching

    target, teacher = predicting(lambda z, _: jnp.sin(z)), predicting(lambda z, _: jnp.cos(2 * z))
    theta, objective = jnp.array([0.7, -0.2]), Moments(student_steps=4, loss_weight=weight)
    found = networks(watched(student(theta)), watched(target), watched(teacher))
    losses = call(objective, found, x)
    (z_t, _), (z_s, logsnr_s), (z_same, _) = seen
    np.testing.assert_array_equal(z_s, z_same)
    assert np.all(np.abs(z_s - z_t) > 1e-6)

    snr = np.exp(np.asarray(logsnr_s, np.float64))[:, None]
    w = snr + 1 if weight == "snr_plus_one" else np.maximum(snr, 1)
    gap = w * (np.sin(z_s) - np.cos(2 * z_s)) / 3
    x_tilde, pull = jax.vjp(lambda theta: jnp.tanh(theta[0] * z_t) + theta[1], theta)
    np.testing.assert_allclose(losses, np.sum(gap * x_tilde, axis=1), rtol=1e-9)

    def loss(theta):
        return jnp.sum(call(objective, networks(student(theta), target, teacher), x))

    np.testing.assert_allclose(jax.grad(loss)(theta), pull(gap)[0], rtol=1e-9)


def test_guidance_changes_the_teacher_only():
    """With g, the teacher's moment is x + g (x - x of any class), for the same dropout."""
    x = data(count=4).astype(jnp.float32)
    target = predicting(lambda z, _: jnp.sin(z))

    def teacher(z, logsnr, cond, key):
        return predicting(lambda z, _: jnp.cos(z) + (cond[:, None] == 0))(z, logsnr, cond, key)

    # x of class 0 is cos(z) + 1, and of any class cos(z).
    guided = call(Moments(student_steps=2, teacher_guidance=0.5), networks(target, target, teacher), x)
    by_hand = networks(target, target, predicting(lambda z, _: jnp.cos(z) + 1.5))
    np.testing.assert_allclose(guided, call(Moments(student_steps=2), by_hand, x), rtol=1e-5)


@pytest.mark.parametrize("student_steps", [1, 4])
def test_jumps_are_as_in_the_paper(student_steps):
    """s is uniform, and t - s is uniform up to 1 / S where t is below 1."""
    t, s = segments.draw_jumps(KEY, batch_size=20_000, student_steps=student_steps)
    # Four standard errors of means of 20,000 uniform numbers.
    np.testing.assert_allclose(np.mean(s), 0.5, atol=4 * 0.29 / np.sqrt(20_000))
    assert np.all((s <= t) & (t <= 1)) and np.max(t - s) <= 1 / student_steps + 1e-6
    # P(s + U(0, 1 / S) > 1) = 1 / (2 S).
    np.testing.assert_allclose(np.mean(t == 1), 1 / (2 * student_steps), atol=4 * 0.5 / np.sqrt(20_000))
    inside = s < 1 - 1 / student_steps
    if student_steps > 1:
        gaps = (t - s)[inside] * student_steps
        np.testing.assert_allclose(np.mean(gaps), 0.5, atol=4 * 0.29 / np.sqrt(np.sum(inside)))


# --- Alternating updates. ---


def small(params, z, logsnr, cond, key):
    return jnp.tanh(z @ params["w"]) + params["b"]


PARAMS = {"w": 0.1 * jax.random.normal(KEY, (3, 3)), "b": jnp.ones(3)}
STUDENT_ADAM, TARGET_ADAM = optax.adam(1e-2), optax.adam(3e-2)


def loss_of(loss):
    def loss_fn(params, teacher_params, target_params, batch, key, train_step):
        student, teacher = (functools.partial(small, p) for p in (params, teacher_params))
        target = functools.partial(small, target_params)
        if isinstance(target_params, Moved):
            target = build.first_order(small, target_params)
        found = networks(student, target, teacher)
        return call(loss, found, batch["image"], key)

    return loss_fn


@functools.cache
def states(updates):
    """The states before and after each of some updates, and their metrics."""
    objective = Moments(student_steps=2)
    update = step.Update(
        loss_fn=loss_of(objective),
        optimizer=STUDENT_ADAM,
        ema_decay=0.5,
        target_training=step.TargetTraining(loss_of(objective.target_loss), TARGET_ADAM),
        seed=7,
    )
    update, metrics = jax.jit(update), []
    found = [step.init_state(PARAMS, STUDENT_ADAM, target_optimizer=TARGET_ADAM)]
    for _ in range(updates):
        state, values = update(found[-1], PARAMS, BATCH)
        found.append(state)
        metrics.append(values)
    return found, metrics


BATCH = {"image": jax.random.normal(jax.random.key(1), (16, 3))}


def differs(a, b):
    return any(np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def test_updates_take_turns():
    found, metrics = states(4)
    targets, students = ("target_params", "target_opt_state"), ("params", "ema_params", "opt_state")
    for n, (before, after) in enumerate(zip(found, found[1:], strict=False)):
        for names, its_turn in ((targets, n % 2 == 0), (students, n % 2 == 1)):
            for name in names:
                assert differs(getattr(before, name), getattr(after, name)) == its_turn
        assert int(after.step) == n + 1
    assert all(np.isfinite(value) for values in metrics for value in values.values())


def test_each_update_is_one_of_adam_by_hand():
    """The first of the target network, then the first of the student, with that target network."""
    found, metrics = states(4)
    objective = Moments(student_steps=2)
    for n, loss, argument, adam, name in (
        (0, objective.target_loss, 2, TARGET_ADAM, "target_params"),
        (1, objective, 0, STUDENT_ADAM, "params"),
    ):
        key = jax.random.fold_in(jax.random.key(7), n)
        trees = [PARAMS, PARAMS, found[n].target_params]

        def mean(params, trees=trees, argument=argument, loss=loss, key=key):
            arguments = [*trees[:argument], params, *trees[argument + 1 :]]
            return jnp.mean(loss_of(loss)(*arguments, BATCH, key, None))

        value, gradient = jax.value_and_grad(mean)(trees[argument])
        updates, _ = adam.update(gradient, adam.init(PARAMS))
        expected = optax.apply_updates(PARAMS, updates)
        np.testing.assert_allclose(metrics[n]["loss"], value, rtol=1e-5, atol=1e-6)
        for leaf in expected:
            actual = getattr(found[n + 1], name)[leaf]
            np.testing.assert_allclose(actual, expected[leaf], rtol=1e-4, atol=1e-6)
    for leaf in PARAMS:
        # The student's average has one update more after its own update only.
        mean = (PARAMS[leaf] + found[2].params[leaf]) / 2
        np.testing.assert_allclose(found[3].ema_params[leaf], mean, rtol=1e-5)


def test_an_instant_update_descends_on_the_norm_of_the_teachers_gradient():
    """The student's gradient is rate / 2 times that of nu_1 . sg(nu_2), for the gradients nu of both halves.

    nu is the gradient of w(s) ||x~ - g_theta(z_s)||^2 / d, by the teacher's parameters, here with Lambda = 1.
    """
    rate, objective = 0.3, Moments(student_steps=2, instant=True)
    training = step.TargetTraining(loss_of(objective.target_loss), optax.sgd(rate), instant=True)
    sgd = optax.sgd(1.0)
    update = step.Update(
        loss_fn=loss_of(objective), optimizer=sgd, ema_decay=0.5, target_training=training, seed=7
    )
    student = jax.tree.map(lambda leaf: leaf + 0.3, PARAMS)
    before = step.init_state(PARAMS, sgd, target_optimizer=training.optimizer)._replace(params=student)
    after, _ = jax.jit(update)(before, PARAMS, BATCH)

    def teacher_gradient(student, half, key):
        def loss(theta):
            # The teacher's loss on the student's samples: without the second term, which has no gradient.
            def squares(*arguments):
                x_tilde, _, x_theta, w = objective._predictions(*arguments[:4])
                return w * process.mean_square(x_tilde - x_theta)

            return jnp.mean(loss_of(squares)(student, theta, PARAMS, half, key, None))

        return ravel_pytree(jax.grad(loss)(PARAMS))[0]

    keys = list(jax.random.split(jax.random.fold_in(jax.random.key(7), 0)))
    halves = [{"image": BATCH["image"][n::2]} for n in range(2)]

    @jax.jit
    def product(params):
        nu_1, nu_2 = (teacher_gradient(params, half, key) for half, key in zip(halves, keys, strict=True))
        return rate / 2 * jnp.dot(nu_1, jax.lax.stop_gradient(nu_2))

    gradient = jax.grad(product)(student)
    for leaf in PARAMS:
        np.testing.assert_allclose(student[leaf] - after.params[leaf], gradient[leaf], rtol=1e-3, atol=1e-6)
    assert max(float(jnp.max(jnp.abs(leaf))) for leaf in gradient.values()) > 1e-3
    assert not differs(after.target_params, PARAMS) and int(after.step) == 1
