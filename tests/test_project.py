"""The files around the code agree with it: version, citation, supported Pythons, the workflow of GitHub."""

import configparser
import json
import re
from pathlib import Path

import yaml
from packaging.specifiers import SpecifierSet

import mcm_jax

ROOT = Path(__file__).parents[1]
SUPPORTED = ["3.11", "3.12", "3.13"]


def test_the_citation_is_of_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == mcm_jax.__version__
    assert set(citation) >= {"cff-version", "message", "title", "authors", "license"}
    paper = citation["preferred-citation"]
    readme = (ROOT / "README.md").read_text()
    assert paper["title"] in readme and paper["url"].rpartition("/")[2] in readme


def test_the_change_log_has_this_version():
    versions = re.findall(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert mcm_jax.__version__ in versions


def test_every_supported_python_is_tested():
    setup = configparser.ConfigParser(delimiters="=", interpolation=None)
    setup.read(ROOT / "setup.cfg")
    allowed = SpecifierSet(setup["options"]["python_requires"])
    assert [f"3.{minor}" for minor in range(20) if f"3.{minor}" in allowed] == SUPPORTED
    assert [f"3.{minor}" for minor in range(20) if f"3.{minor}.9" in allowed] == SUPPORTED
    assert re.findall(r"Python :: (3\.\d+)", setup["metadata"]["classifiers"]) == SUPPORTED
    launcher = (ROOT / "launch/environment.sh").read_text()
    assert "(3, 11) <= sys.version_info < (3, 14)" in launcher and "3.11, 3.12 or 3.13" in launcher
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == SUPPORTED


def test_the_continuous_integration_runs_what_any_machine_can():
    """Actions have a version, and no secret is used."""
    for path in (ROOT / ".github/workflows").iterdir():
        workflow = yaml.safe_load(path.read_text())
        steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
        assert [step["run"] for step in steps if "run" in step] == ["bash .ci/run"]
        assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in steps if "uses" in step)
        assert "secrets" not in json.dumps(workflow)
