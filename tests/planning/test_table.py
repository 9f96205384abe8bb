"""The table of plans: what stands in a row, in what order, and what it was made with."""

from mcm_jax.planning import compilation, report, table, topologies
from mcm_jax.planning.cost import Operation

OPERATION = Operation("a", "fusion", "estimated", 1, 0.1, 0.1, 0.0, 1e12, "")

RECORD = {
    "config": "configs/imagenet64.py:small,ct,steps=8",
    "overrides": [],
    "date": "2026-01-02",
    "versions": {"jax": "1.0", "libtpu": "2.0"},
    "topology": "v5e:8x8",
    "params": 394,
    "fits": True,
    "hbm_bytes_per_chip": 3 * 2**30,
    "published_steps_per_second": 2.5,
    "estimated_step_seconds": 0.25,
    "estimated_step_seconds_attention_unfused": 0.3125,
    "estimated_mfu": 0.5,
    "seconds_modelled_kernels": 0.03,
    "seconds_modelled_collectives_exposed": 0.02,
    "modelled_share": 0.21,
    "doubts": [],
}


def rows(records):
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.table(records).splitlines()
        if line.startswith("|")
    ]


def test_a_row():
    header, _, row = rows([RECORD])
    assert row == [
        *("imagenet64 small,ct,steps=8", "v5e:8x8", "0.250", "0.030", "0.020"),
        *("21%", "4.00", "2.5", "1.60", "3.20", "1.28", "50%", "3.0"),
    ]
    assert len(header) == len(row)


def test_what_the_paper_has_not_is_empty():
    _, _, row = rows(
        [RECORD | {"published_steps_per_second": None, "estimated_step_seconds_attention_unfused": None}]
    )
    assert row[7:11] == ["", "", "", ""]


def test_a_step_that_does_not_fit():
    topology = topologies.Topology("v5e:8x8", topologies.chip("v5e"), (8, 8), ())
    made = {name: RECORD[name] for name in ("config", "overrides", "date", "versions")}
    refused = compilation.TooLarge(17.0 * 2**30, 15.75 * 2**30)
    compiled = compilation.Plan(0, 0, 16 * 2**30, (OPERATION,), "")
    for plan, fitting, size in ((refused, "--config.model.remat=full", "17.0"), (compiled, None, "16.0")):
        record = report.record(plan, topology, num_params=10, published=None, fitting=fitting)
        header, _, row = rows([made | record])
        said = f"would with {fitting}" if fitting else "nor with what was tried"
        assert row[2] == f"does not fit, {said}" and row[-1] == size
        assert len(row) == len(header)


def test_what_could_not_be_read_stands_below():
    text = table.table([RECORD | {"doubts": ["the loop while.3 has no counter"]}, RECORD])
    assert (
        text.count("| imagenet64 small,ct,steps=8 [?] |")
        == text.count("| imagenet64 small,ct,steps=8 |")
        == 1
    )
    assert "[?] imagenet64 small,ct,steps=8: the loop while.3 has no counter.\n" in text


def test_sections_order_and_versions():
    plain = RECORD | {"overrides": ["--config.model.remat=full"], "date": "2026-01-03"}
    large = RECORD | {"config": "configs/imagenet64.py:large,cd,steps=8", "params": 1230}
    text = table.table([plain, large, RECORD])
    assert text.index("The configs as they are") < text.index("With `--config.model.remat=full`")
    assert text.index("small,ct") < text.index("large,cd") < text.index("With")
    assert "Compiled on 2026-01-02 with jax 1.0, libtpu 2.0.\n" in text and "on 2026-01-03 with" in text
