"""The figure of prompts: one row for each run, from the same prompts and noise."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mcm_jax.records import Sampling
from mcm_jax.reporting import prompts_figure
from mcm_jax.runs import run as runs
from mcm_jax.system.errors import InputError

RED, BLUE = (255, 0, 0), (0, 0, 255)


class FakeRun:
    """Draws images of one color."""

    def __init__(self, workdir, asked):
        self.color = RED if workdir.name == "red" else BLUE
        self.objective = "diffusion" if workdir.name == "red" else "cd"
        self.asked = asked
        self.mesh = SimpleNamespace(size=2)
        self.config = SimpleNamespace(sampling=SimpleNamespace(batch_per_device=64))

    def text_encoder(self, directory):
        """A fake has none."""

    def sample(self, num, **how):
        self.asked.append(how)
        return np.full((num, 16, 16, 3), self.color, np.uint8), np.zeros(num, np.int32)

    def sampling(self):
        guidance = 1.0 if self.objective == "diffusion" else 0.0
        return Sampling(steps=4, sampler="ddim", guidance=guidance, network_calls=4)


def test_a_row_for_each_run(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(runs, "load_run", lambda workdir: FakeRun(workdir, asked))
    (tmp_path / "prompts.txt").write_text("a cat\n\nanother cat\n")
    text = prompts_figure.prompts_figure(
        [tmp_path / "red", tmp_path / "blue"], tmp_path / "prompts.txt", tmp_path / "out.png", seed=3
    )
    first, second = text.splitlines()
    assert first.startswith("red: teacher, 4 steps of ddim, guidance 1, ") and first.endswith(" s an image")
    assert second.startswith("blue: student, 4 steps of ddim, ")
    assert asked == [{"seed": 3, "prompts": ["a cat", "", "another cat"], "batch_per_device": 2}] * 4
    with Image.open(io.BytesIO((tmp_path / "out.png").read_bytes())) as image:
        pixels = np.asarray(image.convert("RGB"))
    rows = [np.flatnonzero((pixels == color).all(axis=2).any(axis=1)) for color in (RED, BLUE)]
    assert rows[0].size and rows[1].size and rows[0].max() < rows[1].min()


def test_bad_input_before_any_sampling(teacher, tmp_path):
    (tmp_path / "many.txt").write_text("cat\n" * 17)
    (tmp_path / "one.txt").write_text("cat\n")
    for name, out, message in (
        ("many.txt", "out.png", "has 17 lines, and the figure has room for 16"),
        ("one.txt", "out.pdf", "must end in .png"),
        ("one.txt", "out.png", "conditioned on class labels"),
    ):
        with pytest.raises(InputError, match=message):
            prompts_figure.prompts_figure([teacher], tmp_path / name, tmp_path / out)
    assert not (tmp_path / "out.png").exists()
