"""What the repository says of the findings is what its recorded results say."""

from pathlib import Path

import pytest

from mcm_jax.bench import mixture, openmoji, summary
from mcm_jax.bench.cells import Store

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "results" / "findings"
PROBLEMS = {"mixture": mixture.MIXTURE_64D, "mixture2d": mixture.MIXTURE_2D, "openmoji": openmoji.OPENMOJI}


@pytest.fixture(scope="module")
def markdown():
    """The store refuses results that were measured with other problems than today's."""
    return summary.markdown(Store(RECORDED / "results.jsonl", PROBLEMS), PROBLEMS, range(3), quick=False)


def test_the_report_is_made_from_the_results(markdown):
    assert (RECORDED / "findings.md").read_text() == markdown, "run mcm_jax.findings --report_only on them"


def test_the_documents_have_its_verdicts(markdown):
    summary = markdown.split("\n\n")[1]
    assert summary.startswith("| Finding |")
    assert summary in (ROOT / "docs" / "findings.md").read_text()
