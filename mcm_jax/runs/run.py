"""A trained run to sample from, as returned by `mcm_jax.load`."""

import copy
import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from mcm_jax.config.settings import Config
from mcm_jax.data import embeddings, layout, pipeline
from mcm_jax.data.layout import DatasetInfo
from mcm_jax.data.pixels import to_float
from mcm_jax.diffusion import sampling
from mcm_jax.diffusion.conditions import Cond
from mcm_jax.models.network import Network
from mcm_jax.records import CONSISTENCY, Objective, Origin, Sampling, SamplingOptions
from mcm_jax.runs import build, samplers, workdirs
from mcm_jax.system import distributed, files, json_text, sharding
from mcm_jax.system.errors import InputError
from mcm_jax.system.paths import Path, checked_path, resolved
from mcm_jax.text import encoders
from mcm_jax.training.checkpoints import Parameters
from mcm_jax.training.state import Params

Images = UInt8[np.ndarray, "N r r 3"]
Trajectories = UInt8[np.ndarray, "N steps r r 3"]
Labels = Int[np.ndarray, "N"]
T = TypeVar("T")


class Run:
    """A trained network with its parameters and data set; draws samples."""

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
        origin: Origin | None = None,
        guide: samplers.Guide | None = None,
        guide_origin: Origin | None = None,
    ):
        """Most callers should use `load_run` instead.

        Args:
          params: the network's parameters, with any sharding on the mesh.
          checkpoint_step: number of updates that produced them.
          parameters: whether they are a checkpoint's averaged ("ema") or raw parameters.
          workdir: the run's directory; None for a run that exists only in memory.
          checkpoint: identity of the checkpoint that contains them (see `workdirs.checkpoint_identity`); None
            if unknown. Measured variances are stored and reused only if workdir and checkpoint are given.
          origin: the published file that the parameters, or the first teacher's, come from; None: none.
          guide: the model that guidance leads away from; None: the run itself, without condition.
          guide_origin: the published file of the model that guided the run's teacher; None: none.
        """
        self.config, self.dataset, self.mesh = config, dataset, mesh
        self.params, self.checkpoint_step = params, checkpoint_step
        self.parameters: Parameters = parameters
        self.workdir, self.checkpoint, self.origin, self.guide = workdir, checkpoint, origin, guide
        self._guide_origin = guide_origin
        self.network = build.network(config, condition=build.condition(dataset))
        self._compiled: dict[tuple[Sampling, bool], jax.stages.Wrapped] = {}
        self._x_var: dict[Sampling, Float[Array, " N"]] = {}
        self._encoder: encoders.Encoder | None = None
        self._opened: dict[str, pipeline.RecordSource] = {}
        # The last prompts, embedded.
        self._embedded: dict[tuple[str, ...], Callable[[slice], dict[str, np.ndarray]]] = {}

    def __repr__(self) -> str:
        steps = f" of {_listed(self.student_steps)} steps" if self.student_steps else ""
        place = "" if self.workdir is None else f", workdir={str(self.workdir)!r}"
        resolution = self.dataset.resolution
        return (
            f"Run({self.objective}{steps} on {self.dataset.dataset} at {resolution}x{resolution}, "
            f"{self.parameters} parameters after {self.checkpoint_step} updates{place})"
        )

    @property
    def objective(self) -> Objective:
        """The objective that the run minimised; see `config.settings.Config`."""
        return self.config.objective

    @property
    def student_steps(self) -> tuple[int, ...]:
        """The numbers of steps that a student was trained for; () for a model that supports any number."""
        return self.config.student_steps

    @property
    def seed(self) -> int:
        """The training seed."""
        return self.config.seed

    def label_rule(self, caption_split: str | None = None) -> str:
        """How `sample` draws classes, or captions of a split, if none are given.

        Raises:
          InputError: the run does not support `caption_split`.
        """
        if self.dataset.encoding is None and caption_split is None:
            return self.config.sampling.label_rule
        return f"{self._caption_split(caption_split)}_captions"

    def _caption_split(self, given: str | None) -> str:
        """The split from which captions are drawn, one that the run was not trained on."""
        if self.dataset.encoding is None:
            raise InputError("this run is conditioned on class labels, so no captions can be drawn")
        splits = [split for split in self.dataset.num_examples if split != "train"]
        if given is not None and given not in splits:
            raise InputError(f"captions={given}: {self.dataset.dataset} has them in {' and '.join(splits)}")
        return given or "test"

    def sampling(self, **options: Unpack[SamplingOptions]) -> Sampling:
        """The settings that `sample` uses for these options, including defaults; see `samplers.resolve`."""
        return samplers.resolve(self.config, guide=self.guide, **options)

    def sample(
        self,
        num: int,
        *,
        seed: int = 0,
        labels: Labels | None = None,
        prompts: Sequence[str] | None = None,
        caption_split: str | None = None,
        first: int = 0,
        batch_per_device: int | None = None,
        progress: Callable[[int], None] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> tuple[Images, Labels]:
        """Draws the images with indices first, ..., first + num - 1; returns images and class labels.

        Image n depends only on (seed, n), its label or prompt, and `options`. Each device processes batches
        of one fixed size; the last one is padded. Changing batch_per_device changes the last bits of XLA's
        results, which changes at most one pixel in a thousand, by one grey level.

        Args:
          labels: the class of each image; None draws classes by config.sampling.label_rule.
          prompts: the caption of each image, for a run with a text encoder; an empty one is no caption. None
            draws `drawn_captions`; the labels are those of their images. With prompts they are 0.
          caption_split: the split from which captions are drawn, test or heldout; None: test.
          first: index of the first image.
          progress: called after each batch with its number of images.
          options: steps, sampler, noise_grid, x_var, guidance, rounding; see `sampling` for the defaults. A
            noise_grid of times, such as "1,1/2,1/4", calls the network there; its steps may differ in length.

        Raises:
          InputError: wrong number of labels or prompts, labels out of range, or labels, prompts or options
            that the run does not support.
          samplers.NonFiniteSamplesError: a sample is not finite.
        """
        settings = self.sampling(**options)
        self._warn_of(settings)
        indices = np.arange(first, first + num, dtype=np.int32)
        labels, cond_of = self._conditions(seed, indices, labels, prompts, caption_split)
        images = self._draw(
            settings, seed, indices, cond_of, batch_per_device=batch_per_device, progress=progress
        )
        return images, labels

    def trajectories(
        self,
        labels: Labels,
        *,
        seed: int = 0,
        batch_per_device: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Trajectories:
        """The x_hat that the network predicts in each of the steps by which `sample` draws these images.

        The last x_hat is the image that `sample` returns for the same seed, label and options, up to the
        last bits of XLA's results.

        Raises:
          InputError: as for `sample`.
          samplers.NonFiniteSamplesError: an x_hat is not finite.
        """
        settings = self.sampling(**options)
        self._warn_of(settings)
        indices = np.arange(len(labels), dtype=np.int32)
        _, cond_of = self._conditions(seed, indices, labels, None, None)
        return self._draw(
            settings, seed, indices, cond_of, batch_per_device=batch_per_device, trajectory=True
        )

    def _warn_of(self, settings: Sampling) -> None:
        """Warns the caller of `sample` of settings that a student was not trained for."""
        times = samplers.grid_times(settings.noise_grid)
        # The sampler consistency takes no such steps.
        untrained = None
        if times and settings.sampler != "consistency":
            untrained = samplers.untrained_step(self.config, times)
        if untrained is not None:
            warnings.warn(
                f"this student was not trained for the step from {untrained[0]:.6g} to {untrained[1]:.6g} of "
                f"noise_grid={settings.noise_grid}; expect worse images",
                stacklevel=3,
            )
        if self.student_steps and not times and settings.steps not in self.student_steps:
            warnings.warn(
                f"this student was trained for {_listed(self.student_steps)} steps but is sampled with "
                f"{settings.steps}; expect worse images",
                stacklevel=3,
            )
        if self.student_steps and not times and settings.noise_grid != "schedule":
            warnings.warn(
                f"this student was trained on its schedule's grid but is sampled on {settings.noise_grid}; "
                "expect worse images",
                stacklevel=3,
            )
        if self.student_steps not in ((), (1,)) and settings.sampler == "consistency":
            warnings.warn(
                f"this student of {_listed(self.student_steps)} steps predicts an image only in its last "
                "step, but the sampler consistency adds noise to every prediction; expect worse images",
                stacklevel=3,
            )

    def _draw(
        self,
        settings: Sampling,
        seed: int,
        indices: Int[np.ndarray, " N"],
        cond_of: Callable[[slice], Cond],
        *,
        batch_per_device: int | None,
        progress: Callable[[int], None] | None = None,
        trajectory: bool = False,
    ) -> UInt8[np.ndarray, "N ..."]:
        """The images with these indices, or their trajectories, batch by batch; see `sample`."""
        per_device = batch_per_device or self.config.sampling.batch_per_device
        batch = per_device * self.mesh.size
        num, shape = len(indices), build.image_shape(self.config)
        images = np.empty((num, settings.steps, *shape) if trajectory else (num, *shape), np.uint8)
        run, guide = self._compiled_sampler(settings, trajectory), self._guide(settings)
        params = self.params if guide is None else (self.params, guide.params)
        key, x_var = sharding.replicate(self.mesh, (jax.random.key(seed), self.x_var(settings)))
        for start in range(0, num, batch):
            part = slice(start, min(start + batch, num))
            on_mesh = self._on_mesh((indices[part], cond_of(part)), batch)
            drawn, finite = map(sharding.gather, run(params, key, x_var, *on_mesh))
            if not finite[: part.stop - start].all():
                remedy = " or a smaller guidance weight" if settings.guidance > 0 else ""
                raise samplers.NonFiniteSamplesError(
                    f"samples of checkpoint {self.checkpoint_step} contain NaN or infinity; choose another "
                    f"checkpoint{remedy}"
                )
            images[part] = drawn[: part.stop - start]
            if progress is not None:
                progress(part.stop - start)
        return images

    def _on_mesh(self, arrays: T, batch: int) -> T:
        """Pads all arrays to `batch` entries and splits them over the devices."""
        return jax.tree.map(lambda array: sharding.split(self.mesh, _padded(array, batch)), arrays)

    def _conditions(
        self,
        seed: int,
        indices: Int[np.ndarray, " N"],
        labels: np.ndarray | None,
        prompts: Sequence[str] | None,
        caption_split: str | None,
    ) -> tuple[Labels, Callable[[slice], Cond]]:
        """(labels, part -> the conditions of these images); see `sample`."""
        num, encoding = len(indices), self.dataset.encoding
        if encoding is None:
            if caption_split is not None:
                self._caption_split(caption_split)  # Raises InputError.
            if prompts is not None:
                raise InputError("this run is conditioned on class labels; use labels instead of prompts")
            labels = self._labels(seed, indices) if labels is None else np.asarray(labels, np.int32)
            if labels.shape != (num,) or not np.all((labels >= 0) & (labels < self.dataset.num_classes)):
                raise InputError(f"labels must be {num} classes from 0 to {self.dataset.num_classes - 1}")
            return labels, labels.__getitem__
        if labels is not None:
            raise InputError("this run is conditioned on captions; use prompts instead of labels")
        of = self.network.condition.of
        if prompts is None:
            source, drawn = self._drawn(self._caption_split(caption_split), seed, indices)
            return source.gather(drawn)[1], lambda part: of(source.batch(drawn[part]))
        if caption_split is not None:
            raise InputError("prompts and caption_split exclude each other; remove one")
        if len(prompts) != num:
            raise InputError(f"{len(prompts)} prompts for {num} images; there must be one for each")
        key = tuple(prompts)
        if key not in self._embedded:
            self._embedded = {key: embeddings.embed(prompts, self.text_encoder().encode, encoding)}
        embedded = self._embedded[key]
        return np.zeros(num, np.int32), lambda part: of(embedded(part))

    def drawn_captions(
        self, num: int, *, seed: int = 0, caption_split: str | None = None, first: int = 0
    ) -> list[str]:
        """The captions that `sample` draws with the same arguments.

        Raises:
          InputError: the run has no captions, or not in this split.
        """
        indices = np.arange(first, first + num, dtype=np.int32)
        source, drawn = self._drawn(self._caption_split(caption_split), seed, indices)
        return source.captions(drawn)

    def _drawn(
        self, split: str, seed: int, indices: Int[np.ndarray, " N"]
    ) -> tuple[pipeline.RecordSource, Int[np.ndarray, " N"]]:
        """A split with its captions, opened at the first call and read on demand; and the examples drawn."""
        if split not in self._opened:
            source = self._open(split, in_memory_limit_bytes=0)
            assert isinstance(source, pipeline.RecordSource)
            self._opened[split] = source
        keys = sampling.image_keys(jax.random.key(seed), jnp.asarray(indices))
        return self._opened[split], np.asarray(sampling.draw_examples(keys, len(self._opened[split])))

    def text_encoder(self, source: str | Path | encoders.Encoder | None = None) -> encoders.Encoder:
        """The text encoder that embedded the captions, loaded at the first call.

        Args:
          source: its directory, or the loaded encoder; None: an encoder that is installed with this package.

        Raises:
          InputError: the run has no captions, or this is another encoder than theirs.
        """
        encoding = self.dataset.encoding
        if encoding is None:
            raise InputError("this run is conditioned on class labels, so it has no text encoder")
        if self._encoder is None or source is not None:
            if source is None and encoding.encoder != layout.MINILM:
                raise InputError(
                    f"prompts need the text encoder {encoding.encoder}: pass its directory as "
                    "--text_encoder, in Python to run.text_encoder"
                )
            if isinstance(source, encoders.Encoder):
                found = source
            else:
                found = encoders.load(source or encoding.encoder, length=encoding.length)
            if found.sha256 != encoding.encoder_sha256:
                raise InputError(
                    f"text encoder {found.name} is not the one that embedded this run's "
                    f"captions, {encoding.encoder} (its hash is {found.sha256[:12]}, not "
                    f"{encoding.encoder_sha256[:12]}); use the same files"
                )
            self._encoder = found
        return self._encoder

    def guided_by(self, guide: "Run") -> "Run":
        """The same run, with `guide` as the model that its guidance leads away from (autoguidance).

        Raises:
          InputError: the guide is a student, or was trained for images of another size, or other conditions.

        Examples:
          A model is guided by a smaller or less trained one of the same images:

          >>> run = mcm_jax.load("runs/edm2-s").guided_by(mcm_jax.load("runs/edm2-xs"))  # doctest: +SKIP
          >>> images, labels = run.sample(16, guidance=1.0)  # doctest: +SKIP
        """
        place = "the guide" if guide.workdir is None else resolved(guide.workdir).name
        name = place if guide.origin is None else guide.origin.file
        for run, what in ((guide, name), (self, str(self.workdir or "this run"))):
            if run.config.is_student or (run.origin and run.origin.kind == CONSISTENCY):
                raise InputError(
                    f"{what} is a student of few steps; only a diffusion model can guide or be guided by "
                    "another"
                )
        ours, its = self.dataset, guide.dataset
        inputs = [encoding and encoding.input for encoding in (ours.encoding, its.encoding)]
        if (ours.class_names, ours.resolution, inputs[0]) != (its.class_names, its.resolution, inputs[1]):
            raise InputError(
                f"{name} was trained on {its.dataset} at {its.resolution}x{its.resolution}, which differs in "
                f"classes, captions or size from {ours.dataset} at {ours.resolution}x{ours.resolution}; a "
                "guide must match the run that it guides"
            )
        samplers.check_range(guide.config, self.config)
        run = copy.copy(self)
        checkpoint = None if guide.checkpoint is None else f"{guide.checkpoint} {guide.parameters}"
        run.guide = samplers.Guide(name, checkpoint, guide.origin, guide.network, guide.params)
        run._compiled = {}
        return run

    def with_params(self, params: Params) -> "Run":
        """The same run with other parameters (of no known checkpoint); shares the compiled samplers."""
        run = copy.copy(self)
        run.params, run.checkpoint, run._x_var = params, None, {}
        return run

    def untrained(self) -> "Run":
        """The same run with newly initialized parameters, as before its first update; shares the samplers."""
        params = _init(self.network, self.mesh)(build.init_key(self.config.seed))
        run = Run(
            self.config, self.dataset, mesh=self.mesh, params=params, checkpoint_step=0, guide=self.guide
        )
        run._compiled = self._compiled
        return run

    def images(self, split: str) -> tuple[Images, Labels]:
        """Loads all images and labels of a split of the run's data set; see `check_data`."""
        return pipeline.load_arrays(self._open(split))

    def random_images(self, split: str, num: int) -> tuple[Images, Labels]:
        """Loads a fixed random sample of `num` images of a split, with their labels.

        Only these images are read. If the split has at most `num` images, all are returned.
        """
        return pipeline.random_examples(self._open(split, in_memory_limit_bytes=0), num)

    def blocks(self, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Iterates over all images and labels of a split in blocks; see `pipeline.blocks`."""
        return pipeline.blocks(self._open(split))

    def _open(self, split: str, **options: int) -> pipeline.Source:
        self.check_data()
        return pipeline.open_split(
            data_dir=self.config.data.data_dir,
            dataset=self.dataset.dataset,
            resolution=self.dataset.resolution,
            split=split,
            encoder=self.config.data.encoder,
            **options,
        )

    def check_data(self) -> None:
        """Raises InputError unless the data set exists and contains the images that the run trained on."""
        now = pipeline.describe(
            data_dir=self.config.data.data_dir,
            dataset=self.dataset.dataset,
            resolution=self.dataset.resolution,
            encoder=self.config.data.encoder,
        )
        if (now.fingerprints, now.encoding) != (self.dataset.fingerprints, self.dataset.encoding):
            raise InputError(
                f"{now.path} contains other images than the run was trained on, or other embeddings of their "
                "captions (their hashes differ); prepare the original images again, or set --data_dir to "
                "their directory"
            )

    def _labels(self, seed: int, indices: Int[np.ndarray, " N"]) -> Labels:
        counts = np.asarray(self.dataset.class_counts["train"], np.float32)
        # Classes without training images are never drawn: the network has not learned them.
        uniform = self.config.sampling.label_rule == "uniform"
        probabilities = (counts > 0).astype(np.float32) if uniform else counts
        keys = sampling.image_keys(jax.random.key(seed), jnp.asarray(indices))
        return np.asarray(sampling.draw_labels(keys, jnp.asarray(probabilities / probabilities.sum())))

    def _compiled_sampler(self, settings: Sampling, trajectory: bool) -> jax.stages.Wrapped:
        key = (settings, trajectory)
        if key not in self._compiled:
            guide = self._guide(settings)
            self._compiled[key] = samplers.make_sampler(
                self.config,
                self.network,
                settings,
                guide=guide and guide.network,
                mesh=self.mesh,
                trajectory=trajectory,
            )
        return self._compiled[key]

    def guide_origin(self, settings: Sampling) -> Origin | None:
        """The published file of the guide, in sampling with these settings or in training; None: none."""
        guide = self._guide(settings)
        return self._guide_origin if guide is None else guide.origin

    def _guide(self, settings: Sampling) -> samplers.Guide | None:
        return None if settings.guide is None else self.guide

    def x_var(self, settings: Sampling) -> Float[Array, " N"] | None:
        """Measured variance per pixel of x given z_t at each point of the grid; None if it is analytic.

        This is eta times the mean of ||x - x_hat(z_t)||^2 / d over a random sample of training images
        (SPEC 3b). It is measured at the first call and stored in the workdir.
        """
        if settings.x_var != "measured":
            return None
        eta = settings.x_var_eta
        if eta is None:
            raise ValueError("a measured variance requires eta")
        if settings not in self._x_var:
            mean = self._stored_mean_square_error(settings)
            if not distributed.all_true(mean is not None) or mean is None:
                mean = self._measure_mean_square_error(settings)
                if distributed.is_first():
                    self._store_mean_square_error(settings, mean)
            self._x_var[settings] = eta * jnp.asarray(mean, jnp.float32)
        return self._x_var[settings]

    def _x_var_path(self, workdir: Path, settings: Sampling) -> Path:
        what = f"step{self.checkpoint_step}_{self.parameters}_{settings.grid_name}{settings.steps}"
        return workdir / "x_var" / f"{what}_images{settings.x_var_images}.json"

    def _stored_mean_square_error(self, settings: Sampling) -> list[float] | None:
        """The stored measurement for this checkpoint; None if there is none."""
        if self.workdir is None or self.checkpoint is None:
            return None
        try:
            record = json_text.loads(files.read_bytes(self._x_var_path(self.workdir, settings)))
            # Files of an older version have no checkpoint, and their images were not a random sample.
            if record["checkpoint"] != self.checkpoint:
                return None
            mean = [float(value) for value in record["mean_square_error"]]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return mean if len(mean) == settings.steps else None

    def _store_mean_square_error(self, settings: Sampling, mean: list[float]) -> None:
        """Stores the measurement; only warns on failure, so that read-only runs can be sampled too."""
        if self.workdir is None or self.checkpoint is None:
            return
        record = {"checkpoint": self.checkpoint, "mean_square_error": mean}
        try:
            files.write_whole(self._x_var_path(self.workdir, settings), json.dumps(record) + "\n")
        except OSError as error:
            warnings.warn(
                f"the measured variance can't be stored and will be measured again: {error}", stacklevel=2
            )

    def _measure_mean_square_error(self, settings: Sampling) -> list[float]:
        if settings.x_var_images is None:
            raise ValueError("a measured variance requires a number of images")
        source = self._open("train", in_memory_limit_bytes=0)
        chosen = pipeline.random_indices(source, settings.x_var_images)
        num = len(chosen)
        batch = self.config.sampling.batch_per_device * self.mesh.size
        logsnr, key = samplers.grid(self.config, settings), jax.random.key(0)

        @jax.jit
        def errors(params: Params, indices: Array, images: Array, cond: Cond) -> Array:
            keys = sampling.image_keys(key, indices)
            model_fn = functools.partial(self.network.apply, params)
            return sampling.measure_x_var(model_fn, to_float(images), cond, keys, logsnr=logsnr)

        total = np.zeros(settings.steps)
        for start in range(0, num, batch):
            part = slice(start, min(start + batch, num))
            examples = source.batch(chosen[part])
            arrays = np.arange(num)[part], examples["image"], self.network.condition.of(examples)
            on_mesh = self._on_mesh(arrays, batch)
            values = sharding.gather(errors(self.params, *on_mesh)).astype(np.float64)
            total += values[:, : part.stop - start].sum(axis=1)
        return list(total / num)


@functools.lru_cache(maxsize=4)
def _init(network: Network, mesh: Mesh) -> jax.stages.Wrapped:
    """The jitted initialization: runs of the same network share it."""
    return jax.jit(network.init, out_shardings=sharding.replicated(mesh))


def load_run(
    workdir: str | Path,
    *,
    parameters: Parameters = "ema",
    checkpoint_step: int | None = None,
    data_dir: str | Path | None = None,
) -> Run:
    """Loads the run in `workdir` from its newest checkpoint, or from the one at `checkpoint_step`.

    Args:
      workdir: the directory of a run, or a folder written by `mcm_jax.export`.
      parameters: "ema" for the averaged parameters, "raw" for those after the last update.
      data_dir: the directory of prepared data; None for the one used in training.

    Raises:
      InputError: there is no run or no such checkpoint, or it is damaged.
    """
    workdir = checked_path(workdir, "workdir")
    if data_dir is not None:
        data_dir = checked_path(data_dir, "data_dir")
    record = workdirs.read(workdir)
    config, dataset = record.config, record.dataset
    if data_dir is not None:
        data = dataclasses.replace(config.data, data_dir=str(data_dir))
        config = dataclasses.replace(config, data=data)
        path = layout.dataset_dir(data_dir, dataset=dataset.dataset, resolution=dataset.resolution)
        dataset = dataclasses.replace(dataset, path=path)
    # A trained run is sampled on the devices of this machine, with a copy of the parameters on each.
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    network = build.network(config, condition=build.condition(dataset))
    abstract = network.abstract_params
    shardings = sharding.params_sharding(mesh, abstract)
    step = workdirs.steps(workdir)[-1] if checkpoint_step is None else checkpoint_step
    params = workdirs.restore_params(workdir, abstract, shardings, parameters=parameters, step=step)
    return Run(
        config,
        dataset,
        mesh=mesh,
        params=params,
        checkpoint_step=step,
        parameters=parameters,
        workdir=workdir,
        checkpoint=workdirs.checkpoint_identity(workdir, step),
        origin=record.origin,
        guide_origin=record.guide_origin,
    )


def _listed(steps: tuple[int, ...]) -> str:
    """'4', or '1, 2 and 4'."""
    *others, last = map(str, steps)
    return f"{', '.join(others)} and {last}" if others else last


def _padded(array: np.ndarray, size: int) -> np.ndarray:
    """Pads `array` to `size` entries by repeating the last one."""
    return np.pad(array, [(0, size - len(array)), *[(0, 0)] * (array.ndim - 1)], mode="edge")
