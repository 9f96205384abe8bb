"""The page of `report --demo`: its pictures are samples, and a browser shows the chosen ones."""

import base64
import dataclasses
import io
import json
import re
import shutil
import subprocess
import urllib.parse

import numpy as np
import pytest
from PIL import Image

from mcm_jax.data.layout import Encoding
from mcm_jax.reporting import demo
from mcm_jax.runs.run import load_run
from mcm_jax.system.errors import InputError
from tests import tiny

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ENCODING = Encoding(
    encoder="minilm",
    encoder_sha256="0",
    length=2,
    width=2,
    pooled_width=2,
    num_captions=1,
    captions_sha256="0",
    data="0",
)
# A reader's choices, by the keyboard or the mouse, and what the page says after each.
CHOICES = """<script>
for (const [id, value] of [["run", "teacher: Teacher"], ["steps", 1], ["noise", "noise 2"]]) {
  document.getElementById(id).value = value;
  document.getElementById(id).dispatchEvent(new Event("input", { bubbles: true }));
  document.body.append(`[${document.getElementById("counted").textContent}]`);
}
document.body.append(`[${location.hash}]`);
</script>"""
STEPS = {"student": (1, 2), "teacher": (1, 4)}


@pytest.fixture(scope="module")
def runs(tiny_data, tmp_path_factory):
    """A teacher, and a student of 1 and 2 steps whose network takes the end of each."""
    runs = tmp_path_factory.mktemp("demo") / "runs"
    teacher = tiny.made_up_run(tiny.config(tiny_data), runs / "teacher")
    config = tiny.config(tiny_data, "cd", teacher)
    config.consistency.student_steps = (1, 2)
    tiny.made_up_run(config, runs / "student")
    # As of another program.
    (runs / "encoder").mkdir()
    (runs / "encoder" / "config.json").write_text("{}")
    return runs


@pytest.fixture(scope="module")
def page(runs):
    """The file; the teacher is sampled with fewer numbers of steps, to compile less."""
    out = runs.parent / "demo.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "_STEPS", (1, 4))
        lines = demo.write_demo(runs, out, seed=3).splitlines()
    assert [line.rpartition(":")[0] for line in lines] == [
        "student: CD, 1, 2 steps",
        "teacher: Teacher, 1, 4 steps",
    ]
    return out


@pytest.fixture(scope="module")
def content(page):
    found = re.search(r'<script type="application/json" id="content">(.*)</script>', page.read_text())
    assert found is not None
    return json.loads(found[1])


def cells(sheet):
    """[class, noise, step, height, width, 3]."""
    png = base64.b64decode(sheet["png"].removeprefix("data:image/png;base64,"))
    pixels = np.asarray(Image.open(io.BytesIO(png), formats=["PNG"]))
    return pixels.reshape(2, 4, 8, sheet["steps"], 8, 3).swapaxes(2, 3)


def test_the_pictures_are_the_samples_of_the_runs(runs, content):
    assert [run["name"] for run in content["runs"]] == ["student", "teacher"]
    for shown in content["runs"]:
        run = load_run(runs / shown["name"])
        assert tuple(sheet["steps"] for sheet in shown["sheets"]) == STEPS[shown["name"]]
        for sheet in shown["sheets"]:
            found = cells(sheet)
            for label in (0, 1):
                labels = np.full(4, label, np.int32)
                expected, _ = run.sample(4, seed=3, labels=labels, steps=sheet["steps"])
                # As in tests/runs/test_run.py: the last bits of XLA's results move few pixels by one level.
                difference = np.abs(found[label, :, -1].astype(int) - expected)
                assert difference.max() <= 1 and np.mean(difference > 0) <= 0.01
            # The trajectories differ by class, noise and step, and are not all black and white.
            flat = found.reshape(-1, 8 * 8 * 3)
            assert len(np.unique(flat, axis=0)) == len(flat)
            assert np.mean((flat > 0) & (flat < 255)) > 0.3


def test_all_can_be_chosen_by_labelled_controls(page):
    text = page.read_text()
    for control in ("run", "steps", "class", "noise"):
        assert text.count(f'<label for="{control}">') == text.count(f' id="{control}"') == 1
    assert re.findall("<option>(.*?)</option>", text) == [
        *("student: CD", "teacher: Teacher", "even", "odd"),
        *(f"noise {n}" for n in range(4)),
    ]
    assert "folder/tiny at 8x8" in text and "sampling seed 3" in text
    assert '"about": "4 steps of addim, 4 network calls, ema parameters after 4 updates"' in text


def test_nothing_from_outside(page):
    without_pictures = re.sub(r"base64,[A-Za-z0-9+/=]*", "", page.read_text())
    for outside in ("http:", "https:", "url(", "@import", "fetch(", "import(", " src=", "<link"):
        assert outside not in without_pictures


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed; on Debian: apt install chromium")
def test_a_browser_shows_what_is_chosen(page, content, tmp_path):
    def browse(page, *arguments, **chosen):
        # Chromium's sandbox does not work for root.
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
        address = f"{page.as_uri()}#{urllib.parse.urlencode(chosen)}"
        command = [CHROMIUM, *options, *arguments, address]
        return subprocess.run(command, capture_output=True, timeout=60, check=True).stdout.decode()

    with_choices, screenshot = tmp_path / "choices.html", tmp_path / "page.png"
    # The page's policy allows no other script.
    without_policy = page.read_text().replace("Content-Security-Policy", "")
    with_choices.write_text(without_policy.replace("</body>", f"{CHOICES}</body>"))
    shown = browse(with_choices, "--dump-dom", run="student", steps=2, **{"class": 1})
    shown = re.sub(r"base64,[A-Za-z0-9+/=]*", "", shown)
    # The teacher cannot take 2 steps; 1 and 4 are equally near.
    assert shown[shown.rindex("</script>") :].startswith(
        "</script>[1 step; this run has 1, 4][4 steps; this run has 1, 4][4 steps; this run has 1, 4]"
        "[#steps=4&amp;run=teacher&amp;class=1&amp;noise=2]"
    )
    trajectory = re.findall(r'<li><span class="frame"><img [^>]*alt="(.*?)" style="(.*?)">', shown)
    assert [alt for alt, _ in trajectory] == [f"Prediction in step {i} of 4" for i in (1, 2, 3, 4)]
    # Class 1 and noise 2 are in row 6 of 8.
    for step, (_, style) in enumerate(trajectory):
        assert style.split() == f"width: 400%; height: 800%; left: {-100 * step}%; top: -600%;".split()
    assert 'alt="Sample of teacher in 4 steps, odd, noise 2"' in shown
    assert 'aria-valuetext="4 steps"' in shown

    browse(page, f"--screenshot={screenshot}", "--window-size=800,1200", run="student", steps=4, noise=3)
    (sheet,) = (sheet for sheet in content["runs"][0]["sheets"] if sheet["steps"] == 2)
    assert contains(np.asarray(Image.open(screenshot).convert("RGB")), cells(sheet)[0, 3, -1], scale=32)


def contains(screenshot, image, *, scale):
    """Whether the image is somewhere in the screenshot, each of its pixels `scale` pixels wide."""
    height, width = (screenshot.shape[axis] - scale * image.shape[axis] + 1 for axis in (0, 1))
    equal = np.ones((height, width), bool)
    for y, x in np.ndindex(image.shape[:2]):
        top, left = y * scale + scale // 2, x * scale + scale // 2
        part = screenshot[top : top + height, left : left + width].astype(int)
        equal &= (np.abs(part - image[y, x]) <= 1).all(axis=2)  # the browser may convert colours
    return equal.any()


def test_bad_input_before_any_sampling(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_sheet", None)
    (tmp_path / "empty").mkdir()
    mixed, captions = tmp_path / "mixed", tmp_path / "captions"
    for directory, field, value in (
        (mixed, "resolution", 16),
        (captions, "encoding", dataclasses.asdict(ENCODING)),
    ):
        shutil.copytree(runs / "teacher", directory / "a", ignore=shutil.ignore_patterns("checkpoints"))
        shutil.copytree(directory / "a", directory / "b")
        record = json.loads((directory / "b" / "run.json").read_text())
        record["dataset"][field] = value
        (directory / "b" / "run.json").write_text(json.dumps(record))
    for directory, out, message in (
        (runs, "demo.htm", "must end in .html"),
        (tmp_path / "missing", "demo.html", "there is no such directory"),
        (tmp_path / "empty", "demo.html", "there are no runs of at most 16 steps"),
        (mixed, "demo.html", "b was trained on folder/tiny at 16x16, but .*a on folder/tiny at 8x8"),
        (captions, "demo.html", "b is conditioned on captions"),
    ):
        with pytest.raises(InputError, match=message):
            demo.write_demo(directory, tmp_path / out)
    assert not (tmp_path / "demo.html").exists()
