"""A published file becomes a run that samples, and teaches a student that starts as its copy."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import safetensors.numpy

from configs import imagenet64, imagenet128
from mcm_jax.config import public_rows, validation
from mcm_jax.data import preparation
from mcm_jax.models import edm2
from mcm_jax.models.adm import ADMSettings
from mcm_jax.models.conditions import Classes
from mcm_jax.models.network import Network
from mcm_jax.records import RUN_FILE, Origin
from mcm_jax.runs import build, trainer, workdirs
from mcm_jax.runs.run import load_run
from mcm_jax.system import pth
from mcm_jax.system.errors import InputError
from mcm_jax.teachers import importer
from mcm_jax.teachers.weights import Imported
from tests.teachers import diffusers_form, golden, images, one_level

LICENCE = "CC BY-NC-SA 4.0: non-commercial, share-alike"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(data_dir, info) of images of ten classes, as many as the narrow networks have."""
    directory = tmp_path_factory.mktemp("ten")
    images.write(directory / "images")
    plan = preparation.plan(dataset="folder", resolution=32, manual_dir=str(directory / "images"), name="ten")
    info, _ = preparation.prepare(plan, data_dir=directory / "data", overwrite=False)
    return directory / "data", info


def write(directory, name, *, called=None):
    path = directory / (called or f"{name}.pkl")
    path.write_bytes(golden.file(name))
    return path


def student(data_dir, teacher):
    """The config of a student of EDM2 with one level."""
    config = imagenet64.get_config("edm2-s,cd,steps=4")
    config.data.update(dataset="folder/ten", data_dir=str(data_dir), resolution=32)
    config.edm2.update(one_level.SETTINGS | {"dtype": "float32", "remat": "none"})
    config.training.update(num_steps=1, batch_size=8, accumulation_steps=1, sample_every_steps=0)
    config.teacher_checkpoint = str(teacher)
    return config


@pytest.mark.slow
def test_an_imported_network_teaches(data, tmp_path, capsys):
    data_dir, info = data
    narrow, workdir = write(tmp_path, "edm2-img64", called="narrow.pkl"), tmp_path / "narrow"
    report = importer.write(importer.load(narrow), workdir, dataset=info, data_dir=data_dir)
    assert LICENCE in report and "edm2 with 377,829 parameters" in report
    expected = golden.imported("edm2-img64", "edm").params
    jax.tree.map(np.testing.assert_array_equal, load_run(workdir).params, expected)

    file, workdir = tmp_path / "edm2-img64.pkl", tmp_path / "teacher"
    file.write_bytes(one_level.edm2(32))
    report = importer.write(importer.load(file), workdir, dataset=info, data_dir=data_dir)
    teacher = load_run(workdir)
    assert trainer.train(student(data_dir, workdir), tmp_path / "student")
    assert LICENCE in capsys.readouterr().out
    record = workdirs.read(tmp_path / "student")
    assert record.origin is not None and record.origin.licence == LICENCE
    raw = load_run(tmp_path / "student", parameters="raw").params
    normalised = edm2.normalised(raw)
    # After the update, the weights have unit rows; normalising them again changes 1e-4 of them.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4), raw, normalised)
    # Frequencies and phases are not learned.
    for name in ("frequencies", "phases"):
        np.testing.assert_array_equal(raw[name], teacher.params[name])

    again = importer.write(importer.load(file), workdir, dataset=info, data_dir=data_dir)
    assert again == report
    other = tmp_path / "other.pkl"
    other.write_bytes(one_level.edm2(32))
    with pytest.raises(InputError, match="contains another network; choose another directory"):
        importer.write(importer.load(other), workdir, dataset=info, data_dir=data_dir)
    assert workdirs.read(workdir).origin == record.origin
    mistaken = student(data_dir, workdir)
    mistaken.schedule.logsnr_max = 15.0
    with pytest.raises(InputError, match=r"its schedule\.logsnr_max is 12\.43, this run's is 15\.0"):
        trainer.train(mistaken, tmp_path / "other")


def test_an_import_is_not_trained_further_and_a_consistency_model_teaches_none(data, tmp_path):
    data_dir, info = data
    workdir = tmp_path / "teacher"
    importer.write(importer.load(write(tmp_path, "edm2-img64")), workdir, dataset=info, data_dir=data_dir)
    record = json.loads((workdir / RUN_FILE).read_text())
    record["config"]["training"]["num_steps"] = 5
    with pytest.raises(InputError, match=r"imported network edm2-img64\.pkl, which can't be trained further"):
        trainer.train(ml_collections.ConfigDict(record["config"]), workdir)
    record["config"]["training"]["num_steps"] = 1
    record["origin"]["kind"] = "consistency"
    (workdir / RUN_FILE).write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"is the consistency model edm2-img64\.pkl; use a diffusion model"):
        trainer.train(student(data_dir, workdir), tmp_path / "student")


@pytest.mark.parametrize(("file", "grid"), [("cd_x.pt", "published_cd"), ("ct_x.pt", "published_ct")])
def test_a_published_student_is_sampled_as_its_authors_do(data, tmp_path, file, grid):
    data_dir, info = data
    origin = Origin(kind="consistency", file=file, sha256="0" * 64, source="here", licence="none")
    sizes = one_level.SETTINGS | {"groups": 4, "group_width": 1, "preconditioning": "consistency"}
    settings = ADMSettings(**sizes)
    abstract = Network(settings, (32, 32, 3), Classes(10)).abstract_params
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape, scale=0.3).astype(np.float32), abstract)
    teacher = importer.Teacher(Imported(settings, 32, 10, params), origin)
    importer.write(teacher, tmp_path / "run", dataset=info, data_dir=data_dir)
    record = json.loads((tmp_path / "run" / RUN_FILE).read_text())
    record["config"]["sampling"]["batch_per_device"] = 2
    (tmp_path / "run" / RUN_FILE).write_text(json.dumps(record))
    run = load_run(tmp_path / "run")
    usual = run.sampling()
    assert (usual.steps, usual.sampler, usual.noise_grid, usual.clip) == (1, "consistency", grid, "every")
    one, two = (run.sample(2, steps=steps)[0] for steps in (None, 2))
    assert one.shape == two.shape and not np.array_equal(one, two)


def test_normalising_leaves_the_function_as_it_is():
    imported = golden.imported("edm2-img64", "edm")
    kernel = jnp.asarray(imported.params["encoder"][0]["conv_0"]["kernel"])
    unit = edm2.unit(kernel)
    rms = np.sqrt(np.mean(np.square(unit), axis=(0, 1, 2)))
    np.testing.assert_allclose(rms, 1, atol=1e-3)
    assert np.ptp(np.sqrt(np.mean(np.square(kernel), axis=(0, 1, 2)))) > 0.1
    np.testing.assert_allclose(edm2.unit(unit), unit, rtol=2e-4)


@pytest.mark.parametrize(
    ("name", "called", "kind", "found", "preconditioning"),
    [
        ("edm2-img64", "any.pkl", None, "edm2", "edm"),
        ("edm-imagenet64-adm", "any.pkl", None, "edm", "edm"),
        ("guided-diffusion-64", "any.pt", None, "adm64", "eps_cosine"),
        ("guided-diffusion-128", "any.pt", None, "adm128", "eps_linear"),
        ("consistency-models-64", "edm_imagenet64_ema.pt", None, "openai_edm", "edm_1000"),
        ("consistency-models-64", "ct_imagenet64.pt", None, "consistency", "consistency"),
        ("consistency-models-64", "any.pt", "consistency", "consistency", "consistency"),
    ],
)
def test_the_kind_is_found(name, called, kind, found, preconditioning):
    imported, its = importer.read(golden.file(name), name=called, kind=kind)
    assert its == found
    assert imported.num_classes == 10
    assert imported.settings.preconditioning == preconditioning


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_consistency_model_in_the_form_of_diffusers(dtype):
    content = golden.file("consistency-models-64")
    tensors = diffusers_form.of(pth.read(content, name="cd.pt"), blocks=1)
    saved = safetensors.numpy.save({name: value.astype(dtype) for name, value in tensors.items()})
    imported, kind = importer.read(saved, name="diffusion_pytorch_model.safetensors")
    expected, _ = importer.read(content, name="cd_imagenet64_l2.pt")
    assert kind == "consistency" and imported.settings == expected.settings
    close = functools.partial(np.testing.assert_allclose, rtol=0 if dtype == np.float32 else 1e-3, atol=1e-6)
    jax.tree.map(close, imported.params, expected.params)
    with pytest.raises(InputError, match=r"is damaged, or not a network of the supported kinds \(truncated"):
        importer.read(saved[:-10], name="x.safetensors")
    del tensors["mid_block.attentions.0.group_norm.weight"]
    saved = safetensors.numpy.save(tensors)
    with pytest.raises(InputError, match=r"not a network of the supported kinds \(.*group_norm\.weight"):
        importer.read(saved, name="x.safetensors")


def test_bad_files_are_refused_in_one_line(data, tmp_path):
    data_dir, info = data
    openai = golden.file("consistency-models-64")
    for content, name, kind, message in (
        (openai, "model.pt", None, "add --kind=openai_edm or --kind=consistency"),
        (openai, "cd_model.pt", "openai_edm", "is of kind consistency, not openai_edm"),
        (golden.file("edm2-img64"), "x.pkl", "consistency", "is of kind edm2, not consistency"),
        (b"\x89PNG", "x.png", None, "is neither a .pkl of EDM or EDM2, nor a .pt"),
        (openai[:10_000], "cd_x.pt", None, "cd_x.pt: not a .pth of plain tensors"),
    ):
        with pytest.raises(InputError, match=message):
            importer.read(content, name=name, kind=kind)
    few = dataclasses.replace(info, class_names=info.class_names[:3])
    file = write(tmp_path, "edm2-img64")
    with pytest.raises(InputError, match="was trained on 10 classes, but folder/ten has 3 classes"):
        importer.write(importer.load(file), tmp_path / "run", dataset=few, data_dir=data_dir)
    small = dataclasses.replace(info, resolution=16)
    with pytest.raises(InputError, match="on images of 32x32 pixels; add --resolution=32"):
        importer.write(importer.load(file), tmp_path / "run", dataset=small, data_dir=data_dir)
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"--teacher=.*missing\.pkl can't be read"):
        importer.load(tmp_path / "missing.pkl")


def test_every_row_of_a_published_network_is_valid():
    for file, resolution in ((imagenet64, 64), (imagenet128, 128)):
        for network, system in itertools.product(public_rows.NETWORKS[resolution], ("cd", "ct")):
            config = file.get_config(f"{network},{system},steps=4")
            config.teacher_checkpoint = "any"
            validation.validate(config)
    with pytest.raises(InputError, match="there is no config row 'edm2-s,cd': use one of edm2-s"):
        imagenet64.get_config("edm2-s,cd")
    with pytest.raises(InputError, match="there is no config row 'adm64,cd,heun,steps=4'"):
        imagenet64.get_config("adm64,cd,heun,steps=4")


def test_the_row_of_a_published_distillation_has_its_choices():
    row = imagenet64.get_config("edm2-s,cd,heun,steps=4")
    settings = row.consistency
    assert (row.schedule.kind, settings.teacher_step, settings.loss_weight) == ("karras", "heun", "sqrt_edm")
    assert (settings.teacher_steps_first, settings.teacher_steps_last) == (256, 1024)
    row.teacher_checkpoint = "teacher"
    schedule = build.schedule(validation.validate(row))
    np.testing.assert_allclose(np.exp(-schedule(jnp.array([1.0, 0.0])) / 2), [80, 0.002], rtol=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_levels": (True,)}, "must have one entry for each of the 4 levels"),
        ({"head_width": 5}, "attention heads do not divide the width"),
        ({"groups": 5}, "can't divide 192 channels of a block"),
        ({"widths": (100, 200), "attention_levels": (False, False)}, "can't divide 200 channels of a block"),
        ({"widths": (192, 384, 576, 768, 768, 768, 768, 768)}, "attention_levels"),
    ],
)
def test_bad_sizes_are_refused(change, message):
    config = imagenet64.get_config("adm64,cd,steps=4")
    config.teacher_checkpoint = "any"
    config.adm.update(change)
    with pytest.raises(InputError, match=message):
        validation.validate(config)


def test_settings_of_another_architecture_are_refused():
    config = imagenet64.get_config("adm64,cd,steps=4")
    config.teacher_checkpoint = "any"
    config.model.dtype = "bfloat16"
    with pytest.raises(InputError, match=r"config\.model\.dtype='bfloat16' has no effect on adm"):
        validation.validate(config)
