"""Trains the run that a config describes: validates all inputs first, then starts the training loop."""

import contextlib
import functools
from typing import Literal

import jax
import ml_collections
import numpy as np
from clu.parameter_overview import count_parameters
from jax.sharding import Mesh

from mcm_jax import fields
from mcm_jax.config import validation
from mcm_jax.config.settings import SECTIONS, Config, Staged, stage_configs
from mcm_jax.data import pipeline
from mcm_jax.data.layout import DatasetInfo
from mcm_jax.fields import Affects
from mcm_jax.objectives.progressive import Progressive
from mcm_jax.records import CONSISTENCY
from mcm_jax.runs import build, exported, samplers, workdirs
from mcm_jax.runs.run import Run
from mcm_jax.runs.samplers import NonFiniteSamplesError
from mcm_jax.system import distributed, sharding
from mcm_jax.system.errors import InputError
from mcm_jax.system.paths import Path, as_path
from mcm_jax.system.pictures import image_grid
from mcm_jax.training import loop, observer, writers
from mcm_jax.training.checkpoints import Batches, Checkpoints
from mcm_jax.training.clock import Clock
from mcm_jax.training.profile import Profile, Tracer
from mcm_jax.training.state import Params, TeacherParams, TrainState

_GRID_IMAGES, _GRID_COLUMNS = 64, 8


def train(raw_config: ml_collections.ConfigDict, workdir: Path, *, profile: Profile | None = None) -> bool:
    """Trains in `workdir`, from its newest checkpoint if there is one; trains multiple stages in sequence.

    With several processes (see `distributed.joined`), all call this together and share `workdir`.

    Args:
      profile: traces some updates of each stage into workdir/profile.

    Returns:
      Whether the run is finished; False if it was interrupted, after saving a checkpoint.

    Raises:
      InputError: the config, the data, the teacher or the workdir is invalid. Each stage raises it before its
        first update; later stages check data and disk space when they start.
      loop.NonFiniteError: the loss or gradient is not finite.
    """
    with distributed.fail_together():
        stages = stage_configs(validation.validate(raw_config), workdir)
        writers.require_installed(stages[0][1].training.metrics_to)
        if len(stages) > 1 and (workdir / workdirs.RUN_FILE).exists():
            raise InputError(f"--workdir={workdir} contains a run, not its stages; choose another directory")
        for stage_workdir, config in stages:
            # Checks all stages before training the first.
            workdirs.existing_run(stage_workdir, config)
    for stage_workdir, config in stages:
        if len(stages) > 1 and isinstance(config.loss, Staged):
            before, after = config.loss.stages
            distributed.say(f"== stage {before} -> {after}: {stage_workdir}")
        if not _train_run(config, stage_workdir, profile):
            return False
    return True


def _train_run(config: Config, workdir: Path, profile: Profile | None) -> bool:
    """Trains one stage, or a run without stages; returns and raises as `train`."""
    with distributed.fail_together():
        existing = workdirs.existing_run(workdir, config)
    distributed.require_same((config, existing), "the configs and workdirs")
    # Checked first, because a finished run needs no data, teacher or disk space.
    if existing is not None and _is_finished(config, workdir):
        distributed.say(f"{workdir} is finished: all {config.training.num_steps} updates are done")
        return True
    if existing is not None and existing.origin is not None and config.teacher_checkpoint is None:
        raise InputError(
            f"--workdir={workdir} contains the imported network {existing.origin.file}, which can't be "
            "trained further; start a student in another directory"
        )
    with distributed.fail_together():
        dataset = pipeline.describe(
            data_dir=config.data.data_dir,
            dataset=config.data.dataset,
            resolution=config.data.resolution,
            encoder=config.data.encoder,
        )
        fitted = sharding.fitted(config.mesh)
        mesh = sharding.make_mesh(data=fitted.data, fsdp=fitted.fsdp)
        sharding.check_batch(
            mesh,
            batch_size=config.training.batch_size,
            accumulation_steps=config.batch_parts,
        )
        run, guide = _record(config, dataset, existing)
        training = build.training(config, condition=build.condition(dataset), mesh=mesh, guide=guide)
    distributed.require_same((dataset, run.teacher, run.guide), "the data sets and teachers")
    room = (config.training.keep_checkpoints + 1) * _num_bytes(training.abstract)
    with workdirs.claim(workdir, run, existing=existing, needed_bytes=room):
        return _train_from_newest(training, dataset, workdir, profile)


def _record(
    config: Config, dataset: DatasetInfo, existing: workdirs.RunRecord | None
) -> tuple[workdirs.RunRecord, Config | None]:
    """Checks teacher and guide; returns the record of the run, and the guide's config if there is a guide."""
    origin, guide = existing and existing.origin, None
    guide_origin = existing and existing.guide_origin
    if config.teacher_checkpoint is not None:
        origin = check_teacher(config, dataset).origin
        if origin is not None:
            distributed.say(f"the teacher is {origin.file} from {origin.source}: {origin.licence}")
    if config.guide_checkpoint is not None:
        guide = check_guide(config, dataset)
        guide_origin = guide.origin or guide.guide_origin
        if guide_origin is not None:
            distributed.say(
                f"its guide is {guide_origin.file} from {guide_origin.source}: {guide_origin.licence}"
            )
    identities = {
        name: workdirs.newest_identity(path) or (existing and getattr(existing, name))
        for name, path in (("teacher", config.teacher_checkpoint), ("guide", config.guide_checkpoint))
    }
    record = workdirs.RunRecord(
        config=config, dataset=dataset, origin=origin, guide_origin=guide_origin, **identities
    )
    return record, guide and guide.config


def _train_from_newest(
    training: build.Training, dataset: DatasetInfo, workdir: Path, profile: Profile | None
) -> bool:
    """Trains from the newest checkpoint, if there is one; returns as `train`."""
    config, mesh, clock = training.config, training.mesh, Clock()
    keep_every = config.training.keep_every_steps or None
    with Checkpoints(workdir, keep=config.training.keep_checkpoints, keep_every=keep_every) as checkpoints:
        jax.config.update("jax_compilation_cache_dir", str(workdirs.compilation_cache(workdir)))
        with distributed.fail_together():
            batches = train_batches(config)
        state, teacher_params = _start(training, checkpoints, batches)
        done, train_step = int(state.step), training.train_step()
        preview = Run(config, dataset, mesh=mesh, params=state.ema_params, checkpoint_step=done)
        count = int(count_parameters(training.abstract.params))
        distributed.say(f"training {count:,} parameters on {sharding.description(mesh)}")
        tracer = None if profile is None else Tracer(profile, workdir, first_step=done)
        with distributed.fail_together():
            observed = _observer(
                config,
                workdir,
                first_step=done,
                draw=functools.partial(_draw_grid, preview),
                clock=clock,
                tracer=tracer,
            )
        with observed as run_observer:
            return loop.train(
                state,
                teacher_params,
                train_step,
                batches,
                mesh=mesh,
                settings=config.training,
                checkpoints=checkpoints,
                observer=run_observer,
            )


def _is_finished(config: Config, workdir: Path) -> bool:
    """Whether all updates of the run in `workdir` are done."""
    with Checkpoints(workdir) as checkpoints:
        return (checkpoints.latest_step() or 0) >= config.training.num_steps


def check_teacher(config: Config, dataset: DatasetInfo) -> workdirs.RunRecord:
    """Returns the teacher's record; InputError unless it is a finished and compatible run."""
    path = _workdir_of("teacher", config)
    teacher = finished_run(path, dataset, what=f"config.teacher_checkpoint={path}")
    teacher_config, teacher_data = teacher.config, teacher.dataset
    _check_teacher_steps(config, teacher_config)
    if (
        config.teacher_guidance > 0
        and config.guide_checkpoint is None
        and not teacher_config.supports_guidance
    ):
        raise InputError(
            f"config.{SECTIONS[config.objective]}.teacher_guidance={config.teacher_guidance}: "
            f"config.teacher_checkpoint={path} was not trained for 'any class'; train a diffusion model with "
            "config.diffusion.label_dropout=0.1, or set config.guide_checkpoint to a worse model"
        )
    if teacher_config.is_student and teacher_data.fingerprints != dataset.fingerprints:
        raise InputError(
            f"config.teacher_checkpoint={path}, the stage before, was trained on other images than those in "
            f"{dataset.path} (their hashes differ); restore them, or train all stages in another workdir"
        )
    its = fields.flat(teacher_config, Affects.NETWORK)
    for name, ours in fields.flat(config, Affects.NETWORK).items():
        if its[name] != ours:
            raise InputError(
                f"config.teacher_checkpoint={path} has another network: its {name} is {its[name]}, this "
                f"run's is {ours}; make them equal or choose another teacher"
            )
    return teacher


def check_guide(config: Config, dataset: DatasetInfo) -> workdirs.RunRecord:
    """Returns the guide's record; InputError unless it is a finished diffusion model of such images."""
    what = f"config.guide_checkpoint={config.guide_checkpoint}"
    guide = finished_run(_workdir_of("guide", config), dataset, what=what)
    if guide.config.is_student:
        raise InputError(
            f"{what} is a {guide.config.objective} student; use the workdir of a diffusion model"
        )
    try:
        samplers.check_range(guide.config, config)
    except InputError as error:
        raise InputError(f"{what}: {error}") from error
    return guide


def finished_run(path: Path, dataset: DatasetInfo, *, what: str) -> workdirs.RunRecord:
    """Returns the record of the diffusion model or student in `path`.

    Raises:
      InputError: it is not finished, or was not trained for the size and the conditions of `dataset`.
    """
    try:
        run, done = workdirs.read(path), workdirs.steps(path)[-1]
    except InputError as error:
        raise InputError(f"{what}: {error}") from error
    described = exported.find(path)
    if described is not None and described.parameters != "ema":
        raise InputError(f"{what} has only the raw parameters; export the averaged ones (--parameters=ema)")
    if run.origin is not None and run.origin.kind == CONSISTENCY:
        raise InputError(f"{what} is the consistency model {run.origin.file}; use a diffusion model")
    if done < run.config.training.num_steps:
        raise InputError(
            f"{what} has completed {done} of its {run.config.training.num_steps} updates; finish its "
            "training first, because every start of the student must load the same model"
        )
    its = run.dataset
    if its.class_names != dataset.class_names:
        raise InputError(
            f"{what} was trained on the {its.num_classes} classes of {its.dataset}, not the "
            f"{dataset.num_classes} of {dataset.dataset}; use its data set"
        )
    if its.resolution != dataset.resolution:
        raise InputError(
            f"{what} was trained on images of {its.resolution}x{its.resolution} pixels, not "
            f"{dataset.resolution}x{dataset.resolution}; use its resolution"
        )
    if len({encoding and encoding.input for encoding in (its.encoding, dataset.encoding)}) > 1:
        raise InputError(
            f"{what} was trained with {_described(its)}, this run's data has {_described(dataset)}; use the "
            "same"
        )
    return run


def _described(dataset: DatasetInfo) -> str:
    encoding = dataset.encoding
    if encoding is None:
        return "class labels"
    return f"captions of {encoding.length} tokens by {encoding.encoder} ({encoding.encoder_sha256[:12]})"


def _check_teacher_steps(config: Config, teacher: Config) -> None:
    """Checks that the teacher is a diffusion model, or the preceding stage of the same method.

    Raises:
      InputError: it is neither.
    """
    path, steps = config.teacher_checkpoint, teacher.student_steps
    if not teacher.is_student:
        return
    loss = config.loss
    if teacher.objective != config.objective or not isinstance(loss, Staged):
        raise InputError(
            f"config.teacher_checkpoint={path} is a {teacher.objective} student; use the workdir "
            "of a diffusion model"
        )
    if steps != loss.stages[:1]:
        raise InputError(
            f"config.teacher_checkpoint={path} is a student of {steps[0]} steps, but "
            f"config.{config.objective}.stages={loss.stages!r} needs a teacher of {loss.stages[0]}; "
            f"start the stages at {steps[0]}"
        )
    if isinstance(loss, Progressive) and loss.xvar_frac != loss.later_xvar_frac:
        raise InputError(
            f"config.progressive.xvar_frac={loss.xvar_frac}: config.teacher_checkpoint={path} is a student, "
            f"which already includes aDDIM's adjustment; set it to later_xvar_frac={loss.later_xvar_frac}"
        )


def train_batches(config: Config) -> Batches:
    """Returns an iterator over this process's batches of training images, from the first batch on."""
    data = config.data
    source = pipeline.open_split(
        data_dir=data.data_dir,
        dataset=data.dataset,
        resolution=data.resolution,
        split="train",
        encoder=data.encoder,
        in_memory_limit_bytes=round(data.in_memory_gb * 1e9),
        max_corrupt_records=data.max_corrupt_records,
    )
    return pipeline.train_batches(
        source,
        batch_size=config.training.batch_size // jax.process_count(),
        seed=config.seed,
        flip=data.horizontal_flip,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def _start(
    training: build.Training, checkpoints: Checkpoints, batches: Batches
) -> tuple[TrainState, TeacherParams | None]:
    """Returns (state, teacher's parameters); the latter are None unless the objective distils.

    The state is restored from the newest checkpoint if there is one. Otherwise it is new, and a student
    starts with the teacher's averaged parameters.
    """
    config, abstract, shardings = training.config, training.abstract, training.shardings
    continuing = checkpoints.any()
    distributed.require_same(continuing, "the lists of checkpoints")
    teacher = guide = None
    if config.distils or (config.teacher_checkpoint is not None and not continuing):
        teacher = _restored(
            _workdir_of("teacher", config), training.network.without_end.abstract_params, training.mesh
        )
    if continuing:
        state = checkpoints.restore(abstract, shardings, batches)
        distributed.say(f"continuing at update {int(state.step)}")
    elif teacher is not None:
        state = training.init_from(teacher)
    else:
        state = training.init(build.init_key(config.seed))
    if not config.distils:
        return state, None
    if training.guide is not None:
        guide = _restored(_workdir_of("guide", config), training.guide.abstract_params, training.mesh)
    return state, TeacherParams(teacher, guide)


def _restored(workdir: Path, abstract: Params, mesh: Mesh) -> Params:
    """The averaged parameters of the run in `workdir`, sharded over the mesh."""
    shardings = sharding.params_sharding(mesh, abstract)
    return workdirs.restore_params(workdir, abstract, shardings, parameters="ema")


def _workdir_of(model: Literal["teacher", "guide"], config: Config) -> Path:
    """The directory of the teacher, which all objectives except diffusion have, or of the guide."""
    path = getattr(config, f"{model}_checkpoint")
    if path is None:
        raise ValueError(f"{config.objective} has no {model}_checkpoint")
    return as_path(path)


def _observer(
    config: Config,
    workdir: Path,
    *,
    first_step: int,
    draw: observer.Draw,
    clock: Clock,
    tracer: Tracer | None,
) -> contextlib.AbstractContextManager[loop.Observer]:
    """The observer of this process; only the first process reports progress."""
    if not distributed.is_first():
        return observer.SilentObserver(draw=draw, clock=clock, tracer=tracer)
    return observer.RunObserver(
        workdir,
        first_step=first_step,
        num_steps=config.training.num_steps,
        batch_size=config.training.batch_size,
        log_every_steps=config.training.log_every_steps,
        draw=draw,
        clock=clock,
        writers=writers.opened(
            config.training.metrics_to, workdir, first_step=first_step, config=fields.flat(config)
        ),
        tracer=tracer,
    )


def _draw_grid(preview: Run, params: Params) -> np.ndarray | None:
    """Draws a grid of samples from `params`, with the compiled sampler of `preview`; None if not finite."""
    try:
        with jax.transfer_guard("allow"):
            images, _ = preview.with_params(params).sample(_GRID_IMAGES)
    except NonFiniteSamplesError:
        return None
    return image_grid(images, _GRID_COLUMNS, scale=max(1, 48 // images.shape[1]))


def _num_bytes(abstract: TrainState) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
