"""Our train step against PyTorch eager: same network, parameters, batch, loss and optimizer.

    pip install -e '.[benchmark]'
    python -m tests.benchmarks.torch_train_step --batch_size=128

First loss and all gradients of both are compared on the same inputs (an independent check of
mcm_jax.models.uvit), then our jitted step and PyTorch's take turns. A step is: times and noise drawn,
v-loss, gradients, global clip, Adam, averaged parameters. Prints a table and, last, one line of JSON;
a ratio above 1 means that PyTorch is faster.

Both run in one process with the settings of mcm_jax.system.host, as every program does; the JSON repeats the
environment. Needs an idle machine: PyTorch's threads spin and suffer most where cores are shared. There
set OMP_WAIT_POLICY=passive and read the CPU milliseconds.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import flags
from ml_collections import config_flags

from mcm_jax.config import validation
from mcm_jax.config.settings import Config
from mcm_jax.diffusion import schedules
from mcm_jax.models.conditions import Classes
from mcm_jax.models.network import Network
from mcm_jax.runs import build
from mcm_jax.system import command_line, sharding
from mcm_jax.training import optimizer, step
from tests.benchmarks import torch_uvit

_CONFIG = config_flags.DEFINE_config_file(
    "config", str(Path(__file__).parents[2] / "configs/openmoji.py:teacher"), "A diffusion config."
)
_BATCH_SIZES = flags.DEFINE_multi_integer("batch_size", [64, 128], "Images a step; repeatable.")
_TURNS = flags.DEFINE_integer("turns", 10, "How often each of the two takes its turn.", lower_bound=1)
_TURN_STEPS = flags.DEFINE_integer(
    "turn_steps", 5, "Steps a turn; the first meets the other's cache and is not counted.", lower_bound=2
)
_THREADS = flags.DEFINE_integer("threads", os.cpu_count(), "PyTorch's threads; JAX takes all cores.")

NUM_CLASSES = 9
Batch = dict[str, jax.Array]


def main() -> None:
    torch.set_num_threads(_THREADS.value)
    config = validation.validate(command_line.loaded_config(_CONFIG))
    network = build.network(config, condition=Classes(NUM_CLASSES))
    check_agreement(config, network)
    results = [compare(config, network, batch_size) for batch_size in _BATCH_SIZES.value]
    print("batch                JAX ms  torch ms  ratio")
    for result in results:
        for name in ("median", "fastest", "median_cpu"):
            ours, theirs, ratio = (result[key][name] for key in ("jax_ms", "torch_ms", "ratio"))
            print(f"{result['batch_size']:>5}  {name:<12}{ours:>8.1f}{theirs:>10.1f}{ratio:>7.2f}")
    settings = {k: v for k, v in os.environ.items() if k.startswith(("XLA_FLAGS", "MALLOC_", "OMP_"))}
    print(json.dumps({"torch_threads": _THREADS.value, "environment": settings, "results": results}))


def check_agreement(config: Config, network: Network, *, batch_size: int = 8) -> None:
    """Raises AssertionError if the loss or a gradient differs by more than float32 explains."""
    params, batch, key = torch_uvit.random_params(network), _batch(network, batch_size), jax.random.key(2)
    loss_fn = build.loss_fn(config, network, mesh=sharding.make_mesh(data=-1, fsdp=1))
    loss, grads = jax.jit(
        jax.value_and_grad(lambda params: loss_fn(params, None, None, batch, key, jnp.zeros((), int)).mean())
    )(params)
    # The draws of mcm_jax.objectives.diffusion.
    key_t, key_eps, _, _ = jax.random.split(key, 4)
    t = torch.tensor(np.array(jax.random.uniform(key_t, (batch_size,))))
    eps = _channels_last(jax.random.normal(key_eps, batch["image"].shape))
    model = _torch_network(network, params)
    torch_loss = _torch_loss(model, *_torch_batch(batch), eps, t)
    torch_loss.backward()
    np.testing.assert_allclose(torch_loss.item(), loss, rtol=1e-5)
    expected = torch_uvit.to_torch_layout(grads, model)
    largest = max(grad.abs().max().item() for grad in expected.values())
    for name, parameter in model.named_parameters():
        # Relative to the tensor's largest entry: small ones are sums of large terms that cancel.
        # norm_k's bias has no effect, softmax ignores it: its whole gradient is rounding.
        scale = max(expected[name].abs().max().item(), 1e-4 * largest)
        np.testing.assert_allclose(
            parameter.grad / scale, expected[name] / scale, atol=5e-5, rtol=0, err_msg=name
        )
    print(f"loss {loss:.6f} (torch {torch_loss:.6f}) and {len(expected)} gradients agree")


def compare(config: Config, network: Network, batch_size: int) -> dict[str, Any]:
    """Milliseconds a step of both in alternation, and their ratios."""
    batch = _batch(network, batch_size)
    steps = {"jax": jax_steps(config, network, batch), "torch": torch_steps(config, network, batch)}
    seconds: dict[str, list[tuple[float, float]]] = {"jax": [], "torch": []}
    for turn in range(_TURNS.value + 1):
        for name in ("jax", "torch") if turn % 2 else ("torch", "jax"):
            timed = [_timed(steps[name]) for _ in range(_TURN_STEPS.value)]
            # The first turn compiles and warms up.
            seconds[name] += timed[1:] if turn else []
    milliseconds = {
        f"{name}_ms": {
            "median": 1e3 * statistics.median(wall for wall, _ in times),
            "fastest": 1e3 * min(wall for wall, _ in times),
            "median_cpu": 1e3 * statistics.median(cpu for _, cpu in times),
        }
        for name, times in seconds.items()
    }
    ours, theirs = milliseconds["jax_ms"], milliseconds["torch_ms"]
    ratio = {name: ours[name] / theirs[name] for name in ours}
    return {"batch_size": batch_size, **milliseconds, "ratio": ratio}


def jax_steps(config: Config, network: Network, batch: Batch) -> Iterator[None]:
    """One train step, finished, for every `next`."""
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    adam = optimizer.adam(config.optimizer, num_steps=config.training.num_steps)
    state = step.init_state(torch_uvit.random_params(network), adam)
    state_sharding = sharding.params_sharding(mesh, state)
    state = jax.device_put(state, state_sharding)
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    update = step.Update(
        loss_fn=build.loss_fn(config, network, mesh=mesh),
        optimizer=adam,
        ema_decay=config.optimizer.ema_decay,
        seed=config.seed,
    )
    train_step = step.make_train_step(update, mesh=mesh, state_sharding=state_sharding, teacher_sharding=None)
    while True:
        state, metrics = train_step(state, None, batch)
        jax.block_until_ready((state, metrics))
        yield


def torch_steps(config: Config, network: Network, batch: Batch) -> Iterator[None]:
    """One train step for every `next`, in the fastest form of each part that PyTorch offers on CPUs."""
    settings = config.optimizer
    model = _torch_network(network, torch_uvit.random_params(network))
    params = list(model.parameters())
    ema_params = [parameter.detach().clone() for parameter in params]
    torch_adam = torch.optim.Adam(
        params, lr=settings.learning_rate, betas=(settings.b1, settings.b2), eps=settings.eps, fused=True
    )
    x, label = _torch_batch(batch)
    while True:
        torch_adam.zero_grad()
        _torch_loss(model, x, label, torch.randn_like(x), torch.rand(len(x))).backward()
        torch.nn.utils.clip_grad_norm_(params, settings.clip_norm)
        torch_adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(ema_params, params, 1 - settings.ema_decay)
        yield


def _timed(steps: Iterator[None]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of one step."""
    wall, cpu = time.perf_counter(), time.process_time()
    next(steps)
    return time.perf_counter() - wall, time.process_time() - cpu


def _torch_loss(
    model: Callable, x: torch.Tensor, label: torch.Tensor, eps: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """The mean v-loss under the cosine schedule, from the formulas of SPEC 1, 2 and 5."""
    u_0 = 2 / np.pi * np.arctan(np.exp(-schedules.LOGSNR_LIMIT / 2))
    logsnr = -2 * torch.log(torch.tan(torch.pi / 2 * (u_0 + t.double() * (1 - 2 * u_0)))).float()
    alpha = torch.sigmoid(logsnr).sqrt()[:, None, None, None]
    sigma = torch.sigmoid(-logsnr).sqrt()[:, None, None, None]
    v_hat = model(alpha * x + sigma * eps, logsnr, label)
    return torch.mean((alpha * eps - sigma * x - v_hat) ** 2)


def _torch_network(network: Network, params: Any) -> torch_uvit.UViT:
    return torch_uvit.with_params(network, params).to(memory_format=torch.channels_last)


def _batch(network: Network, size: int) -> Batch:
    key_x, key_label = jax.random.split(jax.random.key(3))
    shape = (size, *network.shape)
    x = jax.random.uniform(key_x, shape, minval=-1.0, maxval=1.0)
    return {"image": x, "label": jax.random.randint(key_label, (size,), 0, NUM_CLASSES)}


def _torch_batch(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return _channels_last(batch["image"]), torch.tensor(np.array(batch["label"])).long()


def _channels_last(image: jax.Array) -> torch.Tensor:
    """NHWC -> NCHW that keeps its memory."""
    return torch.tensor(np.array(image)).permute(0, 3, 1, 2)


if __name__ == "__main__":
    command_line.run(main)
