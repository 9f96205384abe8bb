"""The programs that tests/benchmarks/gpu.py times, in PyTorch, eager and by torch.compile."""

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import numpy as np
import torch

# This process computes with PyTorch; JAX only provides parameters and expected values.
jax.config.update("jax_platforms", "cpu")

from mcm_jax.diffusion import segments
from mcm_jax.models.conditions import Classes
from mcm_jax.models.network import Network
from mcm_jax.objectives.objective import Networks
from mcm_jax.runs import build
from tests.benchmarks import gpu_settings, torch_consistency, torch_uvit
from tests.benchmarks.gpu_settings import NUM_CLASSES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Programs:
    """Builds programs on request; all share one network."""

    def __init__(self, *, small: bool, batch_size: int):
        for system in ("ct", "cd"):
            check_agreement(system)
        self.config = gpu_settings.config("ct", small=small, batch_size=batch_size)
        self.small, self.batch_size = small, batch_size
        network = build.network(self.config, condition=Classes(NUM_CLASSES))
        self.model, self.teacher = (make_model(network).train() for _ in range(2))
        self.teacher.eval().requires_grad_(False)
        # For sampling, the parameters are rounded once.
        self.rounded = torch_uvit.rounded_copy(self.teacher)
        # XLA also chooses convolutions by their time.
        torch.backends.cudnn.benchmark = True
        parameters, settings = list(self.model.parameters()), self.config.optimizer
        self.ema = [parameter.detach().clone() for parameter in parameters]
        self.adam = torch.optim.Adam(
            parameters,
            lr=settings.learning_rate,
            betas=(settings.b1, settings.b2),
            eps=settings.eps,
            fused=True,
        )
        shape = (batch_size, network.shape[-1], *network.shape[:2])
        images = torch.rand(shape, device=DEVICE) * 2 - 1
        self.x = images.to(memory_format=torch.channels_last)
        self.label = torch.randint(NUM_CLASSES, (batch_size,), device=DEVICE)

    def program(self, variant: str, case: str) -> Callable[[int], None]:
        build_program = {"features": self._features, "sample": self._sample}.get(case)
        step = build_program(variant) if build_program else self._train(variant, with_teacher=case == "cd")
        use_tf32 = case != "features"

        def run(count: int) -> None:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = use_tf32
            for _ in range(count):
                step()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        return run

    def description(self) -> dict[str, Any]:
        versions = {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}
        platform = "gpu" if DEVICE.type == "cuda" else "cpu"
        return {"platform": platform, "versions": versions, "flops": gpu_settings.flops(self.config)}

    def _train(self, variant: str, *, with_teacher: bool) -> Callable[[], None]:
        consistency = self.config.consistency
        loss = functools.partial(
            torch_consistency.loss,
            self.model,
            self.teacher if with_teacher else None,
            xvar_frac=consistency.xvar_frac,
            huber_epsilon=consistency.huber_epsilon,
        )
        compute = torch.compile(loss) if variant == "torch.compile" else loss
        settings, parameters = self.config.optimizer, list(self.model.parameters())

        def step() -> None:
            times = torch_consistency.draw_times(
                self.batch_size,
                student_steps=gpu_settings.STUDENT_STEPS,
                teacher_steps=int(gpu_settings.TEACHER_STEPS),
                device=DEVICE,
            )
            self.adam.zero_grad()
            compute(self.x, self.label, torch.randn_like(self.x), times).backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            self.adam.step()
            with torch.no_grad():
                torch._foreach_lerp_(self.ema, parameters, 1 - settings.ema_decay)

        return step

    def _sample(self, variant: str) -> Callable[[], None]:
        model = torch.compile(self.rounded) if variant == "torch.compile" else self.rounded

        def step() -> None:
            z_1 = torch.randn_like(self.x)
            torch_consistency.sample(model, z_1, self.label, steps=gpu_settings.STUDENT_STEPS)

        return step

    def _features(self, variant: str) -> Callable[[], None]:
        # Only this program needs the package.
        from pytorch_fid import inception

        # Random weights instead of a download; they take no part in the time.
        with (
            mock.patch.object(inception, "load_state_dict_from_url"),
            mock.patch.object(torch.nn.Module, "load_state_dict"),
        ):
            model = inception.InceptionV3([3])
        model = model.eval().requires_grad_(False).to(DEVICE, memory_format=torch.channels_last)
        compute = torch.compile(model) if variant == "torch.compile" else model
        size = gpu_settings.features_batch(small=self.small)
        images = torch.randint(0, 256, (size, 3, 64, 64), device=DEVICE, dtype=torch.uint8)

        @torch.inference_mode()
        def step() -> None:
            compute(images.float() / 255)

        return step


def make_model(network: Network) -> torch_uvit.UViT:
    """PyTorch's own initialisation: the values take no part in the time."""
    return torch_uvit.UViT(network).to(DEVICE, memory_format=torch.channels_last)


def check_agreement(system: str, *, batch_size: int = 4) -> None:
    """Raises AssertionError if the loss or a gradient differs from ours by more than float32 explains."""
    config = gpu_settings.in_float32(gpu_settings.config(system, small=True, batch_size=batch_size))
    network = build.network(config, condition=Classes(NUM_CLASSES))
    student, teacher = (torch_uvit.random_params(network, seed) for seed in range(2))
    key_x, key_label, key = jax.random.split(jax.random.key(2), 3)
    x = jax.random.uniform(key_x, (batch_size, *network.shape), minval=-1.0)
    label = jax.random.randint(key_label, (batch_size,), 0, NUM_CLASSES)
    schedule = build.schedule(config)

    def mean_loss(params: Any) -> jax.Array:
        networks = Networks(
            student=functools.partial(network.apply, params),
            teacher=functools.partial(network.apply, teacher) if system == "cd" else None,
            target=None,
            schedule=schedule,
            null_cond=network.condition.null,
        )
        return config.loss(networks, x, label, key, jax.numpy.int32(0)).mean()

    expected, gradient = jax.jit(jax.value_and_grad(mean_loss))(student)
    # The draws of mcm_jax.objectives.consistency.
    key_times, key_eps, _ = jax.random.split(key, 3)
    per_segment = int(gpu_settings.TEACHER_STEPS) // gpu_settings.STUDENT_STEPS
    times = segments.draw_times(
        key_times,
        batch_size=batch_size,
        student_steps=gpu_settings.STUDENT_STEPS,
        steps_per_segment=jax.numpy.int32(per_segment),
    )
    logsnrs = (_tensor(schedule(t)).double() for t in (times.t, times.s, times.t_step))
    models = [torch_uvit.with_params(network, params).double() for params in (student, teacher)]
    for model in models:
        model.dtype = torch.float64
    loss = torch_consistency.loss(
        models[0],
        models[1] if system == "cd" else None,
        _tensor(x).permute(0, 3, 1, 2).double(),
        _tensor(label).long(),
        _tensor(jax.random.normal(key_eps, x.shape)).permute(0, 3, 1, 2).double(),
        torch_consistency.Times(*logsnrs),
        xvar_frac=config.consistency.xvar_frac,
        huber_epsilon=config.consistency.huber_epsilon,
    )
    loss.backward()
    np.testing.assert_allclose(expected, loss.item(), rtol=1e-4)
    ours = torch_uvit.to_torch_layout(gradient, models[0])
    largest = max(grad.abs().max().item() for grad in ours.values())
    for name, parameter in models[0].named_parameters():
        # Relative to the tensor's largest entry; small ones are sums of large terms that cancel.
        scale = max(ours[name].abs().max().item(), 1e-3 * largest)
        np.testing.assert_allclose(
            parameter.grad / scale, ours[name] / scale, atol=1e-3, rtol=0, err_msg=name
        )


def _tensor(array: jax.Array) -> torch.Tensor:
    return torch.tensor(np.array(array))
