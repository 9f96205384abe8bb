"""What must hold for samplers, objectives and updates together, on problems whose answers are known.

Orders of convergence are counted in float64, where rounding leaves room for more than a decade of them.
"""

import functools
import itertools
import typing

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax.diffusion import mixtures, process, sampling, schedules, segments, steps
from mcm_jax.objectives.consistency import Consistency
from mcm_jax.objectives.progressive import Progressive
from mcm_jax.runs import build
from mcm_jax.training import optimizer, step
from tests import reference
from tests.objectives.test_consistency import (
    COND,
    KEY,
    SHAPE,
    X,
    constant_grid,
    linear_model,
    networks,
    numpy_x_hat,
)
from tests.test_cost import OBJECTIVES, config_and_loss

COSINE = schedules.cosine()

# --- Samplers on a Gaussian, where the denoiser is linear, and with it every step of every sampler. ---


def anisotropic():
    """A Gaussian of correlated coordinates whose standard deviations are 0.10, 0.23 and 0.58."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(3, 3))
    return mixtures.gaussian(0.3 * rng.normal(size=3), 0.1 * root @ root.T)


GAUSSIAN = anisotropic()
# Of the eigen-directions.
MEANS, STDS = GAUSSIAN.means[:, 0], GAUSSIAN.stds[:, 0]


@functools.partial(jax.jit, static_argnames=("sampler",))
def draw(z_1, keys, logsnr, *, sampler):
    cond = jnp.zeros(len(z_1), jnp.int32)
    model_fn = mixtures.model_fn(GAUSSIAN)
    return sampling.sample(model_fn, z_1, cond, keys, logsnr=logsnr, sampler=sampler, clip="never")


def keys_and_noise(count, *, seed=0):
    keys = sampling.image_keys(jax.random.key(seed), jnp.arange(count))
    return keys, sampling.initial_noise(keys, (3,))


def x_hat_line(logsnr):
    """(a, b) of x_hat = a z + b in every eigen-direction: E[x | z] by Bayes' rule."""
    alpha, sigma = reference.alpha_sigma(logsnr)
    a = alpha * STDS**2 / (alpha**2 * STDS**2 + sigma**2)
    return a, MEANS - a * alpha * MEANS


def ddim_line(grid):
    """(a, b) of x = a z_1 + b in every eigen-direction: the steps' lines one after the other, in float64."""
    a, b = np.ones(3), np.zeros(3)
    for t, s in itertools.pairwise(grid):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = reference.alpha_sigma(t), reference.alpha_sigma(s)
        x_a, x_b = x_hat_line(t)
        x_a, x_b = x_a * a, x_a * b + x_b
        a = alpha_s * x_a + sigma_s * (a - alpha_t * x_a) / sigma_t
        b = alpha_s * x_b + sigma_s * (b - alpha_t * x_b) / sigma_t
    x_a, x_b = x_hat_line(grid[-1])
    return x_a * a, x_a * b + x_b


@pytest.mark.parametrize("num_steps", [1, 2, 16, 129])
@pytest.mark.parametrize("low", [8, 64])
def test_ddim_of_a_gaussian_is_a_known_line(num_steps, low):
    """Uniform steps of the cosine and of an interpolated schedule; the line's bias included."""
    schedule = schedules.interpolated(noise_resolution_low=low, noise_resolution_high=64, image_resolution=64)
    grid = schedules.uniform_grid(schedule, num_steps)
    keys, z_1 = keys_and_noise(64)
    a, b = ddim_line(np.asarray(grid, np.float64))
    expected = (np.asarray(z_1, np.float64) @ GAUSSIAN.basis * a + b) @ GAUSSIAN.basis.T
    # Each step rounds z to 1e-7 and the denoiser is within 3e-6; all later steps together shrink errors.
    np.testing.assert_allclose(draw(z_1, keys, grid, sampler="ddim"), expected, rtol=0, atol=1e-5)


def test_ddim_loses_variance_and_the_more_the_fewer_its_steps():
    """The bias has a sign: the line is always flatter than the flow's, whose slope is the data's std."""
    keys, _ = keys_and_noise(64)
    z_1 = np.zeros((64, 3), np.float32)
    z_1[:3], z_1[3:6] = GAUSSIAN.basis.T, -GAUSSIAN.basis.T
    slopes = []
    for num_steps in (2, 16, 129):
        grid = schedules.uniform_grid(COSINE, num_steps)
        x = np.asarray(draw(jnp.asarray(z_1), keys, grid, sampler="ddim")) @ GAUSSIAN.basis
        slopes.append(np.diag(x[:3] - x[3:6]) / 2 / STDS)
    # Measured from 0.10 and 0.43 (2 steps) to 0.95 and 0.99 (129).
    assert np.all(np.array(slopes) < 1) and np.all(np.diff(slopes, axis=0) > 0)
    assert np.all(slopes[-1] > 0.94)


@functools.partial(jax.jit, static_argnames=("denoised",))
def flow(z_1, t, s, *, denoised):
    """The flow's z_s, or the denoiser's x_hat there."""
    t, s = (jnp.full(len(z_1), value, jnp.float32) for value in (t, s))
    z_s = mixtures.probability_flow(GAUSSIAN, z_1, logsnr_t=t, logsnr_s=s)
    return mixtures.denoise(GAUSSIAN, z_s, logsnr_t=s) if denoised else z_s


def largest_error(grid, sampler, *, end=None):
    """Against the flow from the grid's first point to its last, and the denoiser there.

    With `end`, against the flow to that log-SNR: the last point's x_hat is then a step of its own.
    """
    keys, z_1 = keys_and_noise(16)
    exact = flow(z_1, grid[0], grid[-1] if end is None else end, denoised=end is None)
    return float(jnp.max(jnp.abs(draw(z_1, keys, grid, sampler=sampler) - exact)))


def orders(num_steps, errors):
    """p of error ~ 1 / N^p from each pair of neighbours."""
    return -np.diff(np.log(errors)) / np.diff(np.log(num_steps))


# Points of the grids: few sizes, since each is a program of its own.
POINTS = (33, 65, 129)


def test_ddim_has_order_one_over_all_of_time():
    """z = cos(phi) x + sin(phi) eps has dz / dphi = v_hat, which is smooth in phi, the cosine's own time.

    So nothing happens at the ends, though the log-SNR runs from -15 to 15, and x_hat of the last point is
    one more step of the same kind: it reaches the data, x_0.
    """
    errors = [largest_error(schedules.uniform_grid(COSINE, n), "ddim", end=15.0) for n in POINTS]
    # Measured: 0.984, 0.991.
    np.testing.assert_allclose(orders(POINTS, errors), 1, atol=0.03)


SMOOTH_GRIDS = {
    "middle": lambda n: COSINE(jnp.linspace(0.9, 0.1, n)),
    "karras": schedules.karras_grid,
}


@pytest.mark.parametrize("grid", SMOOTH_GRIDS)
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("heun", 2)])
def test_order_of_convergence_where_the_grid_is_smooth(grid, sampler, order):
    """Heun's error is counted in sbar = sigma / alpha, so its grid must be smooth in sbar.

    Both grids are: a middle part of the cosine (log-SNR -3.7 to 3.7), and Karras' from sbar = 80 to 0.002.
    """
    errors = [largest_error(SMOOTH_GRIDS[grid](n), sampler) for n in POINTS]
    # Measured: DDIM 0.991, 0.995 and 0.969, 0.984, Heun 2.022, 2.023 and 2.048, 2.027. Heun's last error is
    # 1e-4, of which float32 has 3e-6.
    np.testing.assert_allclose(orders(np.array(POINTS) - 1, errors), order, atol=0.08)


def test_heun_loses_to_ddim_on_the_whole_cosine():
    """Its first step ends at sbar = 2 N / pi however large sbar = 1808 was: no step of any small size.

    There eps_hat = k (1 - c^2 / 2 sbar^2) for a standard deviation c; the trapezoid over it is off by
    1808 / 4 (c / sbar)^2, which the flow to the data shrinks by c / sbar: ~ 1 / N^3, with a huge factor, as
    long as N is far below 1808. DDIM's first step has no such error: the paper's finding on Heun's grid.
    """
    points = (8, 16, 33)
    heun, ddim = (
        [largest_error(schedules.uniform_grid(COSINE, n), s, end=15.0) for n in points]
        for s in ("heun", "ddim")
    )
    # Measured: 3.01, 3.03; 12 and 2.9 times DDIM's error, at twice the price.
    np.testing.assert_allclose(orders(points, heun), 3, atol=0.1)
    assert heun[0] > 10 * ddim[0] and heun[1] > 2 * ddim[1]


@pytest.mark.parametrize("num_steps", [3, 20])
def test_ddpm_of_a_gaussian_has_known_moments(num_steps):
    """Mean and covariance of x, by recursion over q(z_s | z_t, x_hat) in every eigen-direction."""
    grid = schedules.uniform_grid(COSINE, num_steps)
    mean, variance = np.zeros(3), np.ones(3)
    for t, s in itertools.pairwise(np.asarray(grid, np.float64)):
        x_a, x_b = x_hat_line(t)

        # reference.ddpm is linear in (x, z_t, noise).
        def response(x, z, noise, t=t, s=s):
            return reference.ddpm(x, z, noise, t, s)

        slope = response(x_a, 1.0, 0.0)
        mean = slope * mean + response(x_b, 0.0, 0.0)
        variance = slope**2 * variance + response(0.0, 0.0, 1.0) ** 2
    x_a, x_b = x_hat_line(np.float64(grid[-1]))
    mean, variance = x_a * mean + x_b, x_a**2 * variance
    # The bias that the moments of the data would hide.
    assert np.all(variance < 0.95 * STDS**2)

    count = 20_000
    keys, z_1 = keys_and_noise(count, seed=1)
    x = np.asarray(draw(z_1, keys, grid, sampler="ddpm"), np.float64) @ GAUSSIAN.basis
    scores = (x - mean) / np.sqrt(variance)
    # Standard errors: 1 / sqrt(n) of the mean, at most sqrt(2 / n) of the covariance; four of them.
    np.testing.assert_allclose(scores.mean(axis=0), 0, atol=4 / np.sqrt(count))
    np.testing.assert_allclose(scores.T @ scores / count, np.eye(3), atol=4 * np.sqrt(2 / count))


# --- aDDIM's overshoot. ---


@jax.jit
def one_step(mixture, z_t, t, s):
    """z_s by DDIM, by aDDIM with the true posterior variance, and by the flow."""
    x_hat = mixtures.denoise(mixture, z_t, logsnr_t=t)
    x_var = mixtures.posterior_variance(mixture, z_t, logsnr_t=t)
    return (
        steps.ddim(x_hat, z_t, logsnr_t=t, logsnr_s=s),
        steps.addim(x_hat, z_t, logsnr_t=t, logsnr_s=s, x_var=x_var),
        mixtures.probability_flow(mixture, z_t, logsnr_t=t, logsnr_s=s),
    )


@hypothesis.given(st.integers(0, 2**31 - 1), st.floats(0.05, 0.95), st.floats(0.1, 0.9))
def test_addim_overshoots_on_a_gaussian_by_its_cross_term(seed, t, s_over_t):
    """With the true posterior variance the promised norm is the flow's own; aDDIM is above it.

    In an eigen-direction of variance v, S^2 = alpha^2 v + sigma^2: the flow takes z_t to z_t S_s / S_t, DDIM
    to z_t Q / S_t^2 with Q = alpha_t alpha_s v + sigma_t sigma_s, and S_s^2 - Q^2 / S_t^2 = k^2 v sigma_t^2 /
    S_t^2 (Lagrange's identity) is k^2 times the posterior variance. So where z_t^2 = S_t^2 in all directions
    ||z_DDIM||^2 + d z_s_var = ||z_flow||^2. But x_hat = alpha_t v z_t / S_t^2 and eps_hat = sigma_t z_t /
    S_t^2 are not orthogonal: ||z_aDDIM||^2 exceeds it by 2 alpha_s (c - sigma_s) <x_hat, eps_hat> > 0, where
    c^2 = sigma_s^2 + (d / ||eps_hat||^2) z_s_var.
    """
    rng, dimension = np.random.default_rng(seed), 4
    root = rng.normal(size=(dimension, dimension))
    mixture = mixtures.gaussian(np.zeros(dimension), 0.2 * root @ root.T)
    variances = mixture.stds[:, 0] ** 2
    logsnr_t, logsnr_s = (float(COSINE(jnp.float32(time))) for time in (t, s_over_t * t))
    (alpha_t, sigma_t), (alpha_s, sigma_s) = map(reference.alpha_sigma, (logsnr_t, logsnr_s))
    spread = alpha_t**2 * variances + sigma_t**2  # S_t^2
    u = np.sqrt(spread) * rng.choice([-1, 1], dimension)

    # In float64 from the formulas.
    x_hat, eps_hat = alpha_t * variances * u / spread, sigma_t * u / spread
    k = alpha_s - alpha_t * sigma_s / sigma_t
    z_s_var = k**2 * np.mean(variances * sigma_t**2 / spread)
    c = np.sqrt(sigma_s**2 + dimension / np.sum(eps_hat**2) * z_s_var)
    excess = 2 * alpha_s * (c - sigma_s) * np.sum(x_hat * eps_hat)
    assert excess > 0

    z_t = jnp.asarray((mixture.basis @ u)[None], jnp.float32)
    t, s = (jnp.full(1, value, jnp.float32) for value in (logsnr_t, logsnr_s))
    ddim, addim, exact_z = one_step(mixture, z_t, t, s)
    promised, actual, exact = (
        np.sum(np.square(np.asarray(z, np.float64))) + more
        for z, more in ((ddim, dimension * z_s_var), (addim, 0.0), (exact_z, 0.0))
    )
    # A norm of about 1 to 5 in float32: relative errors of 1e-6 (measured 3e-6 at most).
    np.testing.assert_allclose(promised, exact, rtol=2e-5)
    np.testing.assert_allclose(actual - exact, excess, rtol=0, atol=2e-5 * exact)
    if excess > 1e-4 * exact:
        assert actual > exact


# --- The perfect student is the fixed point of distillation. ---


def perfect_student(mixture, *, student_steps, theta):
    """v of f(z_t, t) = invDDIM_{t->u}(flow_{t->u}(z_t), z_t), u = t_step, and v + theta z_t beside it.

    Segments are closed at their noisy end: at t = t_step of one segment f speaks for the one below. At t = 0
    there is none: 0 / 0, which an anchor must not let through.
    """

    def model_fn(z_t, logsnr_t, cond, key):
        del cond, key
        ends = COSINE(jnp.arange(1, student_steps) / student_steps)
        # Grid points are 3e-3 of a log-SNR apart.
        step = jnp.sum(logsnr_t[:, None] < ends - 1e-6, axis=1)
        times = {"logsnr_t": logsnr_t, "logsnr_s": COSINE(step / student_steps)}
        x = steps.inv_ddim(mixtures.probability_flow(mixture, z_t, **times), z_t, **times)
        alpha, sigma = (process.over_pixels(f(logsnr_t), z_t) for f in (process.alpha, process.sigma))
        return (alpha * z_t - x) / sigma + theta * z_t

    return model_fn


# N_teacher = 2^i in update i, so that one program serves all of them.
DOUBLING = {"teacher_steps_first": 1.0, "teacher_steps_last": 1024.0, "anneal_steps": 10}


def distillation_loss(theta, mixture, train_step, *, student_steps, count):
    """The loss of the student beside the perfect one; SNR + 1 makes it the squared distance in v."""
    objective = Consistency(
        student_steps=(student_steps,),
        teacher_step="ddim",
        distance="squared",
        loss_weight="snr_plus_one",
        **DOUBLING,
    )
    student = perfect_student(mixture, student_steps=student_steps, theta=theta)
    x, cond = mixtures.sample(mixture, jax.random.key(0), count), jnp.zeros(count, jnp.int32)
    functions = networks(student, mixtures.model_fn(mixture), schedule=COSINE)
    return objective(functions, x, cond, jax.random.key(1), train_step)


TEACHER_STEPS = np.array([64, 128, 256, 512])
# Mixture, student steps, examples.
PROBLEMS = {
    "two components on a line": (mixtures.two_components(), 4, 32),
    "four dimensions": (mixtures.random_mixture(0, dimension=4, components=3), 2, 8),
}


def at_every_time(mixture, student_steps, count, *thetas):
    """{N_teacher: (loss, d loss / d theta)} for each theta, at all times of the grid, of the same x and eps.

    Both are [S, N_per].
    """

    def mean_loss(theta, mixture, n_per, start, n_rel):
        grid_steps = n_per * student_steps
        numbers = (start + n_rel, start + n_rel - 1, start)
        t, s, t_step = (jnp.full(count, n / grid_steps) for n in numbers)
        times = segments.Times(t=t, s=s, t_step=t_step, is_last=jnp.full(count, n_rel == 1))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(segments, "draw_times", lambda *_, **__: times)
            options = {"student_steps": student_steps, "count": count}
            losses = distillation_loss(theta, mixture, jnp.int32(0), **options)
        return jnp.mean(losses)

    chunk = jax.jit(jax.vmap(jax.value_and_grad(mean_loss), in_axes=(None, None, None, 0, 0)))

    def on_grid(theta, teacher_steps):
        n_per = teacher_steps // student_steps
        step, n = np.divmod(np.arange(teacher_steps), n_per)
        # In pieces of one size: one program for all grids.
        parts = [
            chunk(theta, mixture, n_per, *rows)
            for rows in zip((step * n_per).reshape(-1, 64), (n + 1).reshape(-1, 64), strict=True)
        ]
        return tuple(np.concatenate(part).reshape(-1, n_per) for part in zip(*parts, strict=True))

    return [{int(n): on_grid(theta, int(n)) for n in TEACHER_STEPS} for theta in thetas]


@pytest.fixture(scope="module", params=PROBLEMS)
def fixed_point(request):
    """Student steps, and `at_every_time` of the perfect student and of one beside it."""
    mixture, student_steps, count = PROBLEMS[request.param]
    with jax.enable_x64(True):
        return student_steps, *at_every_time(mixture, student_steps, count, 0.0, 0.1)


def over_teacher_steps(losses_and_gradients, select):
    """[2, teacher steps]: select(loss), select(gradient) for each N_teacher."""
    return np.array([[select(a) for a in losses_and_gradients[int(n)]] for n in TEACHER_STEPS]).T


def assert_order(values, order, *, within):
    """The orders come nearer with every doubling, and the last is `within` of it."""
    distance = np.abs(orders(TEACHER_STEPS, np.abs(values)) - order)
    assert np.all(np.diff(distance) < 0) and distance[-1] < within, distance


def test_perfect_student_at_fixed_times(fixed_point):
    """Loss of order four, gradient of order two, at the middle and at the start of the segments.

    In y = z / sigma and rho = alpha / sigma the flow is y' = x_hat, a DDIM step from t to s is off by
    e = h^2 x_hat' / 2, h = rho_s - rho_t ~ 1 / N, and the student's flow carries e to J e at u = t_step. The
    target is the slope from y_t to there, so x_diff = J e / (rho_u - rho_t): of order two, its square four.
    """
    _, perfect, _ = fixed_point
    for fraction in (2, 1):
        loss, gradient = over_teacher_steps(perfect, lambda a, f=fraction: a[:, a.shape[1] // f - 1].mean())
        # Measured 3.80, 3.87, 3.92 in the worst case, and 2.02, 2.009, 2.004.
        assert_order(loss, 4, within=0.1)
        assert_order(gradient, 2, within=0.01)


def test_perfect_student_on_the_anchor(fixed_point):
    """Loss of order two, gradient of order one, on the last teacher step of each segment.

    There rho_u - rho_t = h: the teacher's whole step is the target, wrong by h x_hat' / 2. Finite at t_step =
    0 too, where this student says 0 / 0 at s: the anchor takes the teacher's x whatever the student says.
    """
    _, perfect, _ = fixed_point
    loss, gradient = over_teacher_steps(perfect, lambda a: a[:, 0].mean())
    # Measured 1.8, 1.92 to 1.93, 1.97 to 1.98, and 0.90 to 0.91, 0.96, 0.98.
    assert_order(loss, 2, within=0.05)
    assert_order(gradient, 1, within=0.04)


def test_perfect_student_over_all_times(fixed_point):
    """Loss of order three and gradient of order two, times log N: the anchor's neighbours decide.

    n steps from the segment's end rho_u - rho_t = n h, so x_diff ~ h / n: the mean over n <= N_per of its
    square is ~ h^2 / N_per, and that of x_diff ~ h log(N_per) / N_per. More precisely, a doubling of N adds
    S ln 2 (N times the anchor's gradient) to N^2 times the mean gradient.
    """
    student_steps, perfect, _ = fixed_point
    loss, gradient = over_teacher_steps(perfect, np.mean)
    # Measured 2.66 to 2.70, 2.81 to 2.83, 2.89 to 2.91: bulk and anchor are not far apart yet.
    assert_order(loss, 3, within=0.15)
    anchor = over_teacher_steps(perfect, lambda a: a[:, 0].mean())[1]
    growth = student_steps * np.log(2) * (TEACHER_STEPS * anchor)[1:]
    # Measured 0.94, 0.965, 0.98 of it.
    share = np.diff(TEACHER_STEPS**2 * gradient) / growth
    assert np.all(np.diff(share) > 0) and abs(share[-1] - 1) < 0.03


def test_other_students_keep_a_loss_of_order_one(fixed_point):
    """f beside the perfect one: wrong by 1 / n, n steps from the anchors, whatever the teacher.

    The square of which has the mean 1 / N_per, and itself log(N_per) / N_per, the growth of which is known as
    above. The perfect student's loss beside it falls like 1 / N^2: the small losses are not those of any f.
    """
    student_steps, perfect, beside = fixed_point
    loss, gradient = over_teacher_steps(beside, np.mean)
    np.testing.assert_allclose(orders(TEACHER_STEPS, loss)[1:], 1, atol=0.1)
    anchor = over_teacher_steps(beside, lambda a: a[:, 0].mean())[1]
    share = np.diff(TEACHER_STEPS * gradient) / (student_steps * np.log(2) * anchor[1:])
    # Measured 1.25, 1.16, 1.10 and 1.42, 1.25, 1.15.
    assert np.all(gradient > 0) and np.all(np.diff(share) < 0) and 1 < share[-1] < 1.2
    of_it = over_teacher_steps(perfect, np.mean)[0] / loss
    assert np.all(of_it[:-1] / of_it[1:] > 2.5) and of_it[-1] < 0.02


def test_perfect_student_at_drawn_times():
    """With the times as training draws them, the anchors at t = 0 included, the loss falls as it must."""
    mixture, student_steps, _ = PROBLEMS["two components on a line"]
    with jax.enable_x64(True):
        draws = jax.jit(functools.partial(distillation_loss, student_steps=student_steps, count=4096))
        coarse, fine = (np.asarray(draws(0.0, mixture, jnp.int32(i))) for i in (6, 9))  # N_teacher 64, 512
    # Finite, all of them. 8 times the steps: between 8^2.7 and 8^3; 32 examples are anchors of 512 steps.
    assert 8**2.4 < coarse.mean() / fine.mean() < 8**3.2


# --- Objectives that are each other's special cases. ---

SCHEDULES = st.builds(
    lambda low, high, end_points: schedules.interpolated(
        noise_resolution_low=low, noise_resolution_high=high, image_resolution=64, end_points=end_points
    ),
    st.sampled_from([16, 32, 64]),
    st.sampled_from([32, 64, 128]),
    st.sampled_from(["moved", "kept"]),
)


@hypothesis.given(
    seed=st.integers(0, 2**31 - 1),
    student_steps=st.integers(1, 64),
    schedule=st.one_of(st.just(COSINE), SCHEDULES),
    kind=st.sampled_from(["huber", "squared"]),
    epsilon=st.sampled_from([1e-4, 1e-2, 1.0]),
    reduction=st.sampled_from(["mean", "sum"]),
    weight=st.sampled_from(["snr_plus_one", "sqrt_snr_plus_one", "max_snr_one"]),
)
def test_segments_of_one_step_are_diffusion_training(
    seed, student_steps, schedule, kind, epsilon, reduction, weight
):
    """N_per = 1 with x_teacher = x: w_t D(x - x_hat) on the grid's times, loss and gradient, in float64."""
    theta, key = 0.3, jax.random.key(seed)

    def mean_loss(theta):
        objective = constant_grid(
            student_steps,
            student_steps=student_steps,
            distance=kind,
            huber_epsilon=epsilon,
            huber_reduction=reduction,
            loss_weight=weight,
        )
        functions = networks(linear_model(theta), schedule=schedule)
        losses = objective(functions, X, COND, key, jnp.int32(0))
        return losses.mean(), losses

    gradient, losses = jax.grad(mean_loss, has_aux=True)(theta)

    key_times, key_eps, _ = jax.random.split(key, 3)
    t = segments.draw_times(
        key_times, batch_size=len(X), student_steps=student_steps, steps_per_segment=jnp.int32(1)
    ).t
    noise, slopes = np.asarray(jax.random.normal(key_eps, SHAPE), np.float64), []
    for n, logsnr in enumerate(np.asarray(schedule(t), np.float64)):
        alpha, sigma = reference.alpha_sigma(logsnr)
        x = np.asarray(X[n], np.float64)
        z_t = alpha * x + sigma * noise[n]
        x_diff = x - numpy_x_hat(theta, z_t, logsnr)
        x_hat_slope = -sigma * z_t * np.cos(logsnr / 8)
        total = np.mean if reduction == "mean" else np.sum
        square, slope = total(x_diff**2), -2 * total(x_diff * x_hat_slope)
        distance = square
        if kind == "huber":
            distance = np.sqrt(square + epsilon**2) - epsilon
            slope /= 2 * np.sqrt(square + epsilon**2)
        w = {
            "snr_plus_one": np.exp(logsnr) + 1,
            "sqrt_snr_plus_one": np.sqrt(np.exp(logsnr) + 1),
            "max_snr_one": max(np.exp(logsnr), 1),
        }[weight]
        slopes.append(w * slope)
        # x - x_hat cancels to 1e-7 / sigma of itself, sigma > 0.01 here; the log-SNR is within 2e-6.
        np.testing.assert_allclose(losses[n], w * distance, rtol=1e-4)
    np.testing.assert_allclose(gradient, np.mean(slopes), rtol=1e-4, atol=1e-4 * np.max(np.abs(slopes)))


@hypothesis.given(
    seed=st.integers(0, 2**31 - 1),
    t=st.floats(0.1, 1.0),
    m_over_t=st.floats(0.1, 0.9),
    s_over_m=st.floats(0.0, 0.9),
    xvar_frac=st.floats(0.0, 1.0),
    schedule=st.one_of(st.just(COSINE), SCHEDULES),
)
def test_progressive_target_is_two_addim_steps(seed, t, m_over_t, s_over_m, xvar_frac, schedule):
    """The loss against invDDIM(aDDIM(aDDIM(z_t))) in float64, for any t > m > s, s = 0 included."""
    times = [np.float32(time) for time in (t, t * m_over_t, t * m_over_t * s_over_m)]
    key, theta = jax.random.key(seed), 0.3
    with pytest.MonkeyPatch.context() as patch:
        drawn = tuple(jnp.full(len(X), time) for time in times)
        patch.setattr(segments, "draw_halves", lambda *_, **__: drawn)
        functions = networks(linear_model(theta), linear_model(0.2), schedule=schedule)
        losses = Progressive(stages=(2, 1), xvar_frac=xvar_frac)(functions, X, COND, key, jnp.int32(0))
    at, middle, to = (float(schedule(jnp.asarray(time))) for time in times)
    noise = np.asarray(jax.random.normal(jax.random.split(key, 3)[1], SHAPE), np.float64)
    alpha, sigma = reference.alpha_sigma(at)

    def teach(z, x, start, end):
        x_teacher = numpy_x_hat(0.2, z, start)
        return reference.addim(x_teacher, z, start, end, xvar_frac * np.mean((x_teacher - x) ** 2))

    for n in range(len(X)):
        x = np.asarray(X[n], np.float64)
        z_t = alpha * x + sigma * noise[n]
        z_s = teach(teach(z_t, x, at, middle), x, middle, to)
        x_diff = reference.inv_ddim(z_s, z_t, at, to) - numpy_x_hat(theta, z_t, at)
        # Times are 10% of t or more apart: nothing cancels much.
        np.testing.assert_allclose(losses[n], max(np.exp(at), 1) * np.mean(x_diff**2), rtol=5e-4)


# --- Objectives as updates of a network. ---


def network(params, z_t, logsnr_t, cond, key):
    """A hidden layer with a noise level, a class and dropout; small, for each test compiles updates of it."""
    hidden = jnp.tanh(z_t @ params["in"] + params["class"][cond] * jnp.cos(logsnr_t / 8)[:, None])
    if key is not None:
        hidden *= jax.random.bernoulli(key, 0.9, hidden.shape) / 0.9
    return hidden @ params["out"]


@functools.cache
def network_params(seed):
    shapes = {"in": (4, 16), "class": (2, 16), "out": (16, 4)}
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: jax.random.normal(key, shape) / 2
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def train(objective, *, updates, target_decay=None, apply=network):
    """State after some updates by `objective`, a loss as `config_and_loss` gives; and the jitted update."""

    def bind(params):
        return None if params is None else functools.partial(apply, params)

    def loss_fn(params, teacher_params, target_params, batch, key, train_step):
        networks = map(bind, (params, teacher_params, target_params))
        return objective(*networks, batch["image"], batch["label"], key, train_step)

    config, _ = config_and_loss("diffusion")
    adam = optimizer.adam(config.optimizer, num_steps=config.training.num_steps)
    update = jax.jit(
        step.Update(loss_fn=loss_fn, optimizer=adam, ema_decay=0.9, target_decay=target_decay, seed=0)
    )
    state = step.init_state(network_params(0), adam, target_decay=target_decay)
    for n in range(updates):
        batch = {
            "image": jnp.tanh(jax.random.normal(jax.random.key(100 + n), (16, 4))),
            "label": jnp.arange(16) % 2,
        }
        state, _ = update(state, network_params(7), batch)
    return state, update


def test_tract_of_one_phase_without_momentum_trains_like_distillation():
    """Three updates of config.objective = tract, target_decay 0: those of the squared CD loss."""
    config, tract = config_and_loss("tract")
    before, after = config.tract.stages

    def distillation(student, teacher, target, *arguments):
        assert target is None
        objective = constant_grid(
            before,
            student_steps=after,
            teacher_step="ddim",
            distance="squared",
            loss_weight=config.tract.loss_weight,
        )
        functions = networks(student, teacher, schedule=build.schedule(config))
        return objective(functions, *arguments)

    expected, _ = train(distillation, updates=3)
    actual, _ = train(tract, updates=3, target_decay=0.0)
    slow, _ = train(tract, updates=3, target_decay=0.9)
    gaps = []
    for start, a, b, c in zip(
        *map(jax.tree.leaves, (network_params(0), actual.params, expected.params, slow.params)), strict=True
    ):
        # The same operations; Adam's steps are 1e-2 whatever the gradient's size.
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)
        assert np.all(np.abs(a - start).max() > 1e-3)
        gaps.append(np.abs(a - c).max())
    # Momentum is felt from the third update on: the average of two updates' parameters is its target.
    assert max(gaps) > 1e-4


def test_one_compilation_while_the_teacher_steps_are_annealed():
    """N_teacher from 4 to 64 is a number in one program: the student is traced twice, its teacher once."""
    _, annealed = config_and_loss(
        "cd", student_steps=(4,), teacher_steps_first=4.0, teacher_steps_last=64.0, anneal_steps=4
    )
    traces, seen = [], []

    def counted(params, z_t, logsnr_t, cond, key):
        traces.append(key is None)
        if key is None:
            jax.debug.callback(lambda logsnr: seen.append(np.asarray(logsnr, np.float64)), logsnr_t)
        return network(params, z_t, logsnr_t, cond, key)

    _, update = train(annealed, updates=6, apply=counted)
    jax.effects_barrier()
    assert sorted(traces) == [False, False, True] and update._cache_size() == 1
    # That they really were annealed shows in the teacher's times, multiples of 1 / T and no coarser.
    u_0 = 2 / np.pi * np.arctan(np.exp(-7.5))
    for logsnr, grid_steps in zip(seen, [4, 8, 16, 32, 64, 64], strict=True):
        n = grid_steps * (2 / np.pi * np.arctan(np.exp(-logsnr / 2)) - u_0) / (1 - 2 * u_0)
        np.testing.assert_allclose(n, np.round(n), atol=1e-3)
        assert grid_steps == 4 or np.any(np.round(n) % 2 == 1)


# --- Examples do not influence each other. ---


def of_others(n, count):
    """The indices 0..count - 1 with those other than n in another order."""
    order = np.arange(count)
    others = np.delete(order, n)
    order[others] = np.roll(others, 1)
    return order


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_take_examples_one_by_one(name):
    """Other images and labels, or the same ones in other places, change nothing for example n.

    Its own place is kept: times and noise are drawn by place.
    """
    _, objective = config_and_loss(name)
    networks = [linear_model(theta) for theta in (0.3, 0.2, 0.25)]
    cond = jnp.arange(len(X)) % 3

    def losses(x, cond):
        return objective(*networks, x, cond, KEY, jnp.int32(0))

    x = jax.image.resize(X, (len(X), 8, 8, 3), "nearest") + 0.1 * jax.random.normal(KEY, (len(X), 8, 8, 3))
    whole = losses(x, cond)
    assert np.all(np.isfinite(whole))
    for n in (0, 3, 7):
        order = of_others(n, len(X))
        other = np.arange(len(X)) != n
        changed = losses(jnp.where(other[:, None, None, None], -0.5 * x, x), jnp.where(other, cond + 1, cond))
        moved = losses(x[order], cond[order])
        for disturbed in (changed, moved):
            np.testing.assert_array_equal(disturbed[n], whole[n])
            assert np.mean(disturbed[other] != whole[other]) > 0.8


@pytest.mark.parametrize("sampler", typing.get_args(sampling.Sampler))
@pytest.mark.parametrize("clip", ["last", "every"])
def test_samplers_take_images_one_by_one(sampler, clip):
    """Permuted noise, labels and keys give the same images in that order; other images change nothing."""
    count = 8
    keys = sampling.image_keys(jax.random.key(0), jnp.arange(2 * count))
    noise, cond = sampling.initial_noise(keys, (4, 4, 3)), jnp.arange(2 * count) % 3

    def model_fn(z_t, logsnr_t, cond, key):
        return jnp.tanh(linear_model(0.3)(z_t, logsnr_t, cond, key))

    @jax.jit
    def images(order):
        grid = schedules.uniform_grid(COSINE, 4)
        return sampling.sample(
            model_fn, noise[order], cond[order], keys[order], logsnr=grid, sampler=sampler, clip=clip
        )

    whole = images(jnp.arange(count))
    order = np.random.default_rng(0).permutation(count)
    # In other places another vector unit may round differently.
    np.testing.assert_allclose(images(jnp.asarray(order)), whole[order], rtol=0, atol=2e-6)
    for n in (0, 3, 7):
        others = count + np.arange(count)
        others[n] = n
        changed = images(jnp.asarray(others))
        np.testing.assert_array_equal(changed[n], whole[n])
        assert not np.allclose(changed, whole, atol=1e-2)
