"""Shares jitted functions between the tests of a process: most tests of runs use the same tiny networks.

Otherwise every start of a run traces and lowers its functions again, which takes longer than all else that
such a test does. JAX's cache of compiled programs saves neither.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Iterator
from unittest import mock

from mcm_jax.config.settings import Config, SamplingSettings
from mcm_jax.models.placement import Placement
from mcm_jax.runs import samplers
from mcm_jax.runs.build import Training
from mcm_jax.training.loop import TrainingSettings

Functions = dict[Hashable, Callable]
# Each function holds its compiled programs.
_MOST = 24

_train_step, _jit, _make_sampler = Training.train_step, Training._jit, samplers.make_sampler


@contextlib.contextmanager
def shared(functions: Functions) -> Iterator[None]:
    """Takes the jitted functions of runs with equal settings from `functions`, and adds new ones to it.

    They may be reused only where the same code would be traced: not after a test has patched it.
    """

    def once(key: Hashable, make: Callable[[], Callable]) -> Callable:
        # Moved to the end, so that the first is the one that has not been used for the longest time.
        functions[key] = functions.pop(key, None) or make()
        if len(functions) > _MOST:
            functions.pop(next(iter(functions)))
        return functions[key]

    def train_step(self):
        return once(("update", _of_training(self)), lambda: _train_step(self))

    def jit(self, init):
        return once((init.__qualname__, _of_training(self)), lambda: _jit(self, init))

    def make_sampler(config, network, settings, **options):
        key = _of_sampler(config), network, settings, tuple(sorted(options.items()))
        return once(key, lambda: _make_sampler(config, network, settings, **options))

    with (
        mock.patch.object(Training, "train_step", train_step),
        mock.patch.object(Training, "_jit", jit),
        mock.patch.object(samplers, "make_sampler", make_sampler),
    ):
        yield


def _of_training(training: Training) -> Hashable:
    """What the functions of a training depend on: not its paths, its cadence and its sampling."""
    config, guide = training.config, training.guide
    # The optimizer, and the shapes and the shardings of the state, follow from these.
    return (
        dataclasses.replace(
            config,
            teacher_checkpoint=config.teacher_checkpoint and "teacher",
            guide_checkpoint=config.guide_checkpoint and "guide",
            data=dataclasses.replace(config.data, data_dir="", in_memory_gb=0.0, max_corrupt_records=0),
            training=TrainingSettings(
                num_steps=config.training.num_steps, accumulation_steps=config.training.accumulation_steps
            ),
            sampling=SamplingSettings(),
        ),
        training.network,
        guide and dataclasses.replace(guide, placement=Placement()),
        training.mesh,
    )


def _of_sampler(config: Config) -> Hashable:
    """The settings that a sampler depends on, besides those of its network."""
    return config.schedule, config.data.resolution, config.mesh
