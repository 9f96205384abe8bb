"""A trained run, ready to sample from: what `mcm_jax.load` returns."""

import copy
import functools
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
from mcm_jax.runs import build, samplers, workdirs
from mcm_jax.runs.samplers import Sampling
from mcm_jax.system import distributed, files, sharding
from mcm_jax.system.errors import InputError
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
        parameters: Parameters = "ema",
        workdir: Path | None = None,
    ):
        """params may lie anywhere on the mesh; checkpoint_step: updates done to get them.

        parameters: which of the checkpoint's they are.
        workdir: where measured variances are kept; None: nowhere.
        """
        self.config, self.dataset, self.mesh = config, dataset, mesh
        self.params, self.checkpoint_step, self.workdir = params, checkpoint_step, workdir
        self.parameters = parameters
        self.network = build.network(config, num_classes=dataset.num_classes)
        self._compiled: dict[Sampling, Callable[..., Any]] = {}
        self._x_var: dict[Sampling, Float[Array, N]] = {}

    @property
    def objective(self) -> str:
        """What the run minimised, see config.settings.Objective."""
        return self.config.objective

    @property
    def student_steps(self) -> int | None:
        """The step count that a student was trained for; None for a model of all of time."""
        return self.config.student_steps

    @property
    def seed(self) -> int:
        """The seed of the training."""
        return self.config.seed

    @property
    def label_rule(self) -> str:
        """How classes are drawn when none are given."""
        return self.config.sampling.label_rule

    def sampling(self, **how: Any) -> Sampling:
        """What `sample` does with these arguments, defaults filled in; see `samplers.resolve`."""
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
        **how: Any,
    ) -> tuple[Images, Labels]:
        """Samples images first, ..., first + num - 1 of `seed`, with their class labels.

        Image n depends on (seed, n), its label and the settings in `how` only. Every device
        works on one fixed batch, padded if need be; XLA's results for another batch_per_device differ
        in the last bits, which moves at most one pixel in a thousand by one grey level.

        Args:
          labels: class of each image; drawn by config.sampling.label_rule if None.
          progress: called with the number of images each time some are done.
          how: steps, sampler, noise_grid, x_var, guidance; see `sampling` for the defaults.
        """
        how = self.sampling(**how)
        if self.student_steps not in (None, how.steps):
            warnings.warn(
                f"this student was trained for {self.student_steps} steps and is asked for {how.steps}; "
                "expect worse images",
                stacklevel=2,
            )
        if self.student_steps is not None and how.noise_grid != "schedule":
            warnings.warn(
                f"this student was trained on its schedule's grid and is asked for {how.noise_grid}; "
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
        run = self._compiled_sampler(how)
        key, x_var = sharding.replicate(self.mesh, (jax.random.key(seed), self.x_var(how)))
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

    def with_params(self, params: Any) -> "Run":
        """The same run with other parameters and nothing measured on them yet; it keeps what was compiled."""
        run = copy.copy(self)
        run.params, run._x_var = params, {}
        return run

    def untrained(self) -> "Run":
        """The same run before its first update, with fresh parameters."""
        init = jax.jit(self.network.init, out_shardings=sharding.replicated(self.mesh))
        params = init(build.init_key(self.config.seed))
        return Run(self.config, self.dataset, mesh=self.mesh, params=params, checkpoint_step=0)

    def images(self, split: str) -> tuple[Images, Labels]:
        """All images and labels of a split of the run's data set; see `check_data`."""
        return pipeline.load_arrays(self._open(split))

    def blocks(self, split: str) -> Iterator[tuple[Any, Any]]:
        """The same, some at a time; see `pipeline.blocks`."""
        return pipeline.blocks(self._open(split))

    def _open(self, split: str) -> pipeline.Source:
        self.check_data()
        return pipeline.open_split(
            data_dir=self.config.data.data_dir,
            dataset=self.dataset.dataset,
            resolution=self.dataset.resolution,
            split=split,
        )

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

    def _labels(self, seed: int, indices: Int[np.ndarray, "N"]) -> Labels:
        counts = np.asarray(self.dataset.class_counts["train"], np.float32)
        # Nothing was learned about a class without a training image.
        uniform = self.label_rule == "uniform"
        probabilities = (counts > 0).astype(np.float32) if uniform else counts
        keys = sampling.image_keys(jax.random.key(seed), jnp.asarray(indices))
        return np.asarray(sampling.draw_labels(keys, jnp.asarray(probabilities / probabilities.sum())))

    def _compiled_sampler(self, how: Sampling) -> Callable[..., Array]:
        if how not in self._compiled:
            self._compiled[how] = samplers.make_sampler(self.config, self.network, how, mesh=self.mesh)
        return self._compiled[how]

    def x_var(self, how: Sampling) -> Float[Array, "N"] | None:
        """Variance per pixel of x given z_t at every point of the grid of `how`; None: the analytic one.

        A measured one is eta times the mean of ||x - x_hat(z_t)||^2 / d over the first training images
        (SPEC 3b), measured when it is first asked for and kept in the workdir.
        """
        if how.x_var != "measured":
            return None
        if how not in self._x_var:
            path = self._x_var_path(how)
            if path is not None and distributed.exists(path):
                mean = json.loads(path.read_text())["mean_square_error"]
            else:
                mean = self._measure_x_var(how)
                if path is not None and distributed.is_first():
                    self._keep_x_var(path, mean)
            self._x_var[how] = how.x_var_eta * jnp.asarray(mean, jnp.float32)
        return self._x_var[how]

    def _keep_x_var(self, path: Path, mean: list[float]) -> None:
        """A run in a directory that can't be written, someone else's for example, is sampled all the same."""
        try:
            files.write_whole(path, json.dumps({"mean_square_error": mean}) + "\n")
        except OSError as error:
            warnings.warn(
                f"the measured variance can't be kept, next time measures it again: {error}", stacklevel=2
            )

    def _x_var_path(self, how: Sampling) -> Path | None:
        if self.workdir is None:
            return None
        of = f"step{self.checkpoint_step}_{self.parameters}_{how.noise_grid}{how.steps}"
        return Path(self.workdir) / "x_var" / f"{of}_images{how.x_var_images}.json"

    def _measure_x_var(self, how: Sampling) -> list[float]:
        images, labels = self.images("train")
        num = min(len(images), how.x_var_images)
        batch = self.config.sampling.batch_per_device * self.mesh.size
        logsnr, key = samplers.grid(self.config, how), jax.random.key(0)

        @jax.jit
        def errors(params: Any, indices: Array, images: Array, labels: Array) -> Array:
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
    network = build.network(config, num_classes=dataset.num_classes)
    abstract = jax.eval_shape(network.init, jax.random.key(0))
    shardings = sharding.params_sharding(mesh, abstract)
    with Checkpoints(workdir) as saved:
        params = saved.restore_params(abstract, shardings, parameters=parameters, step=checkpoint_step)
        step = saved.latest_step() if checkpoint_step is None else checkpoint_step
    return Run(
        config,
        dataset,
        mesh=mesh,
        params=params,
        checkpoint_step=step,
        parameters=parameters,
        workdir=workdir,
    )


def _padded(array: np.ndarray, size: int) -> np.ndarray:
    """`array` with its last entry repeated up to `size`."""
    return np.pad(array, [(0, size - len(array)), *[(0, 0)] * (array.ndim - 1)], mode="edge")
