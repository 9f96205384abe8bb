"""Converted networks compute what their authors' code computes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax.diffusion import sampling, schedules
from mcm_jax.models import preconditioning as preconditionings
from mcm_jax.models.conditions import Classes
from mcm_jax.models.edm2 import EDM2Settings
from mcm_jax.models.network import Network
from mcm_jax.system.errors import InputError
from mcm_jax.teachers import nvidia, weights
from tests.teachers import golden

# The authors' float32 differs from float64 by up to 7e-6, ours from theirs by up to 4e-6.
CLOSE = 2e-5
# At 1000 ln(sigma) / 4, up to 1554, float32 angles differ by 1e-4: their own F is 5e-5 from float64.
LOOSE = 1e-4


@functools.cache
def network(name, kind):
    imported = golden.imported(name, kind)
    params = jax.tree.map(jnp.asarray, imported.params)
    return Network(imported.settings, (32, 32, 3), Classes(imported.num_classes)), params


@functools.cache
def _predict(made):
    @jax.jit
    def call(params, x, level, labels):
        return made._module(params).predict(x, level, labels, None)

    return call


def predict(name, kind, x, level, labels):
    """F, NCHW."""
    made, params = network(name, kind)
    return _of_four(_predict(made), params, x, level, labels)


def _of_four(function, params, x, level, labels):
    """Always calls the function with four examples, NHWC: it is compiled once for all tests."""
    arguments = np.float32(x).transpose(0, 2, 3, 1), np.float32(level), np.int32(labels)
    four = (np.resize(argument, (4, *argument.shape[1:])) for argument in arguments)
    return np.asarray(function(params, *four))[: len(x)].transpose(0, 3, 1, 2)


def v_hat(name, kind, z, logsnr, labels):
    """v_hat, NCHW."""
    made, params = network(name, kind)
    return _of_four(_apply(made), params, z, logsnr, labels)


@functools.cache
def _apply(made):
    return jax.jit(lambda params, z, logsnr, labels: made.apply(params, z, logsnr, labels, None))


def x_hat(name, kind, z, logsnr, labels):
    """x_hat in float64, NCHW."""
    alpha, sigma = (np.sqrt(1 / (1 + np.exp(sign * logsnr)))[:, None, None, None] for sign in (-1, 1))
    return alpha * z - sigma * v_hat(name, kind, z, logsnr, labels)


def scaled(x, sigma):
    """z of x + sigma eps, and its log-SNR."""
    return x / np.sqrt(1 + sigma**2)[:, None, None, None], -2 * np.log(sigma)


@pytest.mark.parametrize(("name", "kind"), golden.NETWORKS[:-1])
def test_the_shapes_are_those_of_the_network(name, kind):
    made, params = network(name, kind)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, made.abstract_params)


@pytest.mark.parametrize(
    ("name", "kind", "close"),
    [
        ("edm2-img64", "edm", CLOSE),
        ("edm-imagenet64-adm", "edm", CLOSE),
        ("consistency-models-64", "edm_1000", LOOSE),
        ("consistency-models-64", "consistency", LOOSE),
    ],
)
def test_networks_on_sigma(name, kind, close):
    want = golden.expected(name)
    sigma, x, labels = want["sigma"].astype(np.float64), want["x"], want["class_index"]
    c_in = (1 / np.sqrt(sigma**2 + 0.25))[:, None, None, None]
    level = np.log(sigma) / 4 * (1 if kind == "edm" else 1000)
    f = predict(name, kind, np.float32(c_in * x), level, labels)
    np.testing.assert_allclose(f, want.get("F_float64", want["F"]), atol=close, rtol=0)
    key = {"edm": "v_hat", "edm_1000": "v_hat_diffusion", "consistency": "v_hat_consistency"}[kind]
    z, logsnr = scaled(x, sigma)
    np.testing.assert_allclose(v_hat(name, kind, z, logsnr, labels), want[key], atol=close, rtol=0)


@pytest.mark.parametrize("name", ["edm2-img64", "edm-imagenet64-adm"])
def test_any_class_is_the_label_zero(name):
    want = golden.expected(name)
    sigma = want["sigma"].astype(np.float64)[1:3]
    z, logsnr = scaled(want["x"][1:3], sigma)
    # D is sigma v_hat away from x: at sigma 5, errors of v_hat are five times as large.
    got = x_hat(name, "edm", z, logsnr, [10, 10])
    np.testing.assert_allclose(got, want["D_no_label"], atol=5 * CLOSE, rtol=0)


@pytest.mark.parametrize("name", ["guided-diffusion-64", "guided-diffusion-128"])
def test_networks_on_steps(name):
    (kind,) = golden.OPENAI[name]
    want = golden.expected(name)
    f = predict(name, kind, want["x"], want["t"], want["class_index"])
    np.testing.assert_allclose(f, want["F"], atol=CLOSE, rtol=0)
    half = predict(name, kind, want["x"][2:3], want["t_fractional"], want["class_index"][2:3])
    np.testing.assert_allclose(half, want["F_fractional"], atol=CLOSE, rtol=0)
    squared = want["alphas_cumprod"]
    logsnr = np.log(squared / (1 - squared))
    np.testing.assert_allclose(preconditionings.step_logsnrs(kind), logsnr, atol=2e-6, rtol=0)
    # Item 2, at step 700. v_hat = (eps - s z) / alpha; alpha is 0.19 in the linear schedule.
    at = want["t"][2:3]
    got = v_hat(name, kind, want["x"][2:3], logsnr[at], want["class_index"][2:3])
    np.testing.assert_allclose(got, want["v_hat"], atol=LOOSE, rtol=0)


@pytest.mark.parametrize("name", ["guided-diffusion-64", "guided-diffusion-128"])
def test_beyond_its_steps_the_network_predicts_that_of_the_last(name):
    (kind,) = golden.OPENAI[name]
    want = golden.expected(name)
    ends = preconditionings.step_logsnrs(kind)[[0]]
    z, labels = want["x"][:1], want["class_index"][:1]
    np.testing.assert_array_equal(v_hat(name, kind, z, ends, labels), v_hat(name, kind, z, ends + 9, labels))


def test_a_consistency_model_returns_its_input_at_the_lowest_noise():
    name, want = "consistency-models-64", golden.expected("consistency-models-64")
    z, logsnr = scaled(want["x"], np.full(4, preconditionings.SIGMA_MIN))
    got = x_hat(name, "consistency", z, logsnr, want["class_index"])
    # Exact but for the rounding of z and of log-SNR 12.4 to float32.
    np.testing.assert_allclose(got, want["x"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["edm2-img64", "edm-imagenet64-adm"])
def test_heun_sampler_end_to_end(name):
    """The authors' deterministic sampler, 6 steps from sigma 80 to 0.002 (arXiv:2206.00364, algorithm 1)."""
    want = golden.expected(name)

    def denoise(x, sigma):
        z, logsnr = scaled(x, np.array([sigma]))
        return x_hat(name, "edm", z, logsnr, [3])

    i = np.arange(6) / 5
    sigmas = np.append((80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7, 0)
    x = want["heun6_noise"].astype(np.float64) * 80
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        slope = (x - denoise(x, sigma)) / sigma
        proposed = x + (following - sigma) * slope
        if following > 0:
            slope = (slope + (proposed - denoise(proposed, following)) / following) / 2
        x = x + (following - sigma) * slope
    np.testing.assert_allclose(x, want["heun6_sample"], atol=LOOSE, rtol=0)


@pytest.mark.parametrize("name", ["guided-diffusion-64", "guided-diffusion-128"])
def test_ddim_end_to_end(name):
    (kind,) = golden.OPENAI[name]
    want = golden.expected(name)
    times, squared = want["ddim10_times"], want["alphas_cumprod"]
    z = want["ddim10_noise"].astype(np.float64)
    for at in range(len(times) - 1, -1, -1):
        now, before = squared[times[at]], squared[times[at - 1]] if at > 0 else 1.0
        x = np.clip(x_hat(name, kind, z, np.log([now / (1 - now)]), [3]), -1, 1)
        eps = (z - math.sqrt(now) * x) / math.sqrt(1 - now)
        z = math.sqrt(before) * x + math.sqrt(1 - before) * eps
    # Ten steps, and 1 / alpha = 6.4 or 61 at the first.
    np.testing.assert_allclose(z, want["ddim10_sample"], atol=5e-4, rtol=0)


def test_consistency_samplers_end_to_end():
    name, want = "consistency-models-64", golden.expected("consistency-models-64")

    def denoise(x, sigma):
        z, logsnr = scaled(x, np.array([sigma]))
        return np.clip(x_hat(name, "consistency", z, logsnr, [3]), -1, 1)

    noise = want["twostep_noise"].astype(np.float64)
    one = denoise(80 * noise[:1], 80.0)
    np.testing.assert_allclose(one, want["onestep_sample"], atol=3 * LOOSE, rtol=0)
    sigma = (80 ** (1 / 7) + 22 / 39 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    two = denoise(one + np.sqrt(sigma**2 - 0.002**2) * noise[1:2], sigma)
    np.testing.assert_allclose(two, want["twostep_sample"], atol=3 * LOOSE, rtol=0)


@pytest.mark.parametrize(("steps", "key"), [(1, "onestep_sample"), (2, "twostep_sample")])
def test_our_sampler_is_that_of_the_published_consistency_models(steps, key, monkeypatch):
    want = golden.expected("consistency-models-64")
    noise = jnp.asarray(want["twostep_noise"].transpose(0, 2, 3, 1))
    monkeypatch.setattr(sampling, "_normal", lambda keys, purpose, shape: noise[1:2])
    made, params = network("consistency-models-64", "consistency")
    got = sampling.sample(
        lambda *arguments: _apply(made)(params, *arguments[:3]),
        noise[:1],
        jnp.array([3]),
        jax.random.split(jax.random.key(0), 1),
        logsnr=schedules.published_grid("published_cd", steps),
        sampler="consistency",
        clip="every",
    )
    # Ours starts from sigma / sqrt(1 + sigma^2) = 0.99992 times their noise.
    np.testing.assert_allclose(got.transpose(0, 3, 1, 2), want[key], atol=5e-4, rtol=0)


@pytest.mark.parametrize(("name", "kind"), golden.NETWORKS[:-1])
def test_the_true_sizes(name, kind):
    """The published shapes become exactly those of the network at its full size."""
    side = 128 if name == "guided-diffusion-128" else 64
    zeros = {key: np.broadcast_to(np.float32(0), shape) for key, shape in golden.shapes(name).items()}
    if name == "edm2-img64":
        made = weights.edm2(zeros, {"unet.dec.8x8_in0.num_heads": 12})
    elif name == "edm-imagenet64-adm":
        made = weights.edm(zeros, {"model.dec.8x8_in0.num_heads": 12})
    else:
        made = weights.openai(zeros, preconditioning=kind)
    network = Network(made.settings, (side, side, 3), Classes(1000))
    assert made.num_classes == 1000
    assert jax.tree.map(np.shape, made.params) == jax.tree.map(np.shape, network.abstract_params)


@pytest.mark.parametrize(
    ("width", "published"), [(192, 280_209_381), (256, 497_803_173), (320, 777_492_325), (384, 1_119_276_837)]
)
def test_edm2_has_the_published_number_of_parameters(width, published):
    settings = EDM2Settings(widths=(width, 2 * width, 3 * width, 4 * width))
    abstract = Network(settings, (64, 64, 3), Classes(1000)).abstract_params
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract))
    # Theirs includes 128 weights of logvar, and leaves out frequencies and phases, which are not learned.
    assert count + 128 - 2 * width == published


@pytest.mark.parametrize(("name", "settings"), [("edm2-img64", "edm2"), ("edm-imagenet64-adm", "adm")])
def test_missing_and_unknown_tensors_are_refused(name, settings):
    tensors, numbers = nvidia.read(golden.file(name), name=name)
    convert = weights.edm2 if settings == "edm2" else weights.edm
    last = next(key for key in tensors if key.endswith("out_conv.weight"))
    with pytest.raises(KeyError, match="out_conv"):
        convert({key: value for key, value in tensors.items() if key != last}, numbers)
    with pytest.raises(ValueError, match=r"unknown tensors: model\.extra\.weight"):
        convert(tensors | {"model.extra.weight": tensors[last]}, numbers)


@pytest.mark.parametrize("name", ["edm2-img64", "edm-imagenet64-adm"])
def test_a_truncated_pickle_is_refused(name):
    content = golden.file(name)
    with pytest.raises(InputError, match=r"x\.pkl: not a network of EDM or EDM2"):
        nvidia.read(content[: len(content) // 2], name="x.pkl")


def test_float32_is_exact_enough_at_extreme_noise():
    """EDM's v_hat, against the formula of EDM's paper in float64, from log-SNR -15 to 15."""
    logsnr = np.linspace(-15, 15, 61)
    rng = np.random.default_rng(0)
    z, f = rng.standard_normal((2, 61, 4)).astype(np.float32)
    got = preconditionings.v_hat(
        "edm", lambda x, level: jnp.asarray(f), jnp.asarray(z), jnp.asarray(np.float32(logsnr))
    )
    sigma = np.exp(-np.float32(logsnr).astype(np.float64) / 2)[:, None]
    alpha = 1 / np.sqrt(1 + sigma**2)
    x = z / alpha
    d = 0.25 / (sigma**2 + 0.25) * x + sigma * 0.5 / np.sqrt(sigma**2 + 0.25) * f
    want = (alpha * z - d) / (sigma * alpha)
    # Some roundings of values up to 4.
    np.testing.assert_allclose(got, want, atol=2e-6, rtol=0)


def test_noise_levels_reach_the_network_as_it_was_trained():
    """EDM's c_in x and c_noise (arXiv:2206.00364, table 1)."""
    seen = []
    logsnr = np.float32([-6.0, 0.0, 9.0])
    z = np.float32([[1.0], [2.0], [3.0]])
    for kind, factor in (("edm", 1), ("edm_1000", 1000), ("consistency", 1000)):
        preconditionings.v_hat(
            kind, lambda x, level: seen.append((x, level)) or x, jnp.asarray(z), jnp.asarray(logsnr)
        )
        x, level = seen.pop()
        sigma = np.exp(-logsnr.astype(np.float64) / 2)
        unscaled = z * np.sqrt(1 + sigma**2)[:, None]
        np.testing.assert_allclose(x, unscaled / np.sqrt(sigma**2 + 0.25)[:, None], rtol=1e-6)
        np.testing.assert_allclose(level, factor * np.log(sigma) / 4, rtol=1e-6)
