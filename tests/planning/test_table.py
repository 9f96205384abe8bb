"""The table of plans: what stands in a row, in what order, and what it was made with."""

from mcm_jax.planning import compilation, report, table, topologies
from mcm_jax.planning.cost import Operation

OPERATION = Operation("a", "fusion", "estimated", 1, 0.1, 0.1, 0.0, 1e12, "")

RECORD = {
    "config": "configs/imagenet64.py:small,ct,steps=8",
    "overrides": [],
    "date": "2026-01-02",
    "versions": {"jax": "1.0", "libtpu": "2.0"},
    "program": "train",
    "topology": "v5e:8x8",
    "chips": 64,
    "images_per_step": 2048,
    "accumulation_steps": 1,
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


def rows(records, show=table.table):
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in show(records).splitlines()
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
    topology = topologies.Topology("v5e:8x8", topologies.get_chip("v5e"), (8, 8), ())
    made = {name: RECORD[name] for name in ("config", "overrides", "date", "versions")}
    refused = compilation.TooLarge(17.0 * 2**30, 15.75 * 2**30)
    compiled = compilation.Plan(0, 0, 16 * 2**30, (OPERATION,), "")
    for plan, fitting, size in ((refused, "--config.model.remat=full", "17.0"), (compiled, None, "16.0")):
        record = report.record(plan, topology, program="train", num_params=10, images=8, fitting=fitting)
        header, _, row = rows([made | record])
        said = f"does not fit; fits with {fitting}" if fitting else "does not fit with any change tried"
        assert row[2] == said and row[-1] == size
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
    assert text.index("Configs without overrides") < text.index("With `--config.model.remat=full`")
    assert text.index("small,ct") < text.index("large,cd") < text.index("With")
    assert "Compiled on 2026-01-02 with jax 1.0, libtpu 2.0.\n" in text and "on 2026-01-03 with" in text


def test_sampling_stands_apart():
    sample = RECORD | {"program": "sample", "images_per_step": 4096, "estimated_images_per_second": 16384.0}
    refused = sample | {"program": "features", "fits": False, "would_fit_with": None}
    text = table.table([refused, sample, RECORD])
    assert text.index("Configs without overrides\n") < text.index("Evaluation. Configs without overrides\n")
    *_, header, _, row, last = rows([refused, sample, RECORD])
    assert row == [
        *("imagenet64 small,ct,steps=8", "v5e:8x8", "sample", "4096"),
        *("0.250", "21%", "16384", "3.1", "50%", "3.0"),
    ]
    assert last[2:5] == ["features", "4096", "does not fit with any change tried"] and last[-1] == "3.0"
    assert len(header) == len(row) == len(last)


def test_scaling():
    """Twice the chips with twice the batch, and with the same; a table begins with its smallest slice."""
    twice = {"topology": "v5e:8x16", "chips": 128}
    parts = {
        "images_per_step": 4096,
        "accumulation_steps": 2,
        "overrides": ["--b=2", "--config.mesh.fsdp=128"],
    }
    weak = RECORD | twice | parts | {"estimated_step_seconds": 0.26}
    strong = RECORD | twice | {"estimated_step_seconds": 0.16, "overrides": ["--b=2"]}
    apart = strong | {"overrides": ["--c=3"], "estimated_step_seconds": 9.0}
    refused = RECORD | {"topology": "v5e:2x4", "chips": 8, "fits": False, "would_fit_with": None}
    record = RECORD | {"overrides": ["--b=2"]}
    other = RECORD | {"config": "configs/imagenet128.py:small,ct,steps=8"}
    records = [weak, strong, record, refused, other, apart]
    text = table.scaling(records)
    assert "imagenet64 small,ct,steps=8, 32 images per chip, with `--b=2`\n" in text
    assert "imagenet64 small,ct,steps=8, 2048 images per update, with `--b=2`\n" in text
    header, _, first, second, _, _, third, fourth = rows(records, table.scaling)
    assert first == ["v5e:8x8", "64", "2048", "32", "1", "0.2500", "21%", "8192", "1.000"]
    assert second == ["v5e:8x16", "128", "4096", "32", "2", "0.2600", "21%", "15754", "1.040"]
    assert third[-1] == "1.00 on 1" and fourth[-1] == "1.56 on 2" and len(header) == len(first)
    assert "2048 images on v5e:2x4: does not fit with any change tried.\n" in text
