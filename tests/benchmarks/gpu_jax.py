"""The programs that tests/benchmarks/gpu.py times, as this package runs them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcm_jax.evaluation import features, inception_weights
from mcm_jax.models.conditions import Classes
from mcm_jax.runs import build, samplers
from mcm_jax.system import sharding, software
from mcm_jax.training.state import TeacherParams, TrainState
from tests.benchmarks import gpu_settings
from tests.benchmarks.gpu_settings import NUM_CLASSES


class Programs:
    """Builds programs on request; all share one set of parameters."""

    def __init__(self, *, small: bool, batch_size: int):
        self.configs = {
            system: gpu_settings.config(system, small=small, batch_size=batch_size) for system in ("ct", "cd")
        }
        self.small, self.batch_size = small, batch_size
        self.mesh = sharding.make_mesh(data=1, fsdp=1, devices=jax.devices()[:1])
        self.trainings = {
            system: build.training(config, condition=Classes(NUM_CLASSES), mesh=self.mesh)
            for system, config in self.configs.items()
        }
        self.network = self.trainings["ct"].network
        self.teacher = jax.jit(self.network.init)(jax.random.key(0))
        self.state = self._fresh_state()
        key_x, key_label = jax.random.split(jax.random.key(1))
        self.batch = {
            "image": jax.random.uniform(key_x, (batch_size, *self.network.shape), minval=-1.0),
            "label": jax.random.randint(key_label, (batch_size,), 0, NUM_CLASSES),
        }

    def program(self, variant: str, case: str) -> Callable[[int], None]:
        del variant
        if case == "features":
            return self._features()
        return self._sample() if case == "sample" else self._train(case)

    def _fresh_state(self) -> TrainState:
        return self.trainings["ct"].init(jax.random.key(0))

    def description(self) -> dict[str, Any]:
        device = jax.devices()[0]
        return {
            "device": device.device_kind,
            "platform": device.platform,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.teacher)),
            "versions": software.library_versions(),
        }

    def _train(self, system: str) -> Callable[[int], None]:
        train_step = self.trainings[system].train_step()
        teacher = TeacherParams(self.teacher) if system == "cd" else None

        def run(count: int) -> None:
            for _ in range(count):
                state, self.state = self.state, None  # A step consumes its state, even if it fails.
                self.state, _ = train_step(state or self._fresh_state(), teacher, self.batch)
            jax.block_until_ready(self.state)

        return run

    def _sample(self) -> Callable[[int], None]:
        config = self.configs["ct"]
        sampler = samplers.make_sampler(config, self.network, samplers.resolve(config), mesh=self.mesh)
        indices, labels = jnp.arange(self.batch_size), self.batch["label"]

        def run(count: int) -> None:
            for _ in range(count):
                images = sampler(self.teacher, jax.random.key(2), None, indices, labels)
            jax.block_until_ready(images)

        return run

    def _features(self) -> Callable[[int], None]:
        network = inception_weights.abstract_network()
        rng = np.random.default_rng(0)
        params = jax.tree.map(
            lambda leaf: jnp.asarray(0.03 * rng.standard_normal(leaf.shape, np.float32)), network.params
        )
        compute = features.program(network, self.mesh)
        size = gpu_settings.features_batch(small=self.small)
        images = jnp.asarray(rng.integers(0, 256, (size, 64, 64, 3), np.uint8))

        def run(count: int) -> None:
            for _ in range(count):
                found = compute(params, images)
            jax.block_until_ready(found)

        return run
