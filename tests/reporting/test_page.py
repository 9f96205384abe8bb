"""The page: self-contained, safe, and with everything in its place."""

import base64
import html.parser
import re

import pytest

from mcm_jax.reporting import page, results
from tests.reporting.made_up import RECORD, TEACHER, config, record, write

METRIC = "fd_effnet_lite0_1024"


class Elements(html.parser.HTMLParser):
    """Every start tag with its attributes, and the text outside of styles."""

    def __init__(self, content: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def content(runs):
    return page.prepare(results.collect(runs))


@pytest.fixture
def runs(tmp_path):
    """A teacher, and CD and CT of two training seeds each."""
    write(tmp_path / "teacher", record(466.0, **TEACHER), config=config(objective="diffusion"))
    for seed in (0, 1):
        settings = config(seed=seed, teacher_checkpoint="runs/teacher")
        write(tmp_path / f"cd4_{seed}", record(500.0 + 20 * seed, training_seed=seed), config=settings)
        settings["objective"] = "ct"
        ct = record(600.0, objective="ct", training_seed=seed)
        write(tmp_path / f"ct4_{seed}", ct, config=settings)
    return tmp_path


def test_nothing_from_outside(runs):
    made = page.page(content(runs))
    elements = Elements(made)
    assert elements.open == []
    assert not {tag for tag, _ in elements.found} & {"script", "link", "iframe", "object", "base", "a"}
    for tag, attributes in elements.found:
        assert not any(name.startswith("on") for name in attributes)
        assert "src" not in attributes or (tag == "img" and attributes["src"].startswith("data:image/"))
    without_pictures = re.sub(r"base64,[A-Za-z0-9+/=]*", "", made)
    for outside in ("http:", "https:", "//", "url(", "@import"):
        assert outside not in without_pictures


def test_numbers_metric_and_attribution(runs):
    text = Elements(page.page(content(runs))).text
    # 500 and 520: mean 510, standard error sqrt(200 / 2) = 10.
    for expected in (
        *("510.0 ± 10.0 (n = 2)", "600.0 ± 0.0 (n = 2)", "466.0", "386.2", "2000.0", "25.00"),
        *("Frechet distance", "lower is better", "CC BY-SA 4.0", "OpenMoji", "jax 0.10.2", "500 of 500"),
        *("0.0003, warm-up 100, linear decay", page.MEASURED_HERE),
    ):
        assert expected in text, expected
    assert not re.search(r"\bfid\b", text, re.IGNORECASE)


def test_every_picture_is_inside_in_order(runs):
    elements = Elements(page.page(content(runs)))
    images = [attributes for tag, attributes in elements.found if tag == "img"]
    plots, grids = images[:2], images[2:]
    for plot in plots:
        assert plot["src"].startswith("data:image/svg+xml;base64,")
        assert b"<svg" in base64.b64decode(plot["src"].partition(",")[2])
    first = (runs / "teacher" / RECORD["grid"]).read_bytes()
    assert base64.b64decode(grids[0]["src"].partition(",")[2]) == first
    assert [grid["alt"] for grid in grids] == [
        "samples of Teacher, 64 steps of addim",
        *("samples of CD, 4 student steps", "samples of CT, 4 student steps") * 2,
    ]
    tags = [tag for tag, _ in elements.found]
    assert tags.count("details") == 1
    assert tags[: tags.index("details")].count("img") == 2 + 3


def test_names_are_escaped(tmp_path):
    name = "<script>alert('&')"
    path = tmp_path / f"{name}x"
    write(path, record(dataset=name, sampler=name, versions={name: name}, data_preprocessing=name))
    write(path, record(grid=f"{name}.png", seed=1, dataset=name, sampler=name))
    texts = ("workdir", "parameters", "label_rule", "noise_grid", "clip", "rounding", "checkpoint")
    files = {"reference__file": name, "reference__sha256": name, "features__sha256": name}
    write(path, record(**dict.fromkeys(texts, name), **files, metrics={METRIC: 1.0, name: 2.0}))
    (path / "run.json").write_text(
        '{"config": {"optimizer": {"learning_rate": "<script>"}, "teacher_checkpoint": "<script>"}, '
        '"dataset": {"num_examples": {"<script>": 1}}}'
    )
    made = content(tmp_path)
    elements = Elements(page.page(made))
    assert elements.open == []
    assert "script" not in {tag for tag, _ in elements.found}
    assert elements.text.count(name) >= 5
    assert "<script>" not in page.markdown(made)


def test_a_missing_picture_is_said(tmp_path):
    write(tmp_path / "cd4", record(), picture=False)
    assert f"no picture {RECORD['grid']}" in page.page(content(tmp_path))


def test_one_section_for_what_can_be_compared(tmp_path):
    write(tmp_path / "cd4", record(1.5), record(2.5, parameters="raw"))
    made = content(tmp_path)
    assert [section.distances[0].estimates[0].mean for section in made.sections] == [1.5, 2.5]
    headings = [line for line in page.markdown(made).splitlines() if line.startswith("## ")]
    assert headings == [
        "## openmoji 16x16, 1024 samples, ema parameters",
        "## openmoji 16x16, 1024 samples, raw parameters",
    ]


def test_openmoji_is_attributed_only_where_it_is_used(tmp_path):
    write(tmp_path / "cd4", record(dataset="folder/pets"))
    made = content(tmp_path)
    assert "OpenMoji" not in page.page(made) and "OpenMoji" not in page.markdown(made)


def test_scores_by_captions_are_averaged_and_explained(tmp_path):
    for seed, score in ((0, 0.90), (1, 0.94)):
        scored = record(
            dataset="avatars",
            training_seed=seed,
            metrics=RECORD["metrics"] | {"attributes_1024": score},
            bounds={"test_images_attributes_2000": 1.0, "other_captions_attributes_2000": 0.065},
        )
        write(tmp_path / f"cd4_{seed}", scored, config=config(seed=seed))
    made = content(tmp_path)
    text = page.markdown(made)
    # The standard error of 0.90 and 0.94 is 0.02.
    assert "The score attributes_1024: the share of" in text and "0.920 ± 0.020 (n = 2)" in text
    assert "- The captions' own images, 1.000: real images, so about the best possible score." in text
    assert "Other captions, 0.065: real images of other captions, so chance." in text.replace(
        "0.0650", "0.065"
    )
    assert text.index("0.920") < text.index("Frechet distance fd_")
    shown = page.page(made)
    assert "Samples and their captions" in shown and "0.920 ± 0.020 (n = 2)" in shown


def test_the_licence_of_a_published_network_is_stated_once(tmp_path):
    origin = {"kind": "edm", "file": "a.pkl", "sha256": "f", "source": "github.com/a", "licence": "CC"}
    for name in ("cd4", "cd8"):
        write(tmp_path / name, record(origin=origin))
    line = "Trained from a.pkl of github.com/a; licence: CC."
    assert page.page(content(tmp_path)).count(line) == 1
    write(tmp_path / "own", record())
    assert page.page(content(tmp_path)).count(line) == 1


def test_notes_are_on_the_page_and_in_the_markdown(tmp_path):
    path = write(tmp_path / "cd4", record())
    with open(path, "a") as file:
        file.write('{"workdir')
    made = content(tmp_path)
    assert f"{path}:2 is truncated" in page.page(made)
    assert f"Note: {path}:2 is truncated" in page.markdown(made)


def test_without_features_of_the_reference_there_is_no_nearest_neighbour_table(tmp_path):
    write(tmp_path / "cd4", record(metrics={"fd_effnet_lite0_1024": 480.0}))
    made = content(tmp_path)
    assert made.sections[0].nearest is None
    assert "copies" not in page.page(made)


def test_a_section_that_is_none_is_as_one_without_settings(tmp_path):
    write(tmp_path / "cd4", record(), config=config(model=None, optimizer=None, consistency=None))
    assert "widths" not in page.page(content(tmp_path))
