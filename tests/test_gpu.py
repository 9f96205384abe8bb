"""What a GPU computes, against the CPU. launch/gpu_check.sh runs these tests; launch/test.sh skips them.

Products in float32 use TF32 on a GPU, ten bits of mantissa, unless "highest" precision is requested.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax.config import validation
from mcm_jax.config.settings import default_config
from mcm_jax.evaluation import inception_weights
from mcm_jax.models import attention
from mcm_jax.models.conditions import Classes
from mcm_jax.models.network import Network
from mcm_jax.runs import build, samplers, trainer
from mcm_jax.runs.run import load_run
from mcm_jax.system import sharding
from mcm_jax.training.state import TeacherParams
from tests import tiny
from tests.teachers import golden

pytestmark = pytest.mark.gpu
CLASSES = 5


@functools.cache
def devices():
    """A GPU and the CPU."""
    return jax.devices("gpu")[0], jax.devices("cpu")[0]


def on(device, function, *arguments):
    """What a jitted function returns there, in full float32."""
    with jax.default_matmul_precision("highest"):
        return jax.device_get(jax.jit(function)(*jax.device_put(arguments, device)))


def assert_close(found, expected, *, relative):
    """Compares the norm of the difference, for each array, with that of the expected array."""
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= relative * np.linalg.norm(b) + 1e-6, jax.tree_util.keystr(path)


def config(**model):
    raw = default_config()
    raw.objective, raw.teacher_checkpoint = "cd", "any"
    raw.data.resolution = 32
    raw.consistency.student_steps = (4,)
    raw.model.update(
        kinds=("resnet", "transformer", "transformer"),
        widths=(32, 64, 128),
        blocks=(1, 1, 2),
        dropouts=(0.0, 0.0, 0.0),
        embedding_width=64,
        resnet_norm="group",
        **model,
    )
    return validation.validate(raw)


def random_params(network, seed=0):
    """With noise on top: at initialisation most of the network has no effect."""
    params = jax.jit(network.init)(jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    moved = [a + 0.05 * jax.random.normal(key, a.shape) for a, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


def batch_of(size=8):
    key_x, key_label = jax.random.split(jax.random.key(5))
    x = jax.random.uniform(key_x, (size, 32, 32, 3), minval=-1.0)
    return {"image": x, "label": jax.random.randint(key_label, (size,), 0, CLASSES)}


def loss_and_gradient(settings, mesh):
    network = build.network(settings, condition=Classes(CLASSES))
    losses = build.loss_fn(settings, network, mesh=mesh)

    def function(params, teacher, batch):
        def mean(params):
            return losses(params, TeacherParams(teacher), None, batch, jax.random.key(0), jnp.int32(0)).mean()

        return jax.value_and_grad(mean)(params)

    return network, function


@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("masked", [False, True])
def test_the_kernel_of_attention(width, masked):
    """bfloat16 keeps 8 bits: outputs and gradients are within 1%, as those of einsum in bfloat16 are."""
    keys = jax.random.split(jax.random.key(0), 4)
    (q, k, v), w = (
        [jax.random.normal(key, (2, 4, 256, width), jnp.bfloat16) for key in keys[:3]],
        jax.random.normal(keys[3], (2, 4, 256, width)),
    )
    mask = jnp.arange(256) < jnp.array([[100], [256]]) if masked else None

    def value_and_grad(attend, *qkv):
        def total(q, k, v):
            h = attend(q * width**-0.5, k, v, mask)
            return jnp.sum(h.astype(jnp.float32) * w), h

        (_, h), gradients = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(*qkv)
        return h, gradients

    lowered = jax.jit(functools.partial(value_and_grad, attention.cudnn)).lower(q, k, v)
    assert "cudnn" in lowered.as_text() or "fmha" in lowered.as_text()
    found = lowered.compile()(q, k, v)
    wide = [part.astype(jnp.float32) for part in (q, k, v)]
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(functools.partial(value_and_grad, attention.einsum))(*wide)
    assert_close(found, expected, relative=1e-2)


def test_loss_and_gradient_in_float32():
    results = []
    for device in devices():
        mesh = sharding.make_mesh(data=1, fsdp=1, devices=[device])
        network, function = loss_and_gradient(config(), mesh)
        arguments = jax.device_put((random_params(network), random_params(network, 2), batch_of()), device)
        with jax.default_matmul_precision("highest"):
            results.append(jax.device_get(jax.jit(function)(*arguments)))
    # A sum of thousands of terms in another order; the gradient of norm_k's bias is zero but for rounding.
    assert_close(*results, relative=2e-3)


def test_loss_and_gradient_in_bfloat16():
    gpu, _ = devices()
    mesh = sharding.make_mesh(data=1, fsdp=1, devices=[gpu])
    results = []
    for settings in (config(dtype="bfloat16"), config()):
        network, function = loss_and_gradient(settings, mesh)
        arguments = random_params(network), random_params(network, 2), batch_of()
        lowered = jax.jit(function).lower(*arguments)
        uses_kernel = "cudnn" in lowered.as_text() or "fmha" in lowered.as_text()
        assert uses_kernel == (settings.model.dtype == "bfloat16")
        loss, gradient = lowered.compile()(*arguments)
        flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])
        results.append((np.asarray(loss), flat))
    (loss, gradient), (expected, expected_gradient) = results
    np.testing.assert_allclose(loss, expected, rtol=0.02)
    cosine = gradient @ expected_gradient / np.linalg.norm(gradient) / np.linalg.norm(expected_gradient)
    assert cosine > 0.99


def test_samples():
    settings = config()
    network = build.network(settings, condition=Classes(CLASSES))
    params, images = random_params(network), []
    for device in devices():
        mesh = sharding.make_mesh(data=1, fsdp=1, devices=[device])
        sampler = samplers.make_sampler(settings, network, samplers.resolve(settings), mesh=mesh)
        arguments = (params, jax.random.key(3), None, jnp.arange(8), jnp.arange(8) % CLASSES)
        arguments = jax.device_put(arguments, device)
        with jax.default_matmul_precision("highest"):
            images.append(np.asarray(sampler(*arguments)[0], np.int32))
    # Rounding to bytes turns the smallest difference into one level.
    difference = np.abs(images[0] - images[1])
    assert difference.max() <= 2 and (difference > 0).mean() < 0.01


def test_inception_features():
    """They use full float32 by themselves, so that distances do not depend on the machine."""
    network, rng = inception_weights.abstract_network(), np.random.default_rng(0)
    # Variances as by He et al. (arXiv:1502.01852) leave activations of the order of one.
    params = jax.tree.map(
        lambda leaf: np.float32(
            rng.standard_normal(leaf.shape) * (2 / max(1, np.prod(leaf.shape[:-1]))) ** 0.5
        ),
        network.params,
    )
    images = rng.integers(0, 256, (8, 64, 64, 3), np.uint8)
    found = [
        jax.device_get(jax.jit(network.apply)(*jax.device_put((params, images), device)))
        for device in devices()
    ]
    assert_close(*found, relative=1e-5)


@pytest.mark.parametrize("name", ["edm2-img64", "edm-imagenet64-adm"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_published_teachers(name, dtype):
    imported = golden.imported(name, "edm")
    settings = dataclasses.replace(imported.settings, dtype=dtype)
    network = Network(settings, (32, 32, 3), Classes(imported.num_classes))
    plain = Network(imported.settings, (32, 32, 3), Classes(imported.num_classes))
    params = jax.tree.map(jnp.asarray, imported.params)
    z = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
    arguments = (params, z, jnp.array([-4.0, 0.0, 2.0, 6.0]), jnp.arange(4), None)
    gpu, cpu = devices()
    found, expected = on(gpu, network.apply, *arguments), on(cpu, plain.apply, *arguments)
    # The authors compute in half precision themselves, with this error.
    assert_close(found, expected, relative=1e-4 if dtype == "float32" else 0.03)


def test_a_run_trains_resumes_and_samples(tmp_path):
    """The programs themselves, on the GPU: a teacher, a student of it, a resume, and samples."""
    data = tiny.prepare_folder(tmp_path / "tiny")
    assert trainer.train(tiny.two_stage_config(data), tmp_path / "teacher")
    student = tiny.two_stage_config(data, "cd", tmp_path / "teacher")
    assert trainer.train(student, tmp_path / "cd")
    student.training.num_steps = 6
    assert trainer.train(student, tmp_path / "cd")
    images, _ = load_run(tmp_path / "cd").sample(4)
    assert images.shape == (4, 8, 8, 3) and len(np.unique(images)) > 2
