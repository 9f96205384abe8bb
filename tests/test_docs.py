"""The documents: the site builds without a warning, the notebook runs, and the examples are right."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import nbformat
import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

import mcm_jax.diffusion
import mcm_jax.models
import mcm_jax.text

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "two_gaussians.ipynb"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The directory of the site, built as `mkdocs build --strict` does."""
    out = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(out))
    config.plugins.on_startup(command="build", dirty=False)
    build(config)  # mkdocs' Abort, after a line for each, where there was a warning
    config.plugins.on_shutdown()
    return out


def test_links_out_of_docs_lead_to_pages_and_pictures_of_the_site(site):
    page = (site / "findings.html").read_text()
    assert 'src="results/findings/findings.png"' in page
    assert 'href="results/findings/findings.html"' in page
    assert (site / "results" / "findings" / "findings.png").is_file()
    # A file that the site does not show is named only.
    assert "config/settings.py</code>" in (site / "get_started.html").read_text()
    assert "settings.py" not in re.findall(r'href="([^"]*)"', (site / "get_started.html").read_text())


def test_no_page_links_to_a_source_of_a_page(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    assert not [page.name for page in pages if re.search(r'href="(?!https?:)[^"]*\.md\b', page.read_text())]


def test_every_setting_is_on_the_page_of_settings_with_its_meaning(site):
    page = (site / "api" / "settings.html").read_text()
    rows = [re.findall("<td>(.*?)</td>", row, re.DOTALL) for row in page.split("<tr>")[1:]]
    settings = {row[0]: row for row in rows if row}
    assert "<code>0.75</code>" in settings["<code>consistency.xvar_frac</code>"]
    assert len(settings) > 50
    assert all(row[-1] for row in settings.values())


def test_every_citation_of_the_specification_resolves(site):
    page = (site / "specification.html").read_text()
    sources = [path for room in ("mcm_jax", "configs", "tests") for path in (ROOT / room).rglob("*.py")]
    cited = {
        "spec-" + name for path in sources for name in re.findall(r"\bSPEC (\d+[abc]?)\b", path.read_text())
    }
    assert len(cited) > 8
    assert cited <= set(re.findall(r'id="([^"]*)"', page))
    assert 'href="../specification.html#spec-3"' in (site / "api" / "diffusion.html").read_text()


def test_the_readme_is_short_and_its_links_lead_somewhere():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", readme)
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target


# What the notebook does, and what it does here.
IN_SMALL = {
    "1_500": "20",
    "10_000": "100",
    "(1, 4, 16, 64)": "(1, 4)",
    "student_steps in (1, 4)": "student_steps in (4,)",
}


def test_the_notebook_runs(capsys):
    """In this process: starting a kernel and importing JAX there would take longer than the cells."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    for whole, small in IN_SMALL.items():
        assert sum(whole in source for source in sources) == 1
        sources = [source.replace(whole, small) for source in sources]
    names = {}
    for number, source in enumerate(sources):
        exec(compile(source, f"cell {number}", "exec"), names)
    distances = [float(number) for number in re.findall(r"distance ([\d.]+)", capsys.readouterr().out)]
    # DDIM in one and four steps, a student, the exact flow.
    assert len(distances) == 4
    assert all(distance < 1 for distance in distances)


def test_the_stored_notebook_has_its_picture_and_no_paths_of_a_machine():
    text = NOTEBOOK.read_text()
    assert '"image/png"' in text
    assert not re.findall(r"/(?:home|tmp|root|work|usr|Users)/", text)


MODULES = [
    name
    for room in (mcm_jax.diffusion, mcm_jax.models, mcm_jax.text)
    for _, name, _ in pkgutil.iter_modules(room.__path__, room.__name__ + ".")
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_docstrings_give_what_they_say(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0
