"""All programs with every path in a bucket; processes that train together share nothing else."""

import json

import jax
import numpy as np
import pytest

from mcm_jax.runs import trainer
from mcm_jax.runs.run import load_run
from mcm_jax.system import files, paths
from tests import forks, members, tiny
from tests.evaluation import pixels

CONFIG = """
from tests import tiny

def get_config(row):
    objective, *teacher = row.split(",")
    config = tiny.config("gs://bucket/thread/data", objective, *teacher)
    # Where a gradient is zero but for its last bits, Adam would make an update of them.
    config.optimizer.eps = 1e-3
    config.training.update(num_steps=12, checkpoint_every_steps=4, sample_every_steps=12 if teacher else 0)
    return config
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A file with the tiny config, which `--config` can't take from a bucket."""
    path = tmp_path_factory.mktemp("config") / "tiny_config.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def local_data(tmp_path_factory):
    return tiny.prepare_folder(tmp_path_factory.mktemp("local"))


@pytest.fixture
def place(bucket, local_data, tmp_path, monkeypatch):
    """The bucket, with the images in it; the current directory is empty."""
    for image in (local_data.parent / "images").rglob("*.png"):
        name = image.relative_to(local_data.parent)
        files.write_whole(bucket.path / "thread" / str(name), image.read_bytes())
    for name, value in {**bucket.variables(), "MCM_LOCAL_DATA": str(tmp_path / "copies")}.items():
        monkeypatch.setenv(name, value)  # Without the proxy, which takes longer than the server.
    return str(bucket.path / "thread")


def succeed(program, *arguments):
    before = pixels.IN_A_PROGRAM if program == "evaluate" else ""
    result = forks.program(program, *arguments, before=before)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def train_together(config, row, workdir, *, directory, stop=None, at=None):
    """Trains in two processes; `stop` sends signals once update `at` is reported."""
    arguments = [f"--config={config}:{row}", f"--workdir={workdir}"]
    code = members._PROGRAM.replace("PROGRAM", "train").replace("ARGUMENTS", repr(json.dumps(arguments)))
    with members.Members(code, count=2, devices=1, directory=directory) as started:
        if stop is not None:
            started.wait_for(f"step {at}/12")
            stop(started.processes)
        return started.codes(), started.output(0)


def parameters(workdir):
    return load_run(workdir).params


def test_the_whole_thread_in_a_bucket(place, config, local_data, tmp_path):
    out = succeed(
        "prepare",
        *("--dataset=folder", "--name=tiny", "--resolution=8"),
        *(f"--manual_dir={place}/images", f"--data_dir={place}/data"),
    )
    assert f"--config.data.data_dir={place}/data" in out
    teacher, student = f"{place}/runs/teacher", f"{place}/runs/cd"

    def kill_both(processes):
        for process in processes:
            process.kill()

    codes, _ = train_together(config, "diffusion", teacher, directory=tmp_path / "1", stop=kill_both, at=9)
    assert codes == [-9, -9]
    codes, out = train_together(config, "diffusion", teacher, directory=tmp_path / "2")
    assert codes == [0, 0] and "continuing at update" in out
    undisturbed = tiny.config(local_data)
    undisturbed.training.num_steps = 12
    undisturbed.optimizer.eps = 1e-3
    assert trainer.train(undisturbed, tmp_path / "undisturbed")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        parameters(teacher),
        parameters(tmp_path / "undisturbed"),
    )

    succeed("train", f"--config={config}:cd,{teacher}", f"--workdir={student}")
    cache = f"--cache_dir={place}/references"
    how = ("--num=16", "--untrained_num=8", cache)
    codes, started = members.program(
        "evaluate",
        f"--workdir={teacher},{student}",
        *how,
        directory=tmp_path / "3",
        before=pixels.IN_A_PROGRAM,
    )
    assert codes == [0, 0], started.everything()
    assert "measured before" in succeed("evaluate", f"--workdir={student}", *how)
    succeed("sample", f"--workdir={student}", "--num=16", f"--out={place}/samples.npz")
    succeed("sample", f"--workdir={student}", "--num=16", f"--out={place}/grid.png")
    succeed("export", f"--workdir={student}", f"--out={place}/model", "--format=safetensors")
    jax.tree.map(np.testing.assert_array_equal, parameters(f"{place}/model"), parameters(student))
    prepared = f"--reference={place}/data/folder/tiny_8/1.0.0"
    scored = [f"--images={place}/samples.npz", f"--results={place}/scores.jsonl"]
    succeed("evaluate", *scored, prepared, cache)
    assert len(list(paths.as_path(f"{place}/scores.jsonl").iterdir())) == 1
    succeed("report", f"--runs={place}/runs")
    succeed("report", f"--runs={place}/runs", "--tables")
    names = {name.rpartition("/")[2] for name in files.names_below(paths.as_path(f"{place}/runs"))}
    assert {"report.html", "report.md", "tables.md", "run.json", "step_0000012.png"} <= names
    # Nothing was written to a local directory named after the bucket.
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith("gs:")]


def test_an_interrupted_save_is_no_checkpoint_and_damage_is_set_aside(bucket, local_data, capsys):
    workdir = bucket.path / "damage" / "run"
    config = tiny.config(local_data)
    config.training.update(num_steps=12, checkpoint_every_steps=4, keep_checkpoints=9)
    assert trainer.train(config, workdir)
    expected = parameters(workdir)
    checkpoints = workdir / "checkpoints"
    # An interrupted save lacks its mark.
    (checkpoints / "12" / "commit_success.txt").unlink()
    damaged = checkpoints / "8" / "params"
    arrays = [damaged / name[1:] for name in files.names_below(damaged) if "/d/" in name]
    largest = max(arrays, key=files.size)
    content = bytearray(files.read_bytes(largest))
    content[len(content) // 2] ^= 16
    files.write_whole(largest, bytes(content))
    capsys.readouterr()
    assert trainer.train(config, workdir)
    out = capsys.readouterr().out
    assert "checkpoint 8 is damaged" in out and "continuing at update 4" in out
    jax.tree.map(np.testing.assert_array_equal, parameters(workdir), expected)
    place_of_damaged = workdir / "damaged_checkpoints" / "8" / largest.relative_to(checkpoints / "8")
    assert files.read_bytes(place_of_damaged) == content
