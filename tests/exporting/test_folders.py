"""Exported runs: read back by this package, by the library safetensors, and by JAX alone."""

import copy
import dataclasses
import json
import re
import subprocess
import sys
import sysconfig

import jax
import numpy as np
import pytest
import safetensors.numpy
import yaml

import mcm_jax
from mcm_jax.exporting import folders, programs
from mcm_jax.models.uvit import UViTSettings
from mcm_jax.objectives.consistency import Consistency
from mcm_jax.records import Origin
from mcm_jax.runs import exported, trainer, workdirs
from mcm_jax.runs.run import Run, load_run
from mcm_jax.system import sharding
from mcm_jax.system.errors import InputError
from mcm_jax.training import loop
from tests import forks, tiny
from tests.limits import refusal

ORIGIN = Origin(
    kind="edm2",
    file="edm2: 'x'.pkl",
    sha256="c" * 64,
    source="github.com/NVlabs/edm2",
    licence="CC BY-NC-SA 4.0: non-commercial",
)


@pytest.fixture(scope="module")
def model(teacher, tmp_path_factory):
    """The folder of the teacher's averaged parameters."""
    folder = tmp_path_factory.mktemp("export") / "model"
    folders.write_model(load_run(teacher), workdirs.read(teacher), folder)
    return folder


def copied(folder, tmp_path):
    result = tmp_path / "copy"
    result.mkdir()
    for path in folder.iterdir():
        (result / path.name).write_bytes(path.read_bytes())
    return result


def edit(folder, **changes):
    """Changes fields of config.json; None removes one."""
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def front_matter(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_a_folder_is_the_run(model, teacher, tiny_data):
    ours, its = load_run(teacher), mcm_jax.load(model, data_dir=tiny_data)
    jax.tree.map(np.testing.assert_array_equal, ours.params, its.params)
    for a, b in zip(ours.sample(5, seed=1), its.sample(5, seed=1), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (its.checkpoint, its.checkpoint_step, its.seed) == (ours.checkpoint, 4, ours.seed)
    assert its.config == ours.config and its.dataset == ours.dataset
    assert len(its.images("train")[0]) == 36


def test_raw_parameters_are_said_to_be_raw(teacher, tmp_path):
    run = load_run(teacher, parameters="raw", checkpoint_step=2)
    folders.write_model(run, workdirs.read(teacher), tmp_path)
    loaded = load_run(tmp_path, parameters="raw", checkpoint_step=2)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, run.params)
    assert loaded.checkpoint_step == 2 and loaded.checkpoint == workdirs.checkpoint_identity(teacher, 2)
    assert 'mcm_jax.load(".", parameters="raw")' in (tmp_path / "README.md").read_text()
    with pytest.raises(InputError, match="only the raw parameters, not the averaged ones; load it with"):
        load_run(tmp_path)
    with pytest.raises(InputError, match="only the parameters after 2 updates, not after 4"):
        load_run(tmp_path, parameters="raw", checkpoint_step=4)


def test_other_libraries_read_the_files(model, teacher, tiny_data):
    tensors = safetensors.numpy.load_file(model / "model.safetensors")
    params = load_run(teacher).params
    np.testing.assert_array_equal(
        tensors["conditioning.classes.embedding"], params["conditioning"]["classes"]["embedding"]
    )
    assert len(tensors) == len(jax.tree.leaves(params))
    config = json.loads((model / "config.json").read_text())
    assert (config["library_name"], config["checkpoint_step"], config["parameters"]) == ("mcm_jax", 4, "ema")
    # No path of this machine is passed on.
    for path in model.iterdir():
        assert str(tiny_data).encode() not in path.read_bytes()


def test_the_card_states_what_is_known_and_what_is_not(model, teacher, tmp_path):
    matter = front_matter(model)
    assert (matter["license"], matter["library_name"]) == ("unknown", "mcm_jax")
    assert matter["pipeline_tag"] == "unconditional-image-generation"
    assert matter["mcm_jax"]["dataset"] == "folder/tiny" and matter["mcm_jax"]["checkpoint_step"] == 4
    text = (model / "README.md").read_text()
    assert "4 of 4 updates of 16 images, seed 0" in text and "any number; by default 4 of addim" in text
    assert "the run records none. Its author must add one" in text

    run, record = load_run(teacher), workdirs.read(teacher)
    config = dataclasses.replace(
        run.config,
        objective="cd",
        consistency=Consistency(student_steps=(2,)),
        teacher_checkpoint="/home/ada/runs/big",
    )
    record = dataclasses.replace(record, config=config, origin=ORIGIN)
    student = Run(config, run.dataset, mesh=run.mesh, params=run.params, checkpoint_step=4, origin=ORIGIN)
    folders.write_model(student, record, tmp_path)
    matter, text = front_matter(tmp_path), (tmp_path / "README.md").read_text()
    assert (matter["license"], matter["license_name"]) == ("other", ORIGIN.licence)
    assert matter["license_link"] == "https://github.com/NVlabs/edm2"
    assert matter["mcm_jax"]["origin"][0]["file"] == ORIGIN.file
    assert "trained for 2; by default 2 of ddim" in text and "Started from: big" in text
    assert f"Licence of {ORIGIN.file}: {ORIGIN.licence}" in text
    loaded = load_run(tmp_path)
    assert (loaded.student_steps, loaded.origin, loaded.checkpoint) == ((2,), ORIGIN, None)
    assert "/home/ada" not in text + (tmp_path / "config.json").read_text()


def test_a_student_has_it_for_a_teacher_and_a_guide(model, teacher, tiny_data, tmp_path, monkeypatch):
    """The folder is the same model as the workdir, so a student goes on with it."""
    handed = []

    def train(state, teacher_params, *_, **__):
        handed.append((state, teacher_params))
        return True

    monkeypatch.setattr(loop, "train", train)
    for path in (teacher, model):
        config = tiny.config(tiny_data, "cd", path)
        config.guide_checkpoint, config.consistency.teacher_guidance = str(path), 1.0
        assert trainer.train(config, tmp_path / "student")
    (_, ours), (state, its) = handed
    jax.tree.map(np.testing.assert_array_equal, ours, its)
    jax.tree.map(np.testing.assert_array_equal, state.params, its.teacher)
    assert load_run(teacher).guided_by(load_run(model)).guide.checkpoint.endswith(" ema")


def test_it_is_not_trained_further(model, tiny_data):
    with pytest.raises(InputError, match="contains an exported model, which can't be trained further"):
        trainer.train(tiny.config(tiny_data), model)


def flip_a_bit(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def other_tensors(folder, **changes):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors") | changes
    kept = {name: value for name, value in tensors.items() if value is not None}
    (folder / "model.safetensors").write_bytes(safetensors.numpy.save(kept))


NAME = "conditioning.classes.embedding"
DAMAGE = {
    "a bit": (flip_a_bit, "has other parameters than config.json states; restore both"),
    "cut": (lambda f: (f / "model.safetensors").write_bytes(b"\1"), "is damaged (truncated"),
    "no tensors": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors can't be read (No such"),
    "one tensor less": (lambda f: other_tensors(f, **{NAME: None}), f"its tensor {NAME} differs from"),
    "one tensor more": (lambda f: other_tensors(f, more=np.zeros(1)), "its tensor more differs from"),
    "another shape": (lambda f: other_tensors(f, **{NAME: np.zeros(3)}), f"its tensor {NAME} differs from"),
    "another type": (
        lambda f: other_tensors(f, **{NAME: np.zeros((3, 16), np.float16)}),
        f"{NAME} is float16, not float32",
    ),
    "another network": (lambda f: change_width(f), "differs from the network of config.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is damaged ("),
    "no checksum": (lambda f: edit(f, checksum=None), "config.json is damaged (checksum is missing)"),
    "no config": (lambda f: edit(f, config=None), "config.json is damaged ('config'); restore it"),
    "of another library": (lambda f: edit(f, library_name="other"), "is not a run (run.json is missing)"),
    "no config.json": (lambda f: (f / "config.json").unlink(), "is not a run (run.json is missing); train"),
}


def change_width(folder):
    config = json.loads((folder / "config.json").read_text())["config"]
    config["model"]["mlp_factor"] = UViTSettings().mlp_factor + 1
    edit(folder, config=config)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_line(damage, model, tmp_path):
    folder = copied(model, tmp_path)
    inflict, message = DAMAGE[damage]
    inflict(folder)
    assert message in (refusal(lambda: load_run(folder)) or "")


# Runs the Python code of a README in a directory, then draws another batch. -I and -S leave out the current
# directory, the environment and the .pth files of installed packages, and the last line of defence is None.
ALONE = """
import sys
sys.path.append(sys.argv[1])
sys.modules["mcm_jax"] = None
try:
    import mcm_jax
except ImportError:
    pass
else:
    raise AssertionError("mcm_jax can be imported")
import re
exec(re.search("```python\\n(.*?)```", open("README.md").read(), re.DOTALL)[1])
more = sampler.call(params, np.uint32(2**31 + 5), np.array([1, 0, 1], np.int32))
np.savez(sys.argv[2], images=images, labels=labels, more=more, platforms=sampler.platforms)
assert not [name for name in sys.modules if name.startswith(("mcm_jax.", "flax", "optax"))]
"""


def alone(folder, out):
    """What the lines of the README draw: 8 images of seed 0, and 3 of another."""
    libraries = sysconfig.get_path("purelib")
    command = [sys.executable, "-I", "-S", "-c", ALONE, libraries, str(out)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return np.load(out)


def assert_nearly_equal(a, b):
    """At most one grey level in 0.1% of the values: what the last bits of XLA's CPU results may move."""
    difference = np.abs(a.astype(int) - b)
    assert difference.max() <= 1 and np.mean(difference > 0) <= 0.001


def test_a_sampler_runs_without_this_package(teacher, tmp_path):
    run = load_run(teacher)
    settings = run.sampling(steps=3)
    said = folders.write_sampler(run, settings, workdirs.read(teacher), tmp_path / "sampler")
    assert re.fullmatch(r"read back: 2 images differ .* in \d of 384 values, by at most [01] of 255", said)
    drawn = alone(tmp_path / "sampler", tmp_path / "images.npz")
    assert list(drawn["platforms"]) == ["cpu", "cuda", "tpu"]
    for images, options in (
        (drawn["images"], {"seed": 0, "labels": drawn["labels"]}),
        (drawn["more"], {"seed": 2**31 + 5, "labels": np.array([1, 0, 1], np.int32)}),
    ):
        expected, _ = run.sample(len(images), steps=3, **options)
        assert images.dtype == np.uint8
        assert_nearly_equal(images, expected)
        # Equal values mean little if most are black or white whatever is computed.
        assert np.mean((expected > 0) & (expected < 255)) > 0.3
    signature = json.loads((tmp_path / "sampler" / "sampler.json").read_text())
    assert signature["sampling"]["steps"] == 3 and signature["class_names"] == ["even", "odd"]
    assert signature["inputs"][1:] == [
        {"name": "seed", "dtype": "uint32", "shape": []},
        {"name": "labels", "dtype": "int32", "shape": ["b"], "minimum": 0, "maximum": 1},
    ]
    assert signature["outputs"] == [{"name": "images", "dtype": "uint8", "shape": ["b", 8, 8, 3]}]


def test_a_guided_sampler_with_a_measured_variance(teacher, tmp_path):
    """Both networks' calls and the constants of the grid are in the program."""
    run = load_run(teacher)
    diffusion = dataclasses.replace(run.config.diffusion, label_dropout=0.1)
    sampling = dataclasses.replace(run.config.sampling, x_var="measured", teacher_steps=2)
    guided = copy.copy(run)
    guided.config = dataclasses.replace(run.config, diffusion=diffusion, sampling=sampling)
    guided.workdir = None
    program = programs.exported_sampler(guided, guided.sampling(guidance=0.7))
    labels = np.array([0, 1, 1, 0, 0], np.int32)
    images = np.asarray(program.call(exported.by_name(run.params), np.uint32(0), labels))
    assert_nearly_equal(images, guided.sample(5, labels=labels, guidance=0.7)[0])
    assert not np.array_equal(images, guided.sample(5, labels=labels, guidance=0.0)[0])


def test_a_student_of_several_numbers_of_steps(teacher, tmp_path):
    """Its network also receives the end of each step."""
    run, record = load_run(teacher), workdirs.read(teacher)
    config = dataclasses.replace(
        run.config, objective="cd", consistency=Consistency(student_steps=(1, 2)), teacher_checkpoint="big"
    )
    record = dataclasses.replace(record, config=config)
    student = Run(config, run.dataset, mesh=run.mesh, params=None, checkpoint_step=4)
    params = student.network.init_from(jax.random.key(0), run.params)
    student.params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    folders.write_model(student, record, tmp_path)
    assert "trained for 1, 2; by default 2 of ddim" in (tmp_path / "README.md").read_text()
    assert front_matter(tmp_path)["mcm_jax"]["student_steps"] == [1, 2]
    labels = np.array([0, 1, 1], np.int32)
    expected, _ = student.sample(3, labels=labels)
    np.testing.assert_array_equal(load_run(tmp_path).sample(3, labels=labels)[0], expected)
    program = programs.exported_sampler(student, student.sampling())
    images = np.asarray(program.call(exported.by_name(student.params), np.uint32(0), labels))
    assert_nearly_equal(images, expected)


@pytest.mark.multi_device
def test_a_run_on_eight_devices_exports_for_one(tiny_data, tmp_path, monkeypatch):
    run = load_run(tiny.made_up_teacher(tiny_data, tmp_path / "teacher"))
    assert run.mesh.size == 8
    record = workdirs.read(tmp_path / "teacher")
    folders.write_model(run, record, tmp_path / "model")
    monkeypatch.setattr(sharding, "_SMALLEST_SHARDED", 1)
    sharded = workdirs.restore_params(
        tmp_path / "model",
        run.network.abstract_params,
        sharding.params_sharding(sharding.make_mesh(data=2, fsdp=4), run.network.abstract_params),
        parameters="ema",
    )
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(sharded))
    jax.tree.map(np.testing.assert_array_equal, sharded, run.params)
    said = folders.write_sampler(run, run.sampling(), record, tmp_path / "sampler")
    assert re.search(r"in \d of 384 values, by at most [01] of 255", said)


def test_the_program(teacher, tmp_path):
    def export(*arguments):
        return forks.program("export", f"--workdir={teacher}", f"--out={tmp_path}/out", *arguments)

    done = export("--format=safetensors", "--parameters=raw", "--checkpoint_step=2")
    assert done.returncode == 0, done.stderr
    assert "raw parameters after 2 updates" in done.stdout and "--parameters=raw --num=16" in done.stdout
    assert load_run(tmp_path / "out", parameters="raw").checkpoint_step == 2
    for arguments, message in (
        (["--format=safetensors"], f"--out={tmp_path}/out is not empty; choose another directory"),
        (["--format=safetensors", "--steps=2"], "--steps applies only to --format=stablehlo; remove it"),
    ):
        done = export(*arguments)
        assert (done.returncode, done.stderr) == (2, f"error: {message}\n")
