"""The program on a run that is not trained: its records, its file, and what it says to bad input."""

import dataclasses
import datetime
import errno
import hashlib
import importlib.metadata
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mcm_jax import records
from mcm_jax.config.settings import Config
from mcm_jax.data.layout import DatasetInfo
from mcm_jax.evaluation import efficientnet, evaluator, protocol, scoring, unfinished
from mcm_jax.objectives.consistency import Consistency
from mcm_jax.system import sharding
from mcm_jax.system.errors import InputError
from tests import forks
from tests.evaluation.pixels import PixelExtractor, network
from tests.reporting import made_up

SIDE = 4


DATASET = DatasetInfo(
    dataset="openmoji",
    resolution=SIDE,
    class_names=("even", "odd"),
    num_examples={"train": 60, "test": 12},
    class_counts={"train": (30, 30), "test": (6, 6)},
    fingerprints={"train": "abc", "test": "def"},
    preprocessing="none",
    source="nothing",
    path=Path("/data"),
)


FEATURE_METRICS = tuple(name for name in protocol.METRICS if name not in records.CAPTION_SCORES)


class FakeRun:
    """What `runs.run.load_run` returns, with noise for samples; writes down what it was asked for."""

    objective, student_steps, checkpoint_step, seed, origin = "cd", (4,), 300, 17, None

    def __init__(self, workdir, parameters="ema", checkpoint_step=None, data_dir=None, asked=None):
        self.workdir, self.parameters = Path(workdir), parameters
        self.config = Config(seed=17, objective="cd", consistency=Consistency(self.student_steps))
        self.dataset = DATASET
        self.mesh = sharding.make_mesh(data=-1, fsdp=1)
        self.asked = [] if asked is None else asked
        self.low = 0 if parameters == "ema" else 100

    def sample(
        self,
        num,
        seed=0,
        first=0,
        progress=None,
        steps=None,
        sampler=None,
        noise_grid=None,
        x_var=None,
        guidance=None,
        rounding=None,
        caption_split=None,
    ):
        how = (steps, sampler, noise_grid, x_var, guidance, rounding)
        self.asked.append(("sample", self.low, num, seed, *how, first))
        images = [
            np.random.default_rng([seed, first + n]).integers(self.low, 256, (SIDE, SIDE, 3))
            for n in range(num)
        ]
        return np.array(images, np.uint8), np.zeros(num, np.int32)

    def sampling(self, steps, sampler, noise_grid, x_var, guidance, rounding):
        measured = x_var == "measured"
        return records.Sampling(
            steps=steps or 4,
            sampler=sampler or "ddim",
            noise_grid=noise_grid or "schedule",
            x_var=x_var,
            x_var_eta=0.75 if measured else None,
            x_var_images=1024 if measured else None,
            guidance=guidance or 0.0,
            rounding=rounding,
            network_calls=steps or 4,
        )

    def guide_origin(self, settings):
        return None

    def label_rule(self, caption_split=None):
        return "uniform"

    def untrained(self):
        run = FakeRun(self.workdir, asked=self.asked)
        run.low = 250
        return run

    def check_data(self):
        """The fake's data never changes."""

    def blocks(self, split):
        self.asked.append(("images", split))
        count = self.dataset.num_examples[split]
        images = np.random.default_rng(count).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
        yield images, np.zeros(count, np.int32)


class Loader:
    """`load_run`, remembering its runs."""

    def __init__(self):
        self.runs, self.calls = [], []

    def __call__(self, workdir, parameters="ema", checkpoint_step=None, data_dir=None):
        self.calls.append((Path(workdir).name, parameters, checkpoint_step, data_dir))
        self.runs.append(FakeRun(workdir, parameters))
        return self.runs[-1]


def pixels_for(asked):
    """Pixels in place of a network, which tells of itself as the network would."""
    if asked.distance != "fd_effnet_lite0":
        return PixelExtractor(asked)
    return PixelExtractor(dataclasses.replace(network(), description=asked.description))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(evaluator, "Extractor", pixels_for)


@pytest.fixture
def workdirs(tmp_path) -> tuple[Path, ...]:
    paths = (tmp_path / "teacher", tmp_path / "cd4")
    for path in paths:
        path.mkdir()
    return paths


@pytest.fixture
def options(tmp_path, workdirs) -> scoring.Options:
    return scoring.Options(workdirs=workdirs[:1], num=40, cache_dir=tmp_path / "cache", untrained_num=16)


def lines(workdir: Path) -> list[records.Result]:
    text = (workdir / "evaluation" / "results.jsonl").read_text()
    return [records.Result.from_json(json.loads(line)) for line in text.splitlines()]


def test_the_record_says_everything_that_the_number_depends_on(options, workdirs):
    (result,) = scoring.evaluate(options, Loader())
    assert lines(workdirs[0]) == [result]
    record = result.to_json()
    expected = {
        "workdir": "teacher",
        "objective": "cd",
        "dataset": "openmoji",
        "resolution": SIDE,
        "data_preprocessing": "none",
        "training_seed": 17,
        "origin": None,
        "guide_origin": None,
        "student_steps": 4,
        "trained_for": [],
        "checkpoint_step": 300,
        "parameters": "ema",
        "seed": 0,
        "label_rule": "uniform",
        "steps": 4,
        "sampler": "ddim",
        "guidance": 0.0,
        "guide": None,
        "guide_checkpoint": None,
        "noise_grid": "schedule",
        "x_var": None,
        "x_var_eta": None,
        "x_var_images": None,
        "clip": "last",
        "rounding": "nearest",
        "network_calls": 4,
        "num_samples": 40,
        "rank_deficient": True,
        "grid": "evaluation/samples_step300_ema_ddim4_seed0.png",
    }
    assert {name: record[name] for name in expected} == expected
    assert set(record) - set(expected) == {
        *(
            "metrics",
            "bounds",
            "features",
            "reference",
            "asked",
            "caption_scores",
            "sampling_seconds",
            "features_seconds",
        ),
        *("version", "checkpoint", "untrained_num"),
        *("created", "versions"),
    }
    assert list(record["metrics"]) == [
        "fd_effnet_lite0_40",
        "fd_effnet_lite0_12",
        "nearest_neighbour_distance",
    ]
    assert set(record["bounds"]) == {
        "mean_image_fd_effnet_lite0",
        "test_images_fd_effnet_lite0_12",
        "test_images_nearest_neighbour_distance",
        "untrained_network_fd_effnet_lite0_16",
    }
    assert record["features"] == {
        "network": "efficientnet-lite0",
        "sha256": efficientnet.load().sha256,
        "input_resolution": efficientnet.DEFAULT_INPUT_RESOLUTION,
    }
    assert record["reference"]["split"] == "train" and record["reference"]["count"] == 60
    assert datetime.datetime.fromisoformat(record["created"]).utcoffset() == datetime.timedelta(0)
    assert set(record["versions"]) == {"jax", "flax", "mcm_jax"}


INCEPTION = network((("pool", 30), ("spatial", 12), ("logits", 9)), distance="fid", sha256="beef")


@pytest.fixture
def inception(options, monkeypatch) -> scoring.Options:
    """Options with a stand-in for Inception's weights: pixels, of the same three kinds of features."""
    weights = SimpleNamespace(network=lambda: INCEPTION)
    monkeypatch.setattr(scoring.inception_weights, "load", lambda path: weights)
    return dataclasses.replace(options, features="inception")


def test_inceptions_features_give_fid_by_name(inception):
    (record,) = scoring.evaluate(inception, Loader())
    assert list(record.metrics) == ["fid_40", "fid_12", "sfid_40", "inception_score_40"]
    assert set(record.bounds) == {
        "mean_image_fid",
        "test_images_fid_12",
        "test_images_nearest_neighbour_distance",
        "untrained_network_fid_16",
    }
    assert record.features.to_json() == INCEPTION.description


@pytest.fixture
def dinov2(options, monkeypatch) -> scoring.Options:
    """Options with pixels in place of DINOv2's features."""
    stand_in = network((("pool", 30),), distance="fd_dinov2", sha256="d1f0")
    monkeypatch.setattr(scoring.dinov2, "network", {Path("dinov2-large"): stand_in}.__getitem__)
    return dataclasses.replace(options, features="dinov2", dinov2=Path("dinov2-large"))


def test_dinov2s_features_give_their_distance_by_name(dinov2, workdirs, tmp_path):
    path = tmp_path / "img64.pkl"
    moments = {"mu": np.full(30, 0.5), "sigma": np.eye(30) / 12}
    path.write_bytes(pickle.dumps({"fid": {"mu": np.zeros(2), "sigma": np.eye(2)}, "fd_dinov2": moments}))
    (record,) = scoring.evaluate(dataclasses.replace(dinov2, reference=path), Loader())
    assert list(record.metrics) == ["fd_dinov2_40"] and record.bounds == {}
    assert (record.features.network, record.features.sha256) == ("dinov2-vitl14", "d1f0")
    assert record.reference.file == "img64.pkl" and lines(workdirs[0]) == [record]
    # 50,000 samples are the number that others publish.
    assert records.with_count(records.DISTANCES[record.features.network], 50_000) == "fd_dinov2_50k"


def test_dinov2_compares_with_the_data_set_too(dinov2):
    """By default only with its distance."""
    (record,) = scoring.evaluate(dinov2, Loader())
    assert list(record.metrics) == ["fd_dinov2_40", "fd_dinov2_12"]
    metrics = ("frechet", "nearest")
    (record,) = scoring.evaluate(dataclasses.replace(dinov2, metrics=metrics), Loader())
    assert list(record.metrics) == ["fd_dinov2_40", "fd_dinov2_12", "nearest_neighbour_distance"]
    assert "mean_image_fd_dinov2" in record.bounds


def test_dinov2_without_its_weights_ends_the_program_with_2(tmp_path):
    (tmp_path / "run").mkdir()
    flags = [f"--workdir={tmp_path / 'run'}", "--features=dinov2", f"--cache_dir={tmp_path / 'cache'}"]
    for more, message in (
        ([], "--features=dinov2 needs its weights: add --dinov2=DIRECTORY"),
        (
            [f"--dinov2={tmp_path / 'none'}"],
            f"hf download facebook/dinov2-large config.json model.safetensors "
            f"--local-dir {tmp_path / 'none'}",
        ),
    ):
        done = forks.program("evaluate", *flags, *more)
        assert done.returncode == 2
        assert message in done.stderr and done.stderr.count("\n") == 1


def test_a_published_reference_takes_the_place_of_the_data_set(inception, tmp_path, capsys):
    path = tmp_path / "reference.npz"
    np.savez(path, mu=np.full(30, 0.5), sigma=np.eye(30) / 12)
    load = Loader()
    chosen = dataclasses.replace(inception, reference=path)
    (record,) = scoring.evaluate(chosen, load)
    # The file has no moments of spatial features.
    printed = capsys.readouterr().out
    assert "note: sfid is omitted: the reference has no moments of spatial features" in printed
    assert list(record.metrics) == ["fid_40", "inception_score_40"] and record.bounds == {}
    assert record.reference == records.Reference(
        file="reference.npz", sha256=hashlib.sha256(path.read_bytes()).hexdigest()
    )
    assert [call[0] for call in load.runs[0].asked] == ["sample"]
    assert "Frechet distance to reference.npz, lower is better" in printed


def test_without_weights_it_says_where_to_get_them(options, tmp_path):
    load = Loader()
    chosen = dataclasses.replace(options, features="inception", inception=tmp_path / "none")
    with pytest.raises(InputError, match=r"there are no Inception weights; get .*prepare --inception=FILE"):
        scoring.evaluate(chosen, load)
    assert not load.calls


def test_missing_metadata_of_the_package_lose_no_result(options, workdirs, monkeypatch):
    """As where the code lies on PYTHONPATH and is not installed."""

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    (record,) = scoring.evaluate(options, Loader())
    assert lines(workdirs[0]) == [record] and record.versions["mcm_jax"] == "unknown"


def test_the_grid_shows_the_first_samples(options, workdirs):
    (record,) = scoring.evaluate(options, Loader())
    grid = np.asarray(Image.open(workdirs[0] / record.grid))
    samples, _ = FakeRun("").sample(40)
    scale, pitch = 12, 12 * (SIDE + 1)
    for index in (0, 9, 39):
        top, left = (index // 8) * pitch, (index % 8) * pitch
        tile = grid[top : top + SIDE * scale : scale, left : left + SIDE * scale : scale]
        np.testing.assert_array_equal(tile, samples[index])


def test_flags_reach_the_sampler_in_blocks_that_make_one_stream(options, workdirs, monkeypatch):
    monkeypatch.setattr(evaluator, "_BLOCK", 16)
    load = Loader()
    changed = dataclasses.replace(
        options,
        seed=5,
        steps=(8,),
        sampler="addim",
        noise_grid="karras",
        x_var="measured",
        guidance=(0.5,),
        rounding="floor",
        checkpoint_step=(200,),
        data_dir="/data",
        untrained_num=0,
    )
    (parts,) = scoring.evaluate(changed, load)
    assert load.calls == [("teacher", "ema", 200, "/data")]
    samples = [call for call in load.runs[0].asked if call[0] == "sample"]
    expected = [
        ("sample", 0, num, 5, 8, "addim", "karras", "measured", 0.5, "floor", first)
        for num, first in ((16, 0), (16, 16), (8, 32))
    ]
    assert samples == expected
    monkeypatch.setattr(evaluator, "_BLOCK", 1000)
    (whole,) = scoring.evaluate(dataclasses.replace(changed, again=True), Loader())
    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-6)
    assert "untrained_network_fd_effnet_lite0_16" not in whole.bounds


def test_every_workdir_with_both_kinds_of_parameters(options, workdirs):
    load = Loader()
    results = scoring.evaluate(dataclasses.replace(options, workdirs=workdirs, parameters="both"), load)
    expected = [(workdir.name, kind) for workdir in workdirs for kind in ("ema", "raw")]
    assert [(record.workdir, record.parameters) for record in results] == expected
    assert [lines(workdir) for workdir in workdirs] == [results[:2], results[2:]]
    assert results[0].metrics != results[1].metrics
    assert len({record.reference.sha256 for record in results}) == 1
    grids = {(workdir.name, path.name) for workdir in workdirs for path in workdir.glob("evaluation/*.png")}
    assert len(grids) == 4
    # Every run is tried before the first is sampled, and loaded again for its turn.
    assert [call[:2] for call in load.calls] == 2 * expected
    loaded = [call for run in load.runs for call in run.asked if call[0] == "images"]
    assert sorted(loaded) == [("images", "test"), ("images", "train"), ("images", "train")]


def test_the_second_evaluation_computes_only_its_samples(options):
    scoring.evaluate(options, Loader())
    load = Loader()
    scoring.evaluate(dataclasses.replace(options, again=True), load)
    assert load.runs[0].asked == [("sample", 0, 40, 0, None, None, None, None, None, "nearest", 0)]


def test_results_from_before_they_named_their_rounding_still_count(options, workdirs):
    (result,) = scoring.evaluate(options, Loader())
    content = result.to_json()
    del content["rounding"]
    (workdirs[0] / "evaluation" / "results.jsonl").write_text(json.dumps(content))
    load = Loader()
    assert scoring.evaluate(options, load) == [result] and load.runs[0].asked == []


def test_results_are_added_and_never_lost(options, workdirs):
    path = workdirs[0] / "evaluation" / "results.jsonl"
    path.parent.mkdir()
    path.write_text('{"old": 1}\n{"cut off')
    scoring.evaluate(options, Loader())
    scoring.evaluate(dataclasses.replace(options, again=True), Loader())
    found = path.read_text().split("\n")
    assert found[:2] == ['{"old": 1}', '{"cut off'] and found[4] == "" and len(found) == 5
    assert json.loads(found[2])["metrics"] == json.loads(found[3])["metrics"]


def test_the_table_names_each_number(options, capsys):
    (record,) = scoring.evaluate(options, Loader())
    printed = capsys.readouterr().out
    for name, value in (record.metrics | record.bounds).items():
        (line,) = [line for line in printed.splitlines() if line.split()[:1] == [name]]
        assert f"{value:.3f}" in line and len(line.split()) > 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workdirs": (Path("/no/such/run"),)}, "/no/such/run"),
        ({"workdirs": ()}, "--workdir"),
        ({"num": 1}, "--num=1"),
        ({"steps": (4, 0)}, "--steps=0"),
        ({"sampler": "euler"}, "--sampler=euler.*ddim, addim"),
        ({"noise_grid": "edm"}, "--noise_grid=edm.*schedule, karras"),
        ({"rounding": "up"}, "--rounding=up.*nearest, floor"),
        ({"x_var": "none"}, "--x_var=none.*analytic, measured"),
        ({"guidance": (-1.0,)}, r"--guidance=-1.0: it must be 0 \(no guidance\) or a"),
        ({"guidance": (float("inf"),)}, r"--guidance=inf: it must be 0 \(no guidance\) or a"),
        ({"parameters": "best"}, "--parameters=best.*ema, raw, both"),
        ({"input_resolution": 8}, "input_resolution=8"),
        ({"features": "vgg"}, "--features=vgg is not one of efficientnet, inception, dinov2"),
        ({"metrics": ()}, "--metrics is empty; give some of frechet"),
        ({"inception": Path("x")}, "--inception applies only to --features=inception"),
        ({"allow_singular": True}, "--allow_singular applies only to --features=inception or dinov2"),
        ({"dinov2": Path("x")}, "--dinov2 applies only to --features=dinov2"),
        ({"features": "dinov2"}, "--features=dinov2 needs its weights: add --dinov2=DIRECTORY"),
        (
            {"features": "dinov2", "dinov2": Path("/no/where")},
            "--dinov2=/no/where: there is no config.json of a DINOv2; get its files: hf download",
        ),
        (
            {"features": "dinov2", "inception": Path("x")},
            "--inception applies only to --features=inception; add that",
        ),
        (
            {"features": "inception", "input_resolution": 128},
            "--input_resolution applies only to --features=efficientnet",
        ),
        ({"metrics": ("kid",)}, "--metrics=kid is defined only for Inception's features"),
        ({"cache_dir": Path("/dev/null/cache")}, "--cache_dir=/dev/null/cache"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_loaded(options, change, message, monkeypatch):
    monkeypatch.undo()  # The real extractor: it is the one that checks its resolution.
    load = Loader()
    with pytest.raises(InputError, match=message) as error:
        scoring.evaluate(dataclasses.replace(options, **change), load)
    assert "\n" not in str(error.value) and not load.calls


def test_a_bad_second_run_stops_before_the_first_is_sampled(options, workdirs):
    load = Loader()

    def second_is_bad(workdir, **kwargs):
        if Path(workdir).name == "cd4":
            raise InputError("cd4: there is no checkpoint")
        return load(workdir, **kwargs)

    with pytest.raises(InputError, match="no checkpoint"):
        scoring.evaluate(dataclasses.replace(options, workdirs=workdirs), second_is_bad)
    assert not load.runs[0].asked


def test_a_workdir_that_cannot_be_written_is_told_before_anything_is_sampled(options, workdirs):
    (workdirs[0] / "evaluation").write_text("in the way")
    load = Loader()
    with pytest.raises(InputError, match="cannot write there"):
        scoring.evaluate(options, load)
    assert not load.runs[0].asked


def test_a_directory_that_is_no_run_is_left_as_it_was(options, workdirs):
    def no_run(workdir, **_):
        raise InputError(f"{workdir} is not a run")

    with pytest.raises(InputError, match="not a run"):
        scoring.evaluate(options, no_run)
    assert not list(workdirs[0].iterdir())


def test_without_a_test_split_its_numbers_are_left_out(options):
    class NoTest(Loader):
        def __call__(self, *args, **kwargs):
            run = super().__call__(*args, **kwargs)
            run.dataset = dataclasses.replace(
                DATASET, fingerprints={"train": "abc"}, num_examples={"train": 60}
            )
            return run

    (record,) = scoring.evaluate(options, NoTest())
    assert set(record.bounds) == {"mean_image_fd_effnet_lite0", "untrained_network_fd_effnet_lite0_16"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--workdir=x", "--num=1"], "num"), (["--workdir=x", "--sampler=euler"], "euler"), ([], "workdir")],
)
def test_the_program_exits_with_2_on_bad_flags(arguments, message):
    done = forks.program("evaluate", *arguments)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_files_tell_unusual_samplers_apart():
    changes = {"sampler": "addim", "noise_grid": "karras", "guidance": 0.5}
    changes |= {"x_var": "measured", "x_var_eta": 0.75, "x_var_images": 1024}
    usual, unusual, floor = (
        records.Measurement.from_json(made_up.record(checkpoint_step=300, seed=1, **each))
        for each in ({}, changes, {"rounding": "floor"})
    )
    assert evaluator.grid_name(usual) == "samples_step300_ema_ddim4_seed1.png"
    assert evaluator.grid_name(unusual) == "samples_step300_ema_addim4_karras_measured_g0.5_seed1.png"
    assert evaluator.grid_name(floor) == "samples_step300_ema_ddim4_floor_seed1.png"


def test_every_combination_in_one_command(options, workdirs):
    load = Loader()
    several = dataclasses.replace(
        options,
        workdirs=workdirs,
        steps=(1, 2),
        guidance=(0.0, 0.5),
        checkpoint_step=(100, 200),
        untrained_num=0,
    )
    results = scoring.evaluate(several, load)
    found = [(one.workdir, one.sampling.steps, one.sampling.guidance) for one in results]
    expected = [
        (name.name, steps, g) for name in workdirs for _ in (100, 200) for steps in (1, 2) for g in (0.0, 0.5)
    ]
    assert found == expected
    assert [call[2] for call in load.calls] == 2 * [100, 200, 100, 200]


def test_an_interrupted_command_goes_on_where_it_was(options, workdirs):
    """What stands in the file is taken from there, what was cut off is measured."""
    several = dataclasses.replace(options, steps=(1, 2), untrained_num=0)
    first, second = scoring.evaluate(several, Loader())
    path = workdirs[0] / "evaluation" / "results.jsonl"
    path.write_text(path.read_text()[:-30])
    load = Loader()
    again = scoring.evaluate(several, load)
    assert again[0] == first and again[1].metrics == second.metrics
    assert [call[4] for call in load.runs[0].asked if call[0] == "sample"] == [2]
    load = Loader()
    assert scoring.evaluate(several, load) == again and load.runs[0].asked == []


@pytest.fixture
def stop_at(monkeypatch):
    """Blocks of ten samples, all kept; (n): an interruption before sample n; returns what is sampled."""
    monkeypatch.setattr(evaluator, "_BLOCK", 10)
    monkeypatch.setattr(unfinished, "EVERY_SECONDS", -1.0)
    sample, asked = FakeRun.sample, []

    def set_stop(at):
        def interrupted(self, count, *, first=0, **how):
            if first == at:
                raise KeyboardInterrupt
            asked.append(first)
            return sample(self, count, first=first, **how)

        asked.clear()
        monkeypatch.setattr(FakeRun, "sample", interrupted)
        return asked

    return set_stop


@pytest.fixture
def interrupt(stop_at):
    """Evaluates with these options to sample 20; returns what is sampled from then on."""

    def run(options):
        stop_at(20)
        with pytest.raises(KeyboardInterrupt):
            scoring.evaluate(options, Loader())
        return stop_at(None)

    return run


def test_an_interrupted_evaluation_goes_on_where_it_was(inception, workdirs, interrupt, capsys):
    """To the same numbers to the last bit, of every metric, and the same grid."""
    options = dataclasses.replace(inception, metrics=FEATURE_METRICS, untrained_num=0)
    (expected,) = scoring.evaluate(options, Loader())
    grid = (workdirs[0] / expected.grid).read_bytes()
    (workdirs[0] / "evaluation/results.jsonl").unlink()
    asked = interrupt(options)
    (found,) = scoring.evaluate(options, Loader())
    assert asked == [20, 30]
    assert "continuing an interrupted evaluation after 20 samples" in capsys.readouterr().out
    assert found.metrics == expected.metrics and len(found.metrics) >= 8
    assert (workdirs[0] / found.grid).read_bytes() == grid
    assert not list((workdirs[0] / "evaluation").glob("unfinished*"))


def test_again_begins_anew(options, interrupt):
    options = dataclasses.replace(options, untrained_num=0)
    asked = interrupt(options)
    scoring.evaluate(dataclasses.replace(options, again=True), Loader())
    assert asked == [0, 10, 20, 30]


def test_what_was_kept_is_of_one_count_beside_the_test_images(options, interrupt):
    """A reference that is given brings no test images, though it be the run's own: other sums."""
    options = dataclasses.replace(options, untrained_num=0)
    asked = interrupt(options)
    load = Loader()

    def without_test_images(*arguments, **how):
        run = load(*arguments, **how)
        run.dataset = dataclasses.replace(run.dataset, num_examples={"train": 60})
        return run

    scoring.evaluate(options, without_test_images)
    assert asked == [0, 10, 20, 30]


def test_a_disk_that_has_no_room_for_what_is_kept(options, stop_at, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(unfinished, "write_whole", full)
    stop_at(None)
    (record,) = scoring.evaluate(dataclasses.replace(options, untrained_num=0), Loader())
    assert record.metrics and "an interrupted computation would start over" in capsys.readouterr().err


def test_a_damaged_unfinished_evaluation_begins_anew(options, workdirs, interrupt, capsys):
    options = dataclasses.replace(options, untrained_num=0)
    asked = interrupt(options)
    (kept,) = (workdirs[0] / "evaluation").glob("unfinished*")
    kept.write_bytes(kept.read_bytes()[:-50])
    scoring.evaluate(options, Loader())
    assert asked == [0, 10, 20, 30] and "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        *({"num": 41}, {"seed": 1}, {"steps": (3,)}, {"guidance": (0.5,)}, {"rounding": "floor"}),
        *({"metrics": ("frechet",)}, {"parameters": "raw"}, {"input_resolution": 48}),
    ],
)
def test_other_inputs_are_another_result(options, change):
    scoring.evaluate(options, Loader())
    load = Loader()
    scoring.evaluate(dataclasses.replace(options, **change), load)
    assert [call for call in load.runs[0].asked if call[0] == "sample"]


def test_another_checkpoint_of_the_same_step_is_another_result(options, workdirs):
    """As after training anew in the same place, whatever the files' dates say."""
    note = workdirs[0] / "checkpoints" / "300" / "_CHECKPOINT_METADATA"
    note.parent.mkdir(parents=True)
    for content, measured in (("1", True), ("2", True), ("2", False), ("1", False)):
        note.write_text(content)
        load = Loader()
        scoring.evaluate(options, load)
        assert bool(load.runs[0].asked) == measured


def test_the_order_in_which_metrics_are_asked_for_does_not_matter(inception):
    scoring.evaluate(dataclasses.replace(inception, metrics=("kid", "frechet")), Loader())
    load = Loader()
    scoring.evaluate(dataclasses.replace(inception, metrics=("frechet", "kid", "kid")), load)
    assert load.runs[0].asked == []


def test_a_metric_that_the_reference_cannot_give_is_told_before_sampling(inception, tmp_path):
    """Asked for it is a mistake; of the usual ones it is left out."""
    np.savez(tmp_path / "reference.npz", mu=np.full(30, 0.5), sigma=np.eye(30) / 12)
    chosen = dataclasses.replace(inception, reference=tmp_path / "reference.npz")
    for metric in ("sfid", "kid", "class_fid", "nearest"):
        load = Loader()
        with pytest.raises(InputError, match=f"--metrics={metric}: the reference"):
            scoring.evaluate(dataclasses.replace(chosen, metrics=("frechet", metric)), load)
        assert load.runs[0].asked == []
    (record,) = scoring.evaluate(chosen, Loader())
    assert list(record.metrics) == ["fid_40", "inception_score_40"]


@pytest.mark.parametrize("flag", ["--steps=1,x", "--guidance=a", "--checkpoint_step=1.5"])
def test_lists_of_numbers(flag):
    done = forks.program("evaluate", "--workdir=x", flag)
    assert done.returncode == 2 and f"{flag}: must be numbers separated by commas" in done.stderr


def of_images(options, images, **changes):
    """The options for images that are there already: nothing of sampling is asked for."""
    default = scoring.Options
    sampling = {"num": default.num, "untrained_num": default.untrained_num}
    return dataclasses.replace(options, **{"workdirs": (), "images": images, **sampling, **changes})


def write_npz(path, count=40, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    np.savez(path, images, np.arange(count) % 3)
    return images


def test_images_of_another_program_against_a_published_file(inception, tmp_path, capsys):
    write_npz(tmp_path / "samples.npz")
    np.savez(tmp_path / "reference.npz", mu=np.full(30, 0.5), sigma=np.eye(30) / 12)
    chosen = of_images(
        inception,
        tmp_path / "samples.npz",
        reference=tmp_path / "reference.npz",
        results=tmp_path / "results.jsonl",
    )
    record = scoring.evaluate_images(chosen)
    assert record.image_size == (SIDE, SIDE) and record.rounding is None
    assert records.ImagesResult.from_json(json.loads((tmp_path / "results.jsonl").read_text())) == record
    assert list(record.metrics) == ["fid_40", "inception_score_40"] and record.images == "samples.npz"
    assert record.reference.file == "reference.npz" and record.num_samples == 40
    printed = capsys.readouterr().out
    assert "\nsamples.npz\n  fid_40" in printed and "Frechet distance to reference.npz" in printed


@pytest.fixture(scope="module")
def tiny_reference(tiny_data) -> Path:
    from mcm_jax.data import layout

    return layout.dataset_dir(tiny_data, dataset="folder/tiny", resolution=8)


@pytest.fixture(scope="module")
def tiny_images(tiny_data):
    """(images, labels) of that data set."""
    from mcm_jax.data import pipeline

    source = pipeline.open_split(data_dir=tiny_data, dataset="folder/tiny", resolution=8, split="train")
    return pipeline.load_arrays(source)


def test_images_against_a_prepared_data_set(inception, tmp_path, tiny_reference, tiny_images, capsys):
    """The data set's own images are at distance zero from it."""
    images, labels = tiny_images
    np.savez(tmp_path / "samples.npz", images, labels)
    chosen = of_images(
        inception,
        tmp_path / "samples.npz",
        reference=tiny_reference,
        metrics=FEATURE_METRICS,
    )
    record = scoring.evaluate_images(chosen)
    metrics = {name.rsplit("_", 1)[0]: value for name, value in record.metrics.items()}
    assert metrics["fid"] == pytest.approx(0, abs=1e-6) and metrics["sfid"] == pytest.approx(0, abs=1e-6)
    assert metrics["class_fid"] == pytest.approx(0, abs=1e-6)
    assert (metrics["precision"], metrics["recall"]) == (1.0, 1.0)
    assert record.reference.split == "train" and record.reference.count == len(images)
    assert "note: class" not in capsys.readouterr().out


def test_images_against_images(inception, tmp_path, tiny_images):
    """A reference of images alone, with labels: its moments are computed here."""
    images, labels = tiny_images
    np.savez(tmp_path / "reference.npz", images, labels)
    np.savez(tmp_path / "samples.npz", images[::-1], labels[::-1])
    chosen = of_images(
        inception,
        tmp_path / "samples.npz",
        reference=tmp_path / "reference.npz",
        metrics=("frechet", "class_fid"),
    )
    record = scoring.evaluate_images(chosen)
    assert list(record.metrics.values()) == pytest.approx([0, 0], abs=1e-6)
    assert record.reference.file == "reference.npz" and record.reference.count == len(images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda images, labels: (images.repeat(2, 1).repeat(2, 2), labels),
            "images of 16x16 pixels but --ref",
        ),
        (
            lambda images, labels: (images[:, :4, :4], labels),
            "images of 4x4 pixels but --reference has images of 8",
        ),
        (lambda images, labels: (images.repeat(2, 2), labels), "images of 16x8 pixels"),
        (lambda images, labels: (images // 128, labels), "bytes of 0 and 1 only"),
        (
            lambda images, labels: (images, labels + 1),
            "an image of class 2, but --reference has only classes 0 to 1",
        ),
        (lambda images, labels: (images, labels + 100), "an image of class 10[01], but"),
    ],
)
def test_images_that_do_not_fit_the_reference(
    change, message, inception, tmp_path, tiny_reference, tiny_images
):
    """Each was scored, or its class_fid left out, without a word."""
    np.savez(tmp_path / "samples.npz", *change(*tiny_images))
    metrics = ("frechet", "class_fid")
    with pytest.raises(InputError, match=message) as error:
        scoring.evaluate_images(
            of_images(inception, tmp_path / "samples.npz", reference=tiny_reference, metrics=metrics)
        )
    assert "\n" not in str(error.value) and not list(inception.cache_dir.glob("*"))


@pytest.mark.parametrize(
    ("resolution", "class_names", "message"),
    [
        (SIDE, ("even", "odd"), "teacher has images of 4x4 pixels but --reference has images of 8x8 pixels"),
        (8, ("odd", "even"), "class 0 is 'odd' for --workdir=.*teacher but 'even' for --reference"),
    ],
)
def test_runs_that_do_not_fit_the_reference(resolution, class_names, message, inception, tiny_reference):
    load = Loader()

    def other(*arguments, **how):
        run = load(*arguments, **how)
        run.dataset = dataclasses.replace(run.dataset, resolution=resolution, class_names=class_names)
        return run

    chosen = dataclasses.replace(inception, reference=tiny_reference, metrics=("frechet", "class_fid"))
    with pytest.raises(InputError, match=message):
        scoring.evaluate(chosen, other)
    assert load.runs[0].asked == [] and not list(inception.cache_dir.glob("*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": None}, "needs a reference: add --reference=FILE with statistics, or DIR"),
        ({"reference": Path("DIR")}, "is not a prepared data set"),
        ({"metrics": ("class_fid",)}, "class_fid: the reference has no features of single images"),
        ({"steps": (1,)}, "--steps applies only when runs are sampled; remove it when using --images"),
        ({"seed": 1}, "--seed applies only when"),
        ({"num": 7}, "--num applies only when"),
        (
            {"images": Path("BARE"), "metrics": ("kid",)},
            "--metrics=kid needs at least 2 images, but there are 1",
        ),
        ({"results": Path("/dev/null/x")}, "the directory of --results=/dev/null: cannot write there"),
        ({"images": Path("/no/where")}, "there is no such file or folder"),
    ],
)
def test_bad_input_for_images(inception, tmp_path, change, message):
    write_npz(tmp_path / "samples.npz")
    np.savez(tmp_path / "bare.npz", write_npz(tmp_path / "other.npz")[:1])
    np.savez(tmp_path / "reference.npz", mu=np.full(30, 0.5), sigma=np.eye(30) / 12)
    chosen = {"images": tmp_path / "samples.npz", "reference": tmp_path / "reference.npz"}
    places = {Path("DIR"): tmp_path, Path("BARE"): tmp_path / "bare.npz"}
    change = {
        name: places.get(value, value) if isinstance(value, Path) else value for name, value in change.items()
    }
    with pytest.raises(InputError, match=message) as error:
        scoring.evaluate_images(of_images(inception, **(chosen | change)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags", [[], ["--workdir=x", "--images=y"]])
def test_runs_or_images(flags):
    done = forks.program("evaluate", *flags)
    assert done.returncode == 2 and "give either --workdir=DIR of a run or --images=PATH" in done.stderr
