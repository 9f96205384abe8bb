"""The table of plans: what stands in a row, in what order, and what it was made with."""

from mcm_jax.planning import table

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
        *("4.00", "2.5", "1.60", "3.20", "1.28", "50%", "3.0"),
    ]
    assert len(header) == len(row)


def test_what_the_paper_has_not_is_empty():
    _, _, row = rows(
        [RECORD | {"published_steps_per_second": None, "estimated_step_seconds_attention_unfused": None}]
    )
    assert row[6:10] == ["", "", "", ""]


def test_a_step_that_does_not_fit():
    refused = {
        name: RECORD[name]
        for name in ("config", "overrides", "date", "versions", "topology", "params", "hbm_bytes_per_chip")
    }
    refused |= {"fits": False, "would_fit_with": "--config.model.remat=full"}
    header, _, row = rows([refused])
    assert row[2] == "does not fit, would with --config.model.remat=full" and row[-1] == "3.00"
    assert len(row) == len(header)


def test_sections_order_and_versions():
    plain = RECORD | {"overrides": ["--config.model.remat=full"], "date": "2026-01-03"}
    large = RECORD | {"config": "configs/imagenet64.py:large,cd,steps=8", "params": 1230}
    text = table.table([plain, large, RECORD])
    assert text.index("The configs as they are") < text.index("With `--config.model.remat=full`")
    assert text.index("small,ct") < text.index("large,cd") < text.index("With")
    assert "Compiled on 2026-01-02 with jax 1.0, libtpu 2.0.\n" in text and "on 2026-01-03 with" in text
