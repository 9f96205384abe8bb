"""The program: measures what is missing, reports what there is, refuses what it can't read."""

import dataclasses
import functools

import pytest

from mcm_jax.bench import findings, images, mixture, openmoji, runner
from mcm_jax.config import validation
from mcm_jax.config.settings import stage_configs
from mcm_jax.system.errors import InputError
from tests.test_programs import call

TINY = mixture.Problem(
    "mixture2d", dimension=2, width=8, blocks=1, diffusion_updates=2, student_updates=2, batch_size=8
)


@pytest.fixture
def tiny(monkeypatch):
    """Two-dimensional cells of two updates, and only the finding on samplers."""

    class Fewer(mixture.Problem):
        def findings(self):
            return tuple(f for f in super().findings() if f.number == 4)

    problem = Fewer(**dataclasses.asdict(TINY))
    monkeypatch.setattr(mixture, "NUM_SAMPLES", 50)
    monkeypatch.setattr(
        runner, "_bench", lambda *_, **__: (problem, functools.partial(mixture.Bench, problem))
    )


def test_what_is_stored_is_not_measured_again(tiny, tmp_path, capsys):
    text = runner.run(tmp_path, problems=["mixture2d"], seeds=2)
    assert "| 4. aDDIM beats DDIM as a sampler" in text and "not measured" not in text
    assert (tmp_path / "findings.md").read_text() == text
    assert (tmp_path / "findings.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 6
    capsys.readouterr()
    assert runner.run(tmp_path, problems=["mixture2d"], seeds=2) == text
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(lines)
    assert capsys.readouterr().out == ""


def test_the_report_alone_measures_nothing(tiny, tmp_path):
    with pytest.raises(InputError, match=r"has no results\.jsonl to report"):
        runner.run(tmp_path, problems=["mixture2d"], seeds=2, report_only=True)
    (tmp_path / "results.jsonl").write_text("")
    text = runner.run(tmp_path, problems=["mixture2d"], seeds=2, report_only=True)
    assert "not measured" in text and (tmp_path / "results.jsonl").read_text() == ""


@pytest.mark.parametrize("system", ["cd", "ct", "progressive", "diffusion"])
def test_every_system_on_a_mixture(system, monkeypatch):
    """Trained from the diffusion model of its seed; CT also says how far it went from it."""
    from mcm_jax.bench.cells import Cell

    monkeypatch.setattr(mixture, "NUM_SAMPLES", 50)
    bench = mixture.Bench(dataclasses.replace(TINY, progressive_first=4))
    values = [bench(Cell("mixture2d", system, 2, seed))["distance"] for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]
    assert ("from_diffusion" in bench(Cell("mixture2d", system, 2, 0))) == (system == "ct")


def test_bad_input_is_one_line(tmp_path):
    for arguments, message in (
        (["--problems=imagenet"], "imagenet is not one of mixture, mixture2d, openmoji"),
        (["--seeds=1"], "seeds"),
        (["--problems="], "--problems is empty"),
        (["--report_only", f"--out={tmp_path / 'none'}"], "has no results.jsonl to report"),
        ([f"--out={tmp_path / 'file' / 'x'}"], "cannot write there"),
    ):
        (tmp_path / "file").write_text("")
        result = call("findings", *arguments)
        assert result.returncode == 2 and message in result.stderr, result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


def test_more_than_one_seed(tmp_path):
    with pytest.raises(InputError, match="a standard error needs at least 2"):
        runner.run(tmp_path, seeds=1)


@pytest.mark.parametrize("problem", [openmoji.OPENMOJI, openmoji.QUICK])
def test_every_openmoji_cell_is_looked_for_where_it_is_trained(problem, tmp_path, monkeypatch):
    """In particular a progressive distillation of one stage, which has no directory for it."""
    monkeypatch.setattr(images.preparation, "prepare", lambda *_, **__: None)
    bench = openmoji.Bench(problem, tmp_path)
    for cell in findings.cells_of(problem.findings(), "openmoji", [0]):
        config = validation.validate(bench.config(cell))
        stages = stage_configs(config, bench.root(cell))
        assert bench.workdir(cell) == stages[-1][0]
        expected = () if cell.system == "teacher" else (cell.steps,)
        assert stages[-1][1].student_steps == expected
