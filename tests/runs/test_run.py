"""Sampling from a trained run: reproducible whatever the batch and the devices."""

import dataclasses
import functools
import json
import math
import shutil
import typing
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import mcm_jax
from mcm_jax.config.settings import Config
from mcm_jax.data import pipeline
from mcm_jax.diffusion import process, sampling
from mcm_jax.objectives.consistency import Consistency
from mcm_jax.objectives.moments import Moments
from mcm_jax.objectives.tract import Tract
from mcm_jax.runs import build, samplers, trainer, workdirs
from mcm_jax.runs.run import Run, load_run
from mcm_jax.runs.samplers import NonFiniteSamplesError
from mcm_jax.system.errors import InputError
from tests import tiny


@pytest.fixture(scope="module")
def run(teacher):
    return load_run(teacher)


@pytest.fixture(scope="module")
def student(tiny_data, teacher, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("student")
    assert trainer.train(tiny.config(tiny_data, "cd", teacher), workdir)
    return load_run(workdir)


def assert_nearly_equal(a, b):
    """At most one grey level in 0.1% of the pixels: what the last bits of XLA's CPU results may move."""
    difference = np.abs(a.astype(int) - b.astype(int))
    assert difference.max() <= 1
    assert np.mean(difference > 0) <= 0.001


def test_three_lines(teacher):
    run = mcm_jax.load(teacher)
    images, labels = run.sample(5)
    assert images.shape == (5, 8, 8, 3)
    assert images.dtype == np.uint8
    assert labels.shape == (5,)


def test_a_run_says_what_it_is(run, student, teacher):
    assert repr(run) == (
        f"Run(diffusion on folder/tiny at 8x8, ema parameters after 4 updates, workdir={str(teacher)!r})"
    )
    assert repr(student).startswith("Run(cd of 2 steps on folder/tiny at 8x8, ema parameters after 4 updates")
    alone = Run(run.config, run.dataset, mesh=run.mesh, params=run.params, checkpoint_step=4)
    assert "workdir" not in repr(alone)


def test_same_seed_same_images(run):
    a, labels_a = run.sample(20, seed=3)
    b, labels_b = run.sample(20, seed=3)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(labels_a, labels_b)
    # Of other noise, not only of other classes.
    assert not np.array_equal(a, run.sample(20, seed=4, labels=labels_a)[0])


def test_an_image_depends_on_its_number_only(run):
    whole, labels = run.sample(40)
    part, part_labels = run.sample(11, first=29)
    assert_nearly_equal(whole[29:], part)
    np.testing.assert_array_equal(labels[29:], part_labels)


def test_samples_that_are_not_finite_are_refused(run):
    """One of them suffices; without a check it would be gray."""
    params = jax.tree.map(np.array, jax.device_get(run.params))
    params["conditioning"]["classes"]["embedding"][1] = np.nan
    broken = run.with_params(params)
    broken.sample(3, labels=np.array([0, 0, 0]))
    with pytest.raises(NonFiniteSamplesError, match="contain NaN or infinity"):
        broken.sample(3, labels=np.array([0, 0, 1]))


@pytest.mark.parametrize("batch_per_device", [1, 3, 16])
def test_any_batch_size(run, batch_per_device):
    assert_nearly_equal(run.sample(40)[0], run.sample(40, batch_per_device=batch_per_device)[0])


@pytest.mark.multi_device
def test_any_device_count(tiny_data, tmp_path):
    run = load_run(tiny.made_up_teacher(tiny_data, tmp_path / "teacher"))
    assert run.mesh.size == 8
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])
    params = jax.device_put(jax.device_get(run.params), jax.devices()[0])
    alone = Run(run.config, run.dataset, mesh=mesh, params=params, checkpoint_step=4)
    images, _ = run.sample(40)
    assert_nearly_equal(images, alone.sample(40)[0])
    # Black and white are equal whatever is computed: most pixels are neither.
    assert np.mean((images > 0) & (images < 255)) > 0.5


def test_a_student_takes_its_own_steps(student):
    assert student.sampling().steps == 2
    assert student.sampling().sampler == "ddim"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student.sample(2)


def test_a_student_of_moment_matching_is_sampled_with_noise(student):
    config = dataclasses.replace(student.config, objective="moments", moments=Moments(student_steps=4))
    assert samplers.resolve(config).sampler == "ddpm" and samplers.resolve(config).steps == 4


def test_a_student_of_either_kind_knows_its_steps(run, student):
    for objective, steps in (("diffusion", ()), ("cd", (2,)), ("ct", (2,))):
        config = dataclasses.replace(student.config, objective=objective, seed=5)
        other = Run(config, run.dataset, mesh=run.mesh, params=run.params, checkpoint_step=4)
        assert (other.objective, other.student_steps, other.seed) == (objective, steps, 5)


def test_one_student_samples_with_each_of_its_numbers_of_steps(tiny_data, teacher, tmp_path):
    config = tiny.config(tiny_data, "cd", teacher)
    config.consistency.student_steps = (1, 2)
    assert trainer.train(config, tmp_path)
    student = load_run(tmp_path)
    assert (student.student_steps, student.sampling().steps) == ((1, 2), 2)
    assert "cd of 1 and 2 steps" in repr(student)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, two = (student.sample(4, steps=steps)[0] for steps in (1, 2))
        by_time, _ = student.sample(4, noise_grid="1,1/2")
    assert not np.array_equal(one, two)
    np.testing.assert_array_equal(by_time, two)
    assert student.sampling(noise_grid="1,1/3").noise_grid == "1,0.3333333333333333"
    with pytest.warns(UserWarning, match="trained for 1 and 2 steps but is sampled with 3"):
        student.sample(1, steps=3)
    with pytest.warns(UserWarning, match="not trained for the step from 1 to 0.75 of noise_grid=1,0.75"):
        student.sample(1, noise_grid="1,3/4")
    with pytest.raises(InputError, match=r"sampler=heun .* predicts the end of each step, so use ddim"):
        student.sample(1, sampler="heun")
    # The network has learned to use the end of the step.
    end = student.params["conditioning"]["end"]["dense_2"]["kernel"]
    assert np.abs(jax.device_get(end)).max() > 0


def test_a_teacher_never_warns(run):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.sample(2, steps=3)


def test_progress_comes_batch_by_batch(run):
    for options, expected in (({}, [2, 2, 1]), ({"batch_per_device": 3}, [3, 2])):
        done = []
        run.sample(5, progress=done.append, **options)
        assert done == expected


@pytest.mark.parametrize(
    ("rule", "counts", "classes"),
    [
        ("train_frequency", (0, 9), {1}),
        ("uniform", (0, 9), {1}),
        ("train_frequency", (1, 10**9), {1}),
        ("uniform", (1, 10**9), {0, 1}),
    ],
)
def test_classes_are_drawn_by_the_rule(run, rule, counts, classes):
    """A class that the training set does not have is never drawn."""
    dataset = dataclasses.replace(run.dataset, class_counts={"train": counts, "test": (9, 0)})
    sampling = dataclasses.replace(run.config.sampling, label_rule=rule)
    config = dataclasses.replace(run.config, sampling=sampling)
    other = Run(config, dataset, mesh=run.mesh, params=run.params, checkpoint_step=4)
    other._compiled = run._compiled
    assert set(other.sample(20)[1].tolist()) == classes
    assert other.label_rule() == rule


def test_classes_depend_on_the_seed(run):
    assert not np.array_equal(run.sample(20, seed=0)[1], run.sample(20, seed=1)[1])


def test_a_sampler_is_compiled_once(run, monkeypatch):
    other = Run(run.config, run.dataset, mesh=run.mesh, params=run.params, checkpoint_step=4)
    calls, sample = [], sampling.sample
    monkeypatch.setattr(
        sampling, "sample", lambda *args, **kwargs: calls.append(1) or sample(*args, **kwargs)
    )
    for _ in range(2):
        other.sample(5, steps=3, sampler="ddim")
    assert calls == [1]


def test_a_student_warns_of_other_steps(student):
    with pytest.warns(UserWarning, match="trained for 2 steps but is sampled with 3"):
        student.sample(2, steps=3)


def test_a_teacher_takes_any_steps_and_sampler(run):
    images = [run.sample(4, steps=n, sampler=s)[0] for n, s in ((3, "ddim"), (3, "addim"), (7, "addim"))]
    assert not np.array_equal(images[0], images[1])
    assert not np.array_equal(images[1], images[2])


def with_x_var_images(run, num, **others):
    settings = dataclasses.replace(run.config.sampling, x_var_images=num, **others)
    run.config = dataclasses.replace(run.config, sampling=settings)
    return run


def test_measured_variance(tiny_data, teacher, tmp_path):
    """eta times the mean squared error on random training images, measured once and stored."""
    shutil.copytree(teacher, tmp_path / "teacher")
    run = with_x_var_images(load_run(tmp_path / "teacher"), 10, x_var_eta=0.5)
    how = run.sampling(steps=3, sampler="addim", x_var="measured")
    assert (how.x_var_eta, how.x_var_images) == (0.5, 10)
    assert run.sampling(sampler="addim").x_var_eta is None
    x_var = run.x_var(how)
    images, labels = run.random_images("train", 10)
    keys = sampling.image_keys(jax.random.key(0), jnp.arange(10))
    errors = sampling.measure_x_var(
        functools.partial(run.network.apply, run.params),
        jnp.asarray(images, jnp.float32) / 127.5 - 1,
        jnp.asarray(labels),
        keys,
        logsnr=build.schedule(run.config)(jnp.array([1.0, 2 / 3, 1 / 3], jnp.float32)),
    )
    np.testing.assert_allclose(x_var, 0.5 * np.mean(errors, axis=1), rtol=1e-4)
    analytic, measured = (
        run.sample(4, steps=3, sampler="addim", x_var=kind)[0] for kind in ("analytic", "measured")
    )
    assert not np.array_equal(analytic, measured)
    again = with_x_var_images(load_run(tmp_path / "teacher", data_dir="/none"), 10, x_var_eta=0.5)
    np.testing.assert_array_equal(again.x_var(how), x_var)


def test_a_variance_is_never_that_of_another_checkpoint(teacher, tmp_path, monkeypatch):
    """Of the same step, in the same place: a network that was trained there again."""
    monkeypatch.setattr(Run, "_measure_mean_square_error", lambda self, how: [1.0, 2.0])
    workdir = shutil.copytree(teacher, tmp_path / "teacher")
    run = load_run(workdir)
    how = run.sampling(steps=2, sampler="addim", x_var="measured")
    x_var = how.x_var_eta * np.array([1.0, 2.0], np.float32)
    np.testing.assert_array_equal(run.x_var(how), x_var)
    (file,) = (workdir / "x_var").iterdir()
    content = file.read_text()
    stored = json.loads(content)
    assert stored["checkpoint"] == run.checkpoint == workdirs.checkpoint_identity(workdir, 4)
    for other in (
        json.dumps(stored | {"checkpoint": "0" * 64, "mean_square_error": [9.0, 9.0]}),
        json.dumps({"mean_square_error": [9.0, 9.0]}),  # An older version's, which names no checkpoint.
        json.dumps(stored | {"mean_square_error": [9.0]}),
        json.dumps(stored | {"mean_square_error": ["text", None]}),
        "[]",
        content[:-9],
    ):
        file.write_text(other)
        np.testing.assert_array_equal(load_run(workdir).x_var(how), x_var)
        assert file.read_text() == content


def test_a_variance_of_no_known_checkpoint_is_not_stored(teacher, tmp_path):
    workdir = shutil.copytree(teacher, tmp_path / "teacher")
    run = with_x_var_images(load_run(workdir), 4)
    how = run.sampling(steps=2, sampler="addim", x_var="measured")
    raw = run.with_params(load_run(workdir, parameters="raw").params)
    assert not np.array_equal(raw.x_var(how), run.x_var(how))
    assert len(list((workdir / "x_var").iterdir())) == 1  # The second's.


def test_a_sample_of_images_is_of_the_whole_split_and_reads_no_more(run, monkeypatch):
    images, labels = run.images("train")
    read = []
    gather = pipeline.RecordSource.gather
    monkeypatch.setattr(
        pipeline.RecordSource, "gather", lambda self, indices: read.extend(indices) or gather(self, indices)
    )
    some, their_labels = run.random_images("train", 10)
    assert len(read) == len(set(read)) == 10 and read == sorted(read) and read != list(range(10))
    np.testing.assert_array_equal(some, images[read])
    np.testing.assert_array_equal(their_labels, labels[read])
    np.testing.assert_array_equal(run.random_images("train", 10)[0], some)
    np.testing.assert_array_equal(run.random_images("train", 10_000)[0], images)


def test_a_variance_that_cannot_be_stored_is_used_all_the_same(teacher, tmp_path):
    workdir = shutil.copytree(teacher, tmp_path / "teacher")
    (workdir / "x_var").write_text("a file where the directory would be")
    run = load_run(workdir)
    how = run.sampling(steps=2, sampler="addim", x_var="measured")
    with pytest.warns(UserWarning, match="can't be stored and will be measured again: .*x_var"):
        assert np.all(np.asarray(run.x_var(how)) > 0)


def test_other_parameters_have_another_variance(run):
    """A measurement on the old ones is forgotten, as in the trainer's previews."""
    how = run.sampling(steps=2, x_var="measured")
    alone = Run(run.config, run.dataset, mesh=run.mesh, params=run.params, checkpoint_step=4)
    raw = load_run(run.workdir, parameters="raw").params
    before, other = alone.x_var(how), alone.with_params(raw)
    assert not np.array_equal(other.x_var(how), before)
    assert other.params is raw and alone.params is run.params


@pytest.mark.parametrize("name", ["sampler", "noise_grid", "x_var", "rounding"])
def test_a_name_that_is_no_choice_is_refused(run, name):
    with pytest.raises(InputError, match=f"{name}=nonsense is not one of "):
        run.sampling(**{name: "nonsense"})


def test_a_variance_for_a_sampler_that_takes_none(run):
    with pytest.raises(InputError, match="x_var=measured has no effect on ddim"):
        run.sampling(sampler="ddim", x_var="measured")


@pytest.mark.parametrize("noise_grid", ["published_cd", "published_ct"])
def test_the_noise_levels_of_published_students(run, noise_grid):
    images, _ = run.sample(2, steps=2, sampler="consistency", noise_grid=noise_grid)
    assert not np.array_equal(images, run.sample(2, steps=2, sampler="consistency")[0])
    with pytest.raises(
        InputError, match=f"noise_grid={noise_grid} has noise levels for 1 or 2 steps, not for 3"
    ):
        run.sampling(steps=3, noise_grid=noise_grid)


@pytest.mark.parametrize(
    ("objective", "steps", "times", "step"),
    [
        ("cd", (1, 2, 4), "1,1/2,1/4", None),
        ("cd", (1, 2, 4), "1,3/4,1/2", None),
        ("cd", (1, 2, 4), "1,3/4", None),  # The student of one step was trained from every time to 0.
        ("cd", (1, 2, 4), "1,1/2,0.3,1/4", (0.5, 0.3)),
        ("cd", (2, 4), "1,3/4", (0.75, 0.0)),
        ("cd", (3, 4), "1,2/3,1/2,1/4", None),
        ("cd", (3,), "1,2/3,1/2", (2 / 3, 0.5)),
        ("ayf", (), "1,0.123", None),
        ("shortcut", (), "1,1/2,1/4", None),
        ("shortcut", (), "1,0.123", (1.0, 0.123)),
        ("tract", (2,), "1,1/2", None),
        ("tract", (2,), "1,1/2,1/4", (0.5, 0.25)),
    ],
)
def test_a_grid_of_trained_steps(objective, steps, times, step):
    config = Config(objective=objective, consistency=Consistency(steps), tract=Tract((8, *steps)))
    assert samplers.untrained_step(config, samplers.grid_times(times)) == step


def test_grids_of_times_have_short_names(run):
    times = ",".join(f"{n}/400" for n in range(400, 0, -1))
    name, other = (run.sampling(noise_grid=grid).grid_name for grid in (times, times + ",1/500"))
    assert name != other and len(name) == len("times") + 12
    assert run.sampling(noise_grid="karras").grid_name == "karras"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_grid": "0.5,0.25"}, "must descend from 1 to a time above 0"),
        ({"noise_grid": "1,1/2,1/2"}, "must descend from 1 to a time above 0"),
        ({"noise_grid": "1,1/2,0"}, "must descend from 1 to a time above 0"),
        ({"noise_grid": "1,half"}, "must be a name or times such as 1,1/2,1/4"),
        ({"noise_grid": "1,1e400"}, "must be a name or times such as 1,1/2,1/4"),
        ({"noise_grid": "1,1/0"}, "must be a name or times such as 1,1/2,1/4"),
        ({"noise_grid": "1,1/2", "steps": 3}, "steps=3 contradicts noise_grid=1,0.5, which has 2 times"),
    ],
)
def test_bad_times(run, options, message):
    with pytest.raises(InputError, match=message):
        run.sampling(**options)


def test_a_teacher_is_sampled_at_any_times(run):
    """At the times of a grid with a name, the samples are the same."""
    expected, _ = run.sample(3, steps=4)
    np.testing.assert_array_equal(run.sample(3, noise_grid="1,3/4,1/2,1/4")[0], expected)
    assert not np.array_equal(run.sample(3, noise_grid="1,3/4,1/2,1/8")[0], expected)


def test_new_noise_suits_only_students_of_one_step(student):
    with pytest.warns(UserWarning, match="the sampler consistency adds noise to every prediction"):
        student.sample(2, sampler="consistency")


def test_a_student_warns_of_another_grid(student):
    with pytest.warns(UserWarning, match="trained on its schedule's grid but is sampled on karras"):
        student.sample(2, noise_grid="karras")


def test_every_kind_of_parameters_step_and_grid_has_its_own_variance(tiny_data, teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / "teacher")
    loaded = [
        load_run(tmp_path / "teacher"),
        load_run(tmp_path / "teacher", parameters="raw"),
        load_run(tmp_path / "teacher", checkpoint_step=2),
    ]
    values = [
        tuple(np.asarray(run.x_var(run.sampling(steps=steps, x_var="measured", noise_grid=grid))))
        for run in loaded
        for steps in (1, 2)
        for grid in ("schedule", "karras")
    ]
    assert len(set(values)) == len(values)


@pytest.mark.parametrize("sampler", typing.get_args(sampling.Sampler))
@pytest.mark.parametrize("noise_grid", ["schedule", "karras"])
def test_a_teacher_takes_every_sampler_on_every_grid(run, sampler, noise_grid):
    settings = run.sampling(steps=3, sampler=sampler, noise_grid=noise_grid)
    assert settings.network_calls == (5 if sampler == "heun" else 3)
    assert settings.x_var == ("analytic" if sampler in ("addim", "noisy_ddim") else None)
    images, _ = run.sample(3, steps=3, sampler=sampler, noise_grid=noise_grid)
    part, _ = run.sample(1, first=2, steps=3, sampler=sampler, noise_grid=noise_grid)
    # Also the noise in the steps is the image's own.
    assert_nearly_equal(images[2:], part)
    usual, _ = run.sample(3, steps=3, sampler="ddim")
    assert np.array_equal(images, usual) == ((sampler, noise_grid) == ("ddim", "schedule"))


def test_guidance(run, student):
    """x_hat + g (x_hat - x_hat of 'any class'), for a diffusion model that knows any class."""
    diffusion = dataclasses.replace(run.config.diffusion, label_dropout=0.1)
    config = dataclasses.replace(run.config, diffusion=diffusion)
    knows = Run(config, run.dataset, mesh=run.mesh, params=run.params, checkpoint_step=4)
    settings = knows.sampling(steps=1, guidance=0.5)
    assert settings.guidance == 0.5 and settings.network_calls == 2
    labels = np.array([0, 1, 1, 0], np.int32)
    images, _ = knows.sample(4, steps=1, guidance=0.5, labels=labels)
    keys = sampling.image_keys(jax.random.key(0), jnp.arange(4))
    z_1 = sampling.initial_noise(keys, (8, 8, 3))
    logsnr = jnp.full(4, build.schedule(run.config)(jnp.float32(1.0)))
    x_cond, x_any = (
        np.asarray(
            process.x_from_v(run.network.apply(run.params, z_1, logsnr, c, None), z_1, logsnr_t=logsnr)
        )
        for c in (jnp.asarray(labels), jnp.full(4, 2))
    )
    expected = np.clip((x_cond + 0.5 * (x_cond - x_any) + 1) * 127.5, 0, 255)
    # Rounding, and a last bit before it.
    assert np.abs(images - expected).max() < 0.51
    for other in (run, student):
        with pytest.raises(InputError, match=r"guidance 1\.0 needs a diffusion model trained with"):
            other.sample(1, guidance=1.0)


@pytest.mark.parametrize("guidance", [math.nan, math.inf, -1.0])
def test_guidance_that_is_no_weight(guidance, run):
    with pytest.raises(InputError, match="must be a finite number of at least 0"):
        run.sample(1, guidance=guidance)


def test_samples_are_rounded_as_adm_does_on_request(run):
    """Its scripts take the floor; the same samples are then half a grey level darker on average."""
    nearest, _ = run.sample(4)
    floor, _ = run.sample(4, rounding="floor")
    difference = nearest.astype(int) - floor
    assert set(np.unique(difference)) == {0, 1} and 0.3 < difference.mean() < 0.7
    rules = [run.sampling(**settings).rounding for settings in ({}, {"rounding": "floor"})]
    assert rules == ["nearest", "floor"]


def test_labels_can_be_chosen(run):
    zero, labels = run.sample(8, labels=np.zeros(8, np.int32))
    one, _ = run.sample(8, labels=np.ones(8, np.int32))
    np.testing.assert_array_equal(labels, 0)
    assert not np.array_equal(zero, one)


def test_raw_and_averaged_parameters_differ(teacher):
    raw = load_run(teacher, parameters="raw")
    assert not np.array_equal(raw.params["conv_in"]["kernel"], load_run(teacher).params["conv_in"]["kernel"])


def test_an_earlier_checkpoint(teacher):
    early, late = load_run(teacher, checkpoint_step=2), load_run(teacher)
    assert (early.checkpoint_step, late.checkpoint_step) == (2, 4)
    assert early.workdir == late.workdir == teacher
    assert not np.array_equal(early.params["conv_in"]["kernel"], late.params["conv_in"]["kernel"])
    with pytest.raises(InputError, match=r"no checkpoint of step 3 .*available steps: \[2, 4\]"):
        load_run(teacher, checkpoint_step=3)


def test_no_run(tmp_path):
    with pytest.raises(InputError, match=r"is not a run \(run.json is missing\)"):
        load_run(tmp_path)


def test_a_damaged_run(teacher, tmp_path):
    (tmp_path / "run.json").write_text((teacher / "run.json").read_text()[:-20])
    with pytest.raises(InputError, match=r"run.json is damaged"):
        load_run(tmp_path)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_runs_images(run, split):
    images, labels = run.images(split)
    assert len(images) == len(labels) == run.dataset.num_examples[split]


def test_the_data_may_be_elsewhere_now(teacher, tiny_data, tmp_path):
    shutil.copytree(tiny_data, tmp_path / "elsewhere")
    run = load_run(teacher, data_dir=str(tmp_path / "elsewhere"))
    shutil.rmtree(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="elsewhere"):
        run.images("train")


def test_untrained_is_gray_noise(run):
    """v_hat = 0 before the first update; another network than the trained one."""
    untrained = run.untrained()
    images, _ = untrained.sample(8)
    assert not np.array_equal(images, run.sample(8)[0])
    assert untrained.checkpoint_step == 0
    expected = jax.jit(run.network.init)(build.init_key(run.seed))
    jax.tree.map(np.testing.assert_array_equal, untrained.params, expected)


@pytest.mark.parametrize("labels", [np.zeros(3, np.int32), np.full(4, 2), np.full(4, -1)])
def test_labels_that_are_none(run, labels):
    with pytest.raises(InputError, match="labels must be 4 classes from 0 to 1"):
        run.sample(4, labels=labels)


@pytest.mark.parametrize("split", ["train", "test"])
def test_other_images_than_it_was_trained_on(run, split):
    fingerprints = {**run.dataset.fingerprints, split: "0" * 64}
    dataset = dataclasses.replace(run.dataset, fingerprints=fingerprints)
    other = Run(run.config, dataset, mesh=run.mesh, params=run.params, checkpoint_step=4)
    with pytest.raises(InputError, match="contains other images than the run was trained on"):
        other.images("train")
