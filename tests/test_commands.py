"""Every command in the README, documents, docstrings, config heads and launchers runs to its end, in small.

Bash runs each page as a script, in a directory that looks like a checkout, and the test's process runs the
programs that the page calls. Launchers run in the same way, and so do the commands that they print as next
steps. A command that is neither run nor listed in NOT_RUN or DRY fails the test. So does a page that is in no
story.
"""

import configparser
import dataclasses
import functools
import itertools
import pickle
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from mcm_jax import records
from mcm_jax.bench import avatars, choices, mixture, openmoji, trajectories_figure
from mcm_jax.config import rows
from mcm_jax.data import openmoji as openmoji_data
from mcm_jax.evaluation import evaluator, inception_weights, scoring
from mcm_jax.evaluation.features import Extractor
from mcm_jax.planning import planner
from mcm_jax.text import files as text_files
from tests import commands
from tests.commands import ROOT, Command
from tests.data import test_coco, test_emoji, test_imagenet
from tests.evaluation import test_dinov2, test_inception_weights
from tests.planning.stored import stored
from tests.teachers import images as teacher_images
from tests.teachers import one_level as one_level_network
from tests.text import tiny as encoders

# Sources in the order in which their commands are run. Those of a story share a directory: later ones sample
# what earlier ones have trained, and no command is run twice.
STORIES = {
    "openmoji": (
        *("configs/openmoji.py", "README.md", "docs/get_started.md", "docs/watching.md", "docs/api/run.md"),
        *(
            "mcm_jax/prepare.py",
            "mcm_jax/train.py",
            "mcm_jax/sample.py",
            "mcm_jax/export.py",
            "docs/passing_on.md",
            "mcm_jax/report.py",
            "launch/smoke.sh",
        ),
        *("docs/findings.md", "launch/findings.sh", "mcm_jax/findings.py"),
        *(
            "docs/architecture.md",
            "CONTRIBUTING.md",
            "launch/test.sh",
            "docs/speed.md",
            "launch/gpu_check.sh",
        ),
        *("docs/clusters.md", "launch/docker.sh", "launch/gke/train.sh", "launch/slurm.sbatch"),
        *("launch/tpu_host.sh", "launch/tpu_pod.sh"),
    ),
    "folder": ("configs/folder.py", "docs/your_images.md"),
    "avatars": ("configs/avatars.py", "docs/text_to_image.md", "launch/smoke_text.sh"),
    "emoji": ("configs/emoji.py",),
    "text_to_image": ("configs/text_to_image.py",),
    "imagenet64": ("docs/paper.md", "configs/imagenet64.py", "docs/fid.md", "mcm_jax/evaluate.py"),
    "imagenet_to_a_pod": ("docs/imagenet_to_a_pod.md",),
    "imagenet128": ("configs/imagenet128.py",),
    "public": ("docs/public_teachers.md",),
    "storage": ("docs/storage.md", "launch/faults.sh"),
    "planning": ("launch/plan_table.sh", "launch/plan_scaling.sh", "docs/planning.md", "mcm_jax/plan.py"),
}

# Not run, and why; what can be checked without running is. The first words decide.
NOT_RUN = {
    "pip install": "installs from the network; its extras must exist",
    "python -m pip install": "installs from the network, for a launcher",
    "python -m pytest": "runs these tests",
    "ruff check": "launch/test.sh runs it before these tests",
    "ruff format": "launch/test.sh runs it before these tests",
    "pyright": "launch/test.sh runs it before these tests",
    "lint-imports": "launch/test.sh runs it before these tests",
    "tensorboard": "serves until it is interrupted",
    "mkdocs build": "tests/test_docs.py builds the site",
    "mkdocs serve": "serves until it is interrupted; tests/test_docs.py builds the site",
    "python -m tests.mutants": "takes tens of minutes; tests/test_mutants.py runs it on examples",
    "bash launch/faults.sh": "takes an hour; .ci/run runs it with a few faults",
    "python -m tests.benchmarks": "measures; not a test",
    "gcloud": "logs a user in, or deletes a slice",
    "kubectl": "needs a Kubernetes cluster",
    "tfds build": "downloads a data set",
    "xpk workload create": "needs a cluster; the program that it would start is checked",
    "sbatch": "needs SLURM; its launcher's dry run is checked",
    "bash launch/tpu_host.sh": "installs on a TPU host; tests/test_clusters.py runs it with imitations",
}
# Launchers that are run with MCM_DRY_RUN=1, after a check of the programs that they would start, and why.
DRY = {
    "bash launch/docker.sh": "needs Docker",
    "bash launch/tpu_pod.sh": "needs Google Cloud; tests/test_clusters.py imitates it",
    "bash launch/gpu_check.sh": "needs a GPU; tests/parity/test_gpu_check.py runs its comparison in small",
    "bash launch/gke/train.sh": "needs a Kubernetes cluster; tests/test_clusters.py imitates it",
    "bash launch/slurm.sbatch": "needs SLURM; tests/test_clusters.py imitates it",
    "bash launch/smoke.sh --seed=": "the same programs as with seed 0",
    "bash launch/smoke.sh --runs=": "the same programs in another directory",
}

# How programs are made small: arguments that replace a command's own of the same names.
MODEL = (
    *("--config.model.kinds=('resnet',)", "--config.model.widths=(8,)", "--config.model.blocks=(1,)"),
    *("--config.model.dropouts=(0.0,)", "--config.model.embedding_width=16", "--config.model.dtype=float32"),
)
TRAIN = (
    *MODEL,
    *("--config.training.num_steps=2", "--config.training.batch_size=8", "--config.mesh.fsdp=1"),
    *("--config.training.sample_every_steps=0", "--config.optimizer.warmup_steps=0"),
    *("--config.sampling.teacher_steps=2", "--config.sampling.batch_per_device=8"),
)
PLAN = (
    *TRAIN,
    *("--topology=v5e:2x2", "--config.mesh.fsdp=4", "--config.data.resolution=8"),
    "--config.training.accumulation_steps=1",
)
# Ten classes at 8x8, and a network of one level with random weights, take the place of ImageNet and EDM2-S.
PUBLIC = (
    *("--config.data.dataset=folder/ten", "--config.data.resolution=8"),
    *("--config.schedule.noise_resolution_low=8", "--config.sampling.batch_per_device=8"),
    *(f"--config.edm2.{name}={value}" for name, value in one_level_network.SETTINGS.items()),
    *("--config.edm2.dtype=float32", "--config.edm2.remat=none"),
    *("--config.training.num_steps=1", "--config.training.batch_size=8"),
    *("--config.training.accumulation_steps=1", "--config.training.sample_every_steps=0"),
)
# ImageNet at 128x128 is not prepared: folder/tiny is in its place.
TINY_DATA = ("--config.data.dataset=folder/tiny", "--config.data.data_dir=tiny", "--config.data.resolution=8")


def one_level(network: str) -> tuple[str, ...]:
    """The network of a published teacher with one level of one block."""
    sizes = {"widths": "(32,)", "blocks": 1, "attention_levels": "(True,)", "head_width": 32}
    return tuple(f"--config.{network}.{field}={value}" for field, value in sizes.items())


def small(command: Command) -> tuple[str, ...]:
    """The arguments that make a command small."""
    text = str(command)
    if ":edm2-s," in text and command.program != "plan":
        return PUBLIC
    if command.program == "train":
        arguments = TRAIN
        if ":small,pd," in text or ":progressive" in text:
            arguments += ("--config.progressive.stages=(4,2)",)
        if ":tract" in text:
            arguments += ("--config.tract.stages=(4,2)",)
        if "--profile=" in text:
            arguments += ("--profile=1,1", "--config.training.num_steps=4")
        if "=avatars:" in text:
            arguments += ("--config.data.resolution=16",)
        if "=imagenet128:" in text:
            arguments += TINY_DATA
        if "=imagenet128:small,teacher" in text or "=text_to_image:teacher" in text:
            arguments += ("--config.diffusion.levels=(8,4)",)
        if "=folder:" in text or "=text_to_image:" in text:
            arguments += ("--config.data.resolution=8",)
        # A directory that hosts share is below the current one here.
        return arguments + tuple(
            f"{flag}={value.lstrip('/')}"
            for flag in ("--workdir", "--config.data.data_dir")
            if (value := option(command, flag)) and value.startswith("/")
        )
    if command.program == "prepare":
        if option(command, "--inception"):
            return ("--inception=made_up.pickle",)  # The published file's name contains its hash.
        if option(command, "--teacher"):
            return ("--dataset=folder", "--manual_dir=ten", "--resolution=8")
        return {
            "folder": ("--resolution=8",),
            "openmoji": ("--resolution=16",),
            "avatars": ("--num=24", "--workers=0", "--resolution=16"),
            "emoji": ("--workers=0",),
            "coco": ("--workers=0", "--resolution=8"),
            # Workers would have the environment of the first that started, and so not find the bucket.
            "imagenet": ("--workers=0",),
        }.get(option(command, "--dataset"), ())
    # A published teacher takes 32 of Heun's steps.
    sampling = ("--sampler=ddim", "--steps=1") if "edm2" in text and not option(command, "--sampler") else ()
    if command.program == "sample":
        return ("--num=10", *sampling)
    if command.program == "evaluate" and option(command, "--workdir"):
        steps = ("--steps=1,2",) if option(command, "--steps") else ()
        return ("--num=10", "--untrained_num=4", *steps, *sampling)
    if command.program == "findings":
        return ("--quick", "--seeds=2")
    if command.program == "plan" and option(command, "--config"):
        # FID's network takes the TPU's compiler eight minutes, whatever the batch.
        instead = ("--program=sample",) if "--program=features" in text else ()
        for network in ("edm2", "adm"):
            if f":{network}" in text:
                return (*PLAN[len(MODEL) :], *one_level(network))
        return (*PLAN, *instead)
    return ()


# The features that take the place of a feature network's: few, so that few images are enough.
FEATURES = {"pool": 4, "spatial": 3, "logits": 2}


class Averages(Extractor):
    """In place of a network: averages over as many parts of an image as there are features."""

    def __init__(self, network):
        self.network = network

    def __call__(self, images):
        pixels = images.reshape(len(images), -1).astype(np.float32) / 255
        return {
            name: np.stack([part.mean(1) for part in np.array_split(pixels, size, axis=1)], 1)
            for name, size in self.network.dimensions.items()
        }


class TwoLayers(nnx.Module):
    """The first and the last of Inception's layers, with names and parts as there."""

    def __init__(self, *, rngs):
        self.conv2d_1a_3x3 = nnx.Conv(3, 2, (3, 3), rngs=rngs)
        self.fc = nnx.Linear(2, 3, rngs=rngs)


@pytest.fixture
def small_parts(monkeypatch, tmp_path_factory):
    """What no argument makes small: networks, the emoji, trainings of the findings and of the figure."""
    network = scoring._feature_network

    def few_features(options):
        whole = network(options)  # Reads and checks the weights.
        return dataclasses.replace(whole, dimensions={name: FEATURES[name] for name in whole.dimensions})

    monkeypatch.setattr(scoring, "_feature_network", few_features)
    monkeypatch.setattr(evaluator, "Extractor", Averages)

    # Two narrow layers in place of MiniLM, whose 22 million weights tests/text reads.
    minilm = encoders.write(
        tmp_path_factory.mktemp("encoder") / "minilm", {**encoders.BERT, "max_position_embeddings": 128}
    )
    monkeypatch.setattr(text_files, "minilm", lambda: text_files.Directory(minilm))

    # Two layers in place of Inception's 95.
    monkeypatch.setattr(inception_weights, "Inception", TwoLayers)
    inception_weights.abstract_network.cache_clear()

    candidates = openmoji_data.candidates()
    monkeypatch.setattr(openmoji_data, "candidates", lambda: candidates[::24])

    figure = functools.partial(
        trajectories_figure.trajectories_figure, num_updates=2, num_samples=50, num_paths=2
    )
    monkeypatch.setattr(trajectories_figure, "trajectories_figure", figure)
    monkeypatch.setattr(trajectories_figure, "FIGURE_STEPS", (1,))
    monkeypatch.setattr(trajectories_figure, "_SETS", 2)

    # The findings: on the mixture all, with made-up distances, since tests/bench measures every kind of cell;
    # on the other problems the comparison of samplers, which is measured.
    class Samplers:
        def findings(self):
            return tuple(one for one in super().findings() if one.number == 4)

        def choices(self):
            return ()

    class Mixture2D(Samplers, mixture.Problem):
        pass

    class OpenMoji(Samplers, openmoji.Problem):
        pass

    measure, cells_of = mixture.Bench.__call__, choices.cells_of

    def made_up(bench, cell):
        if cell.problem == "mixture2d":
            return measure(bench, cell)
        return {"distance": 1.0 + cell.seed, "from_diffusion": 0.5, "largest_share": 0.7}

    monkeypatch.setattr(mixture.Bench, "__call__", made_up)
    monkeypatch.setattr(avatars.Bench, "__init__", lambda *_, **__: None)
    monkeypatch.setattr(avatars.Bench, "__call__", made_up)
    monkeypatch.setattr(avatars.Bench, "picture", lambda *_: b"")
    monkeypatch.setattr(choices, "cells_of", lambda chosen, *rest: cells_of(chosen, *rest) if chosen else [])
    problem = dataclasses.asdict(mixture.QUICK_2D)
    monkeypatch.setattr(mixture, "QUICK_2D", Mixture2D(**problem))
    problem = dataclasses.asdict(openmoji.QUICK) | {"teacher_updates": 2, "student_updates": 2}
    monkeypatch.setattr(openmoji, "QUICK", OpenMoji(**problem))
    monkeypatch.setattr(mixture, "NUM_SAMPLES", 50)
    monkeypatch.setattr(openmoji, "NUM_SAMPLES", 8)
    metric = records.with_count(records.DISTANCES[records.EFFICIENTNET], 8)
    monkeypatch.setattr(openmoji, "METRIC", metric)

    def tiny(row, **data):
        config = rows.tiny(row, **data)
        config.model.update(kinds=("resnet",), widths=(8,), blocks=(1,), dropouts=(0.0,), embedding_width=16)
        config.model.dtype = "float32"
        config.training.batch_size = config.sampling.batch_per_device = 8
        return config

    monkeypatch.setattr(openmoji, "rows", SimpleNamespace(tiny=tiny))
    compile_, compiled = planner._compile, {}

    def compile_once(program, config, *rest, **others):
        """Once for each program, objective and architecture: in small, most rows hardly differ."""
        key = (program, config.objective, config.architecture)
        if key not in compiled:
            compiled[key] = compile_(program, config, *rest, **others)
        return compiled[key]

    monkeypatch.setattr(planner, "_compile", compile_once)
    with stored():
        yield
    inception_weights.abstract_network.cache_clear()


def option(command: Command, flag: str) -> str | None:
    """The value of a flag, None without it."""
    values = [word.partition("=")[2] for word in command.arguments if word.startswith(f"{flag}=")]
    return values[-1] if values else None


class Story:
    """Runs sources in one directory, each command once."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.shell = commands.Shell(directory, self._serve)
        self._ran: dict[tuple[str, ...], str | None] = {}  # what a run amounts to -> its workdir
        self._where = ""

    def tell(self, source: str) -> None:
        """Runs all commands of a source, and those that its launchers print to go on with."""
        self._where = source
        printed = self.shell.run(f"source .venv/bin/activate\n{commands.script_of(source)}")
        lines = [line for line in printed.splitlines() if not line.startswith(("+", "#"))]
        for command in commands.in_text("\n".join(lines), f"printed by {source}"):
            self._run(command)

    def _serve(self, words: list[str], accelerator: str) -> int | str:
        command, line = Command(self._where, tuple(words)), shlex.join(words)
        if line.startswith("python -m mcm_jax."):
            self._run(command)
            return 0
        if words[:2] == ["python", "-c"]:
            # launch/environment.sh asks for the version; a page shows Python.
            if not words[2].startswith("import sys"):
                exec(compile(words[2], self._where, "exec"), {})
            return 0
        if listed(line, NOT_RUN):
            check_unrun(command)
            return 0
        assert words[0] == "bash", f"{command} is neither run nor listed"
        assert (ROOT / words[1]).is_file(), str(command)
        if listed(line, DRY) or accelerator in ("gpu", "tpu"):
            commands.check(command)
            return "dry"
        return "run"

    def _run(self, command: Command) -> None:
        """Runs a program, or copies the run of an earlier command that differs in its place only."""
        commands.check(command)
        arguments = small(command)
        replaced = tuple(word.partition("=")[0] + "=" for word in arguments)
        own = [word for word in command.arguments if not word.startswith(replaced)]
        workdir = None
        if command.program == "train":
            workdir = dict(word.split("=", 1) for word in (*command.arguments, *arguments))["--workdir"]
            elsewhere = ("--workdir=", "--config.teacher_checkpoint=", "--config.seed=")
            own = [word for word in own if not word.startswith(elsewhere)]
            arguments = tuple(word for word in arguments if not word.startswith("--workdir="))
        key = (str(command.program), *own, *arguments)
        if key not in self._ran:
            commands.run(command, *small(command))
            self._ran[key] = workdir
        elif workdir is not None and not Path(workdir).exists():
            shutil.copytree(self._ran[key], workdir)


def listed(line: str, table: dict[str, str]) -> bool:
    return any(line.startswith(first) for first in table)


def check_unrun(command: Command) -> None:
    """What can be checked of a command that is not run."""
    if command.words[0] == "sbatch":
        commands.check(command)
    if command.words[0] == "xpk":
        commands.check(Command(command.where, tuple(shlex.split(option(command, "--command") or ""))))
    if "install" in command.words and command.words[0] in ("pip", "python"):
        setup = configparser.ConfigParser(delimiters="=", interpolation=None)
        setup.read(ROOT / "setup.cfg")
        extras = command.words[-1].partition("[")[2].rstrip("]").split(",")
        assert set(filter(None, extras)) <= set(setup["options.extras_require"]), str(command)


def make_images(directory: Path) -> None:
    """Two classes of four images."""
    draw = np.random.default_rng(0)
    for name, n in itertools.product(("cat", "dog"), range(20)):
        (directory / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8)).save(directory / name / f"{n}.png")


def made_up_statistics(path: Path, *, side: int = 64) -> None:
    """A file of ADM's form, for FEATURES."""
    draw = np.random.default_rng(0)
    np.savez(
        path,
        mu=draw.normal(size=FEATURES["pool"]),
        sigma=np.eye(FEATURES["pool"]),
        mu_s=draw.normal(size=FEATURES["spatial"]),
        sigma_s=np.eye(FEATURES["spatial"]),
        arr_0=draw.integers(0, 256, (8, side, side, 3), np.uint8),
    )


def make_up_data(name: str, directory: Path) -> None:
    """The files that the commands of a story name, in their true layout."""
    if name in ("openmoji", "folder", "text_to_image"):
        make_images(directory / "PATH")
    if name == "avatars":
        test_coco.write(directory / "PATH", "array_record")
    if name in ("avatars", "text_to_image"):
        encoder = directory / "DIRECTORY" / "t5-v1_1-xxl"
        encoder.mkdir(parents=True)
        encoders.write(encoder, encoders.T5)
    if name == "text_to_image":
        for n, image in enumerate((directory / "PATH").rglob("*.png")):
            image.with_suffix(".txt").write_text(f"image {n}")
    if name == "emoji":
        test_emoji.write_tgz(directory / "FILE", test_emoji.package_files())
    if name == "public":
        teacher_images.write(directory / "ten")
        for kind in ("s-1073741-0.075", "s-1073741-0.045", "xs-0134217-0.110"):
            (directory / f"edm2-img64-{kind}.pkl").write_bytes(one_level_network.edm2(8))
        made_up_statistics(directory / "VIRTUAL_imagenet64_labeled.npz", side=8)
    if name not in ("imagenet64", "imagenet_to_a_pod", "public"):
        return
    layers = test_inception_weights.random_layers()
    (directory / "made_up.pickle").write_bytes(test_inception_weights.as_pickle(layers))
    if name != "public":
        test_imagenet.make_manual_dir(directory / "DIR")
    if name == "imagenet64":
        made_up_statistics(directory / "imagenet64.npz")
        # These weights are not ViT-L/14's, so their distance has another name than in EDM2's file.
        test_dinov2.write(directory / "dinov2-large")
        moments = {"mu": np.zeros(FEATURES["pool"]), "sigma": np.eye(FEATURES["pool"])}
        (directory / "img64.pkl").write_bytes(pickle.dumps({"fid": moments, "fd_dinov2_other": moments}))


@pytest.mark.slow
@pytest.mark.parametrize("name", STORIES)
def test_every_command_runs_to_its_end(name, small_parts, tiny_data, tmp_path, monkeypatch, request):
    if name in ("storage", "imagenet_to_a_pod"):
        request.getfixturevalue("bucket")
        monkeypatch.setenv("MCM_LOCAL_DATA", str(tmp_path / "copies"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny_data)
    make_up_data(name, tmp_path)
    story = Story(tmp_path)
    for source in STORIES[name]:
        if source == "mcm_jax/evaluate.py":
            shutil.copytree("runs/cd8", "runs/cd4")  # This docstring names both.
        story.tell(source)


def test_a_page_fails_if_a_command_is_not_listed_or_fails(tmp_path):
    story = Story(tmp_path)
    for line, message in (
        ("git clone URL", "git clone URL is neither run nor listed"),
        ("curl URL", "curl: command not found"),
        ("bash launch/smoke.sh --seeed=1", "--seeed=1 is not an option"),
        ("false", "exit code 1"),
    ):
        with pytest.raises(AssertionError, match=message):
            story.shell.run(f"source .venv/bin/activate\n{line}\ntrue")
    with pytest.raises(ValueError, match="workdri"):
        story.shell.run("python -m mcm_jax.train --config=openmoji:teacher --workdri=x")


def test_every_source_with_commands_is_in_a_story():
    launchers = [*ROOT.glob("launch/**/*.sh"), *ROOT.glob("launch/*.sbatch")]
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
    paths = [*pages, *launchers, *ROOT.glob("configs/*.py"), *ROOT.glob("mcm_jax/*.py")]
    names = {str(path.relative_to(ROOT)) for path in paths}
    with_commands = {name for name in names if commands.script_of(name)}
    told = [source for story in STORIES.values() for source in story]
    assert sorted(told) == sorted(with_commands)


def test_nothing_is_listed_that_no_source_says():
    sources = [source for story in STORIES.values() for source in story]
    text = "\n".join((ROOT / source).read_text() for source in [*sources, "launch/environment.sh"])
    text = text.replace('"$venv/bin/python"', "python").replace("mcm_run ", "")
    for first in [*NOT_RUN, *DRY]:
        assert first in text or first.partition(" --")[0] in text, first


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
