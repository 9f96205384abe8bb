"""A trained run, ready to sample from: what `mcm_jax.load` returns."""

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, UInt8

from mcm_jax import experiment, sampling, workdirs
from mcm_jax.configuration import Config
from mcm_jax.data import pipeline
from mcm_jax.data.layout import DatasetInfo
from mcm_jax.data.pixels import to_uint8
from mcm_jax.errors import InputError
from mcm_jax.training import sharding
from mcm_jax.training.checkpoints import Checkpoints, Parameters

Images = UInt8[np.ndarray, "N r r 3"]
Labels = Int[np.ndarray, "N"]


class Run:
    """A network with parameters, the data set it was trained on, and how to sample from it."""

    def __init__(
        self,
        config: Config,
        dataset: DatasetInfo,
        *,
        mesh: Mesh,
        params: Any,
        checkpoint_step: int,
        workdir: Path | None = None,
    ):
        """params may lie anywhere on the mesh; checkpoint_step: updates done to get them."""
        self.config, self.dataset, self.mesh = config, dataset, mesh
        self.params, self.checkpoint_step, self.workdir = params, checkpoint_step, workdir
        self.network = experiment.build_network(config, num_classes=dataset.num_classes)
        self.schedule = experiment.build_schedule(config)
        self._compiled: dict[tuple[int, str], Callable[..., Any]] = {}

    @property
    def objective(self) -> str:
        """diffusion, cd or ct."""
        return self.config.objective

    @property
    def student_steps(self) -> int | None:
        """The step count that a student was trained for; None for a teacher."""
        return None if self.objective == "diffusion" else self.config.consistency.student_steps

    @property
    def seed(self) -> int:
        """The seed of the training."""
        return self.config.seed

    @property
    def label_rule(self) -> str:
        """How classes are drawn when none are given."""
        return self.config.sampling.label_rule

    def sampling_record(self, steps: int | None = None, sampler: str | None = None) -> dict[str, Any]:
        """What `sample` does with these arguments, defaults filled in."""
        steps, sampler = self._resolve(steps, sampler)
        return {"steps": steps, "sampler": sampler, "label_rule": self.label_rule, "guidance": 0.0}

    def sample(
        self,
        num: int,
        *,
        seed: int = 0,
        steps: int | None = None,
        sampler: str | None = None,
        labels: Labels | None = None,
        first: int = 0,
        batch_per_device: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[Images, Labels]:
        """Samples images first, ..., first + num - 1 of `seed`, with their class labels.

        Image n depends on (seed, n), its label and the arguments `steps` and `sampler` only. Every device
        works on one fixed batch, padded if need be; XLA's results for another batch_per_device differ
        in the last bits, which moves at most one pixel in a thousand by one grey level.

        Args:
          steps: network calls; default: a student's own, config.sampling.teacher_steps for a teacher.
          sampler: "ddim" or "addim"; default: "ddim" for a student, config.sampling's for a teacher.
          labels: class of each image; drawn by config.sampling.label_rule if None.
          progress: called with the number of images each time some are done.
        """
        steps, sampler = self._resolve(steps, sampler)
        if self.student_steps not in (None, steps):
            warnings.warn(
                f"this student was trained for {self.student_steps} steps and is asked for {steps}; "
                "expect worse images",
                stacklevel=2,
            )
        per_device = batch_per_device or self.config.sampling.batch_per_device
        batch = per_device * self.mesh.size
        indices = np.arange(first, first + num, dtype=np.int32)
        if labels is None:
            labels = self._labels(seed, indices)
        labels = np.asarray(labels, np.int32)
        if labels.shape != (num,) or not np.all((labels >= 0) & (labels < self.dataset.num_classes)):
            raise InputError(f"labels must be {num} classes from 0 to {self.dataset.num_classes - 1}")
        images = np.empty((num, *self._image_shape), np.uint8)
        run = self._compiled_sampler(steps, sampler)
        key = jax.device_put(jax.random.key(seed), sharding.replicated(self.mesh))
        for start in range(0, num, batch):
            part = slice(start, min(start + batch, num))
            padded = (
                _padded(indices[part], batch),
                _padded(labels[part], batch),
            )
            on_mesh = [jax.device_put(a, sharding.batch_sharding(self.mesh)) for a in padded]
            images[part] = jax.device_get(run(self.params, key, *on_mesh))[: part.stop - start]
            if progress is not None:
                progress(part.stop - start)
        return images, labels

    def untrained(self) -> "Run":
        """The same run before its first update, with fresh parameters."""
        init = jax.jit(self.network.init, out_shardings=sharding.replicated(self.mesh))
        params = init(experiment.init_key(self.config.seed))
        return Run(self.config, self.dataset, mesh=self.mesh, params=params, checkpoint_step=0)

    def images(self, split: str) -> tuple[Images, Labels]:
        """All images and labels of a split of the run's data set; see `check_data`."""
        self.check_data()
        source = pipeline.open_split(
            data_dir=self.config.data.data_dir,
            dataset=self.dataset.dataset,
            resolution=self.dataset.resolution,
            split=split,
        )
        return pipeline.load_arrays(source)

    def check_data(self) -> None:
        """Raises InputError unless the run's data set is there, with the images it was trained on."""
        now = pipeline.describe(
            data_dir=self.config.data.data_dir,
            dataset=self.dataset.dataset,
            resolution=self.dataset.resolution,
        )
        if now.fingerprints != self.dataset.fingerprints:
            raise InputError(
                f"{now.path} holds other images than the run was trained on (their hashes differ); prepare "
                "the same images again, or name their directory with --data_dir"
            )

    @property
    def _image_shape(self) -> tuple[int, int, int]:
        resolution = self.config.data.resolution
        return (resolution, resolution, experiment.CHANNELS)

    def _resolve(self, steps: int | None, sampler: str | None) -> tuple[int, str]:
        settings = self.config.sampling
        if self.student_steps is None:
            return steps or settings.teacher_steps, sampler or settings.sampler
        return steps or self.student_steps, sampler or "ddim"

    def _labels(self, seed: int, indices: Int[np.ndarray, "N"]) -> Labels:
        counts = np.asarray(self.dataset.class_counts["train"], np.float32)
        uniform = self.label_rule == "uniform"
        probabilities = np.ones_like(counts) if uniform else counts
        keys = sampling.image_keys(jax.random.key(seed), jnp.asarray(indices))
        return np.asarray(sampling.draw_labels(keys, jnp.asarray(probabilities / probabilities.sum())))

    def _compiled_sampler(self, steps: int, sampler: str) -> Callable[..., Array]:
        if (steps, sampler) not in self._compiled:

            def run(params: Any, key: Array, indices: Array, labels: Array) -> Array:
                z_1 = sampling.initial_noise(sampling.image_keys(key, indices), self._image_shape)
                model_fn = functools.partial(self.network.apply, params)
                x = sampling.sample(
                    model_fn,
                    z_1,
                    labels,
                    schedule=self.schedule,
                    num_steps=steps,
                    sampler=sampler,
                )
                return to_uint8(x)

            over_batch = sharding.batch_sharding(self.mesh)
            self._compiled[steps, sampler] = jax.jit(run, out_shardings=over_batch)
        return self._compiled[steps, sampler]


def load_run(
    workdir: str | Path,
    *,
    parameters: Parameters = "ema",
    checkpoint_step: int | None = None,
    data_dir: str | None = None,
) -> Run:
    """The run in `workdir` at its newest checkpoint, or the one of `checkpoint_step`.

    Args:
      parameters: "ema" for the averaged ones, "raw" for the last update's.
      data_dir: where the prepared data is; default: where training found it.

    Raises:
      InputError: no run, no checkpoint.
    """
    workdir = Path(workdir)
    config, dataset = workdirs.read(workdir, data_dir=data_dir)
    # A trained run is sampled on whatever devices there are here, one copy on each.
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    network = experiment.build_network(config, num_classes=dataset.num_classes)
    abstract = jax.eval_shape(network.init, jax.random.key(0))
    shardings = sharding.params_sharding(mesh, abstract)
    with Checkpoints(workdir) as saved:
        params = saved.restore_params(abstract, shardings, parameters=parameters, step=checkpoint_step)
        step = saved.latest_step() if checkpoint_step is None else checkpoint_step
    return Run(config, dataset, mesh=mesh, params=params, checkpoint_step=step, workdir=workdir)


def _padded(array: np.ndarray, size: int) -> np.ndarray:
    """`array` with its last entry repeated up to `size`."""
    return np.pad(array, (0, size - len(array)), mode="edge")
