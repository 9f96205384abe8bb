"""A trained run, ready to sample from: the result of `mcm_jax.load`."""

import copy
import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from mcm_jax.config.settings import Config
from mcm_jax.data import pipeline
from mcm_jax.data.layout import DatasetInfo
from mcm_jax.data.pixels import to_float
from mcm_jax.diffusion import sampling
from mcm_jax.records import Objective, Sampling, SamplingOptions
from mcm_jax.runs import build, samplers, workdirs
from mcm_jax.system import distributed, files, sharding
from mcm_jax.system.errors import InputError
from mcm_jax.system.paths import local_path
from mcm_jax.training.checkpoints import Checkpoints, Parameters
from mcm_jax.training.state import Params

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
        params: Params,
        checkpoint_step: int,
        parameters: Parameters = "ema",
        workdir: Path | None = None,
        checkpoint: str | None = None,
    ):
        """Most callers want `load_run`.

        Args:
          params: the network's parameters, anywhere on the mesh.
          checkpoint_step: number of updates behind them.
          parameters: which of a checkpoint's parameters they are.
          workdir: the run's directory, None for a run that lives in memory only.
          checkpoint: identity of the checkpoint that holds them (see `workdirs.checkpoint_identity`), None if
            none is known to. Only with both may a measured variance be stored and read again.
        """
        self.config, self.dataset, self.mesh = config, dataset, mesh
        self.params, self.checkpoint_step, self.parameters = params, checkpoint_step, parameters
        self.workdir, self.checkpoint = workdir, checkpoint
        self.network = build.network(config, num_classes=dataset.num_classes)
        self._compiled: dict[Sampling, jax.stages.Wrapped] = {}
        self._x_var: dict[Sampling, Float[Array, " N"]] = {}

    def __repr__(self) -> str:
        steps = "" if self.student_steps is None else f" of {self.student_steps} steps"
        place = "" if self.workdir is None else f", workdir={str(self.workdir)!r}"
        resolution = self.dataset.resolution
        return (
            f"Run({self.objective}{steps} on {self.dataset.dataset} at {resolution}x{resolution}, "
            f"{self.parameters} parameters after {self.checkpoint_step} updates{place})"
        )

    @property
    def objective(self) -> Objective:
        """What the run minimised; see `config.settings.Config`."""
        return self.config.objective

    @property
    def student_steps(self) -> int | None:
        """The number of steps that a student was trained for; None for a model that takes any number."""
        return self.config.student_steps

    @property
    def seed(self) -> int:
        """The seed of the training."""
        return self.config.seed

    @property
    def label_rule(self) -> str:
        """How classes are drawn when none are given."""
        return self.config.sampling.label_rule

    def sampling(self, **how: Unpack[SamplingOptions]) -> Sampling:
        """The settings that `sample` uses for these arguments, defaults filled in; see `samplers.resolve`."""
        return samplers.resolve(self.config, **how)

    def sample(
        self,
        num: int,
        *,
        seed: int = 0,
        labels: Labels | None = None,
        first: int = 0,
        batch_per_device: int | None = None,
        progress: Callable[[int], None] | None = None,
        **how: Unpack[SamplingOptions],
    ) -> tuple[Images, Labels]:
        """Samples images number first, ..., first + num - 1 of `seed`; returns them with their class labels.

        Image n depends only on (seed, n), its label and the settings in `how`. Every device processes batches
        of one fixed size, the last one padded. Another batch_per_device changes the last bits of XLA's
        results, which moves at most one pixel in a thousand by one grey level.

        Args:
          labels: the class of each image; None draws them by config.sampling.label_rule.
          progress: called after each batch with the number of its images.
          how: steps, sampler, noise_grid, x_var, guidance; see `sampling` for the defaults.

        Raises:
          InputError: labels of another number or out of range; settings that the run can't be sampled with.
        """
        settings = self.sampling(**how)
        if self.student_steps not in (None, settings.steps):
            warnings.warn(
                f"this student was trained for {self.student_steps} steps and is sampled with "
                f"{settings.steps}; expect worse images",
                stacklevel=2,
            )
        if self.student_steps is not None and settings.noise_grid != "schedule":
            warnings.warn(
                f"this student was trained on its schedule's grid and is sampled on {settings.noise_grid}; "
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
        images = np.empty((num, *build.image_shape(self.config)), np.uint8)
        run = self._compiled_sampler(settings)
        key, x_var = sharding.replicate(self.mesh, (jax.random.key(seed), self.x_var(settings)))
        for start in range(0, num, batch):
            part = slice(start, min(start + batch, num))
            padded = (
                _padded(indices[part], batch),
                _padded(labels[part], batch),
            )
            on_mesh = [sharding.split(self.mesh, a) for a in padded]
            images[part] = sharding.gather(run(self.params, key, x_var, *on_mesh))[: part.stop - start]
            if progress is not None:
                progress(part.stop - start)
        return images, labels

    def with_params(self, params: Params) -> "Run":
        """The same run with parameters of no known checkpoint; it shares the compiled samplers."""
        run = copy.copy(self)
        run.params, run.checkpoint, run._x_var = params, None, {}
        return run

    def untrained(self) -> "Run":
        """The same run before its first update, with freshly initialised parameters."""
        init = jax.jit(self.network.init, out_shardings=sharding.replicated(self.mesh))
        params = init(build.init_key(self.config.seed))
        return Run(self.config, self.dataset, mesh=self.mesh, params=params, checkpoint_step=0)

    def images(self, split: str) -> tuple[Images, Labels]:
        """All images and labels of a split of the run's data set; see `check_data`."""
        return pipeline.load_arrays(self._open(split))

    def random_images(self, split: str, num: int) -> tuple[Images, Labels]:
        """A random sample of `num` images of a split with their labels, the same at every call.

        Only these images are read. A split of no more than `num` images is returned whole.
        """
        return pipeline.random_examples(self._open(split, in_memory_limit_bytes=0), num)

    def blocks(self, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All images and labels of a split in blocks; see `pipeline.blocks`."""
        return pipeline.blocks(self._open(split))

    def _open(self, split: str, **options: int) -> pipeline.Source:
        self.check_data()
        return pipeline.open_split(
            data_dir=self.config.data.data_dir,
            dataset=self.dataset.dataset,
            resolution=self.dataset.resolution,
            split=split,
            **options,
        )

    def check_data(self) -> None:
        """Raises InputError unless the data set is present and holds the images that the run trained on."""
        now = pipeline.describe(
            data_dir=self.config.data.data_dir,
            dataset=self.dataset.dataset,
            resolution=self.dataset.resolution,
        )
        if now.fingerprints != self.dataset.fingerprints:
            raise InputError(
                f"{now.path} holds other images than the run was trained on (their hashes differ); prepare "
                "the original images again, or name their directory with --data_dir"
            )

    def _labels(self, seed: int, indices: Int[np.ndarray, " N"]) -> Labels:
        counts = np.asarray(self.dataset.class_counts["train"], np.float32)
        # Nothing was learned about a class without a training image.
        uniform = self.label_rule == "uniform"
        probabilities = (counts > 0).astype(np.float32) if uniform else counts
        keys = sampling.image_keys(jax.random.key(seed), jnp.asarray(indices))
        return np.asarray(sampling.draw_labels(keys, jnp.asarray(probabilities / probabilities.sum())))

    def _compiled_sampler(self, how: Sampling) -> jax.stages.Wrapped:
        if how not in self._compiled:
            self._compiled[how] = samplers.make_sampler(self.config, self.network, how, mesh=self.mesh)
        return self._compiled[how]

    def x_var(self, how: Sampling) -> Float[Array, " N"] | None:
        """Variance per pixel of x given z_t at every point of the grid of `how`; None for the analytic one.

        A measured one is eta times the mean of ||x - x_hat(z_t)||^2 / d over a random sample of training
        images (SPEC 3b). It is measured at the first call and stored in the workdir.
        """
        if how.x_var != "measured":
            return None
        eta = how.x_var_eta
        if eta is None:
            raise ValueError("a measured variance needs eta")
        if how not in self._x_var:
            mean = self._stored_mean_square_error(how)
            if not distributed.all_true(mean is not None) or mean is None:
                mean = self._measure_mean_square_error(how)
                if distributed.is_first():
                    self._store_mean_square_error(how, mean)
            self._x_var[how] = eta * jnp.asarray(mean, jnp.float32)
        return self._x_var[how]

    def _x_var_path(self, workdir: Path, how: Sampling) -> Path:
        what = f"step{self.checkpoint_step}_{self.parameters}_{how.noise_grid}{how.steps}"
        return Path(workdir) / "x_var" / f"{what}_images{how.x_var_images}.json"

    def _stored_mean_square_error(self, how: Sampling) -> list[float] | None:
        """The stored measurement; None if there is none of this very checkpoint."""
        if self.workdir is None or self.checkpoint is None:
            return None
        try:
            record = json.loads(self._x_var_path(self.workdir, how).read_text())
            # An older version's file names no checkpoint, and its images were not a random sample.
            return record["mean_square_error"] if record["checkpoint"] == self.checkpoint else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _store_mean_square_error(self, how: Sampling, mean: list[float]) -> None:
        """Only warns where it can't be written: someone else's run can be sampled all the same."""
        if self.workdir is None or self.checkpoint is None:
            return
        record = {"checkpoint": self.checkpoint, "mean_square_error": mean}
        try:
            files.write_whole(self._x_var_path(self.workdir, how), json.dumps(record) + "\n")
        except OSError as error:
            warnings.warn(
                f"the measured variance can't be stored and will be measured again: {error}", stacklevel=2
            )

    def _measure_mean_square_error(self, how: Sampling) -> list[float]:
        if how.x_var_images is None:
            raise ValueError("a measured variance needs a number of images")
        images, labels = self.random_images("train", how.x_var_images)
        num = len(images)
        batch = self.config.sampling.batch_per_device * self.mesh.size
        logsnr, key = samplers.grid(self.config, how), jax.random.key(0)

        @jax.jit
        def errors(params: Params, indices: Array, images: Array, labels: Array) -> Array:
            keys = sampling.image_keys(key, indices)
            model_fn = functools.partial(self.network.apply, params)
            return sampling.measure_x_var(model_fn, to_float(images), labels, keys, logsnr=logsnr)

        total = np.zeros(how.steps)
        for start in range(0, num, batch):
            part = slice(start, min(start + batch, num))
            padded = [_padded(array[part], batch) for array in (np.arange(num), images, labels)]
            on_mesh = [sharding.split(self.mesh, a) for a in padded]
            values = sharding.gather(errors(self.params, *on_mesh)).astype(np.float64)
            total += values[:, : part.stop - start].sum(axis=1)
        return list(total / num)


def load_run(
    workdir: str | Path,
    *,
    parameters: Parameters = "ema",
    checkpoint_step: int | None = None,
    data_dir: str | Path | None = None,
) -> Run:
    """Loads the run in `workdir` from its newest checkpoint, or from that of `checkpoint_step`.

    Args:
      parameters: "ema" for the averaged parameters, "raw" for those of the last update.
      data_dir: the directory of prepared data; None for the one that training used.

    Raises:
      InputError: there is no run or no such checkpoint.
    """
    workdir = local_path(workdir, "workdir")
    if data_dir is not None:
        data_dir = local_path(data_dir, "data_dir")
    record = workdirs.read(workdir)
    config, dataset = record.config, record.dataset
    if data_dir is not None:
        data = dataclasses.replace(config.data, data_dir=str(data_dir))
        config = dataclasses.replace(config, data=data)
    # A trained run is sampled on the devices of this machine, with a copy of the parameters on each.
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    network = build.network(config, num_classes=dataset.num_classes)
    abstract = jax.eval_shape(network.init, jax.random.key(0))
    shardings = sharding.params_sharding(mesh, abstract)
    with Checkpoints(workdir) as saved:
        step = saved.require()[-1] if checkpoint_step is None else checkpoint_step
        params = saved.restore_params(abstract, shardings, parameters=parameters, step=step)
    return Run(
        config,
        dataset,
        mesh=mesh,
        params=params,
        checkpoint_step=step,
        parameters=parameters,
        workdir=workdir,
        checkpoint=workdirs.checkpoint_identity(workdir, step),
    )


def _padded(array: np.ndarray, size: int) -> np.ndarray:
    """`array` with its last entry repeated up to `size`."""
    return np.pad(array, [(0, size - len(array)), *[(0, 0)] * (array.ndim - 1)], mode="edge")
