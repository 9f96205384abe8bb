"""The commands in config heads, docstrings and launchers: all are valid, and run to their end in small."""

import pytest

from tests import commands
from tests.commands import ROOT

CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
PROGRAMS = [
    ROOT / "mcm_jax" / f"{name}.py" for name in "evaluate findings plan prepare report sample train".split()
]
# tpu_host.sh has no dry run: only tpu_pod.sh calls it.
LAUNCHERS = sorted(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("launch/**/*.sh"), *ROOT.glob("launch/*.sbatch")]
    if path.stem not in ("environment", "tpu_host")
)


@pytest.mark.parametrize("path", [*CONFIGS, *PROGRAMS], ids=lambda path: path.stem)
def test_the_commands_of_a_docstring(path):
    found = commands.in_docstring(path)
    assert found
    for command in found:
        commands.check(command)


@pytest.mark.parametrize("script", LAUNCHERS)
def test_the_commands_of_a_launchers_head(script):
    found = commands.in_head(script)
    assert found
    for command in found:
        commands.check(command)


def test_commands_are_found_in_text():
    text = """
Run `MCM_ACCELERATOR=gpu bash launch/smoke.sh` or `python -m mcm_jax.report
--runs=runs`:

    $ python -m mcm_jax.train --config=openmoji:cd,steps=4 \\\\
        --config.data.dataset='a b'   # a comment
    python -m mcm_jax.train ...
    pip install mcm_jax
"""
    found = commands.in_text(text.replace("\\\\", "\\"), "text")
    assert [command.words for command in found] == [
        ("python", "-m", "mcm_jax.train", "--config=openmoji:cd,steps=4", "--config.data.dataset=a b"),
        ("bash", "launch/smoke.sh"),
        ("python", "-m", "mcm_jax.report", "--runs=runs"),
    ]
    assert [command.program for command in found] == ["train", None, "report"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config=openmoji:teacher", "--workdri=x"), "workdri"),
        (("--config=openmoji:teacher,steps=3", "--workdir=x"), "there is no config row"),
        (("--config=openmoji:cd,steps=4", "--workdir=x"), "teacher_checkpoint"),
    ],
)
def test_a_wrong_command_is_noticed(arguments, message):
    with pytest.raises(ValueError, match=message):
        commands.check(commands.Command("text", ("python", "-m", "mcm_jax.train", *arguments)))


# To their end, with the smallest networks, two updates and few images.

TRAIN = (
    *("--config.model.kinds=('resnet',)", "--config.model.widths=(8,)", "--config.model.blocks=(1,)"),
    *("--config.model.dropouts=(0.0,)", "--config.model.embedding_width=16", "--config.model.dtype=float32"),
    *("--config.training.num_steps=2", "--config.training.batch_size=8", "--config.mesh.fsdp=1"),
    *("--config.training.sample_every_steps=0", "--config.optimizer.warmup_steps=0"),
    *("--config.sampling.teacher_steps=2", "--config.sampling.batch_per_device=4"),
)


def small(command, *data):
    """Arguments that make a command short; data: those that name small data for training."""
    if command.program == "train":
        stages = ("--config.progressive.stages=(4,2)",) if ":small,pd" in str(command) else ()
        levels = ("--config.diffusion.levels=(8,4)",) if "imagenet128:small,teacher" in str(command) else ()
        return (*TRAIN, *data, *stages, *levels)
    return ("--num=8", "--untrained_num=4") if command.program == "evaluate" else ()


def test_the_head_of_folder_runs(tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare, train = commands.in_docstring(ROOT / "configs/folder.py")
    commands.run(prepare, f"--manual_dir={tiny_data.parent / 'images'}", "--resolution=8")
    assert "finished: runs/teacher" in commands.run(train, *TRAIN, "--config.data.resolution=8")


@pytest.mark.parametrize("resolution", [64, 128])
def test_the_head_of_imagenet_runs(resolution, tiny_data, tmp_path, monkeypatch):
    """On other data: ImageNet itself is not here."""
    monkeypatch.chdir(tmp_path)
    data = (f"--config.data.data_dir={tiny_data}", "--config.data.dataset=folder/tiny")
    data = (*data, "--config.data.resolution=8")
    for command in commands.in_docstring(ROOT / f"configs/imagenet{resolution}.py"):
        assert "finished: runs/" in commands.run(command, *small(command, *data))
    assert (tmp_path / "runs/pd/checkpoints/2").exists()


def test_the_head_of_openmoji_and_the_smoke_run(tmp_path, monkeypatch):
    """The smoke run continues the head's runs, and finds them finished."""
    monkeypatch.chdir(tmp_path)
    prepare, teacher, student, _ = commands.in_docstring(ROOT / "configs/openmoji.py")
    assert "next: python -m mcm_jax.train --config=openmoji:teacher " in commands.run(prepare)
    runs = "runs/smoke/seed0"
    commands.run(teacher, *TRAIN, f"--workdir={runs}/teacher")
    commands.run(student, *TRAIN, f"--workdir={runs}/cd4", f"--config.teacher_checkpoint={runs}/teacher")
    for command in commands.in_dry_run("launch/smoke.sh"):
        output = commands.run(command, *small(command))
    assert "The page with plots and samples: runs/smoke/report.html" in output
