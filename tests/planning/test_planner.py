"""The program: a plan for a small slice, answers where it does not fit, refusals before any compilation."""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from mcm_jax.config import rows, validation
from mcm_jax.evaluation import inception, inception_weights
from mcm_jax.models import attention
from mcm_jax.models.conditions import Classes
from mcm_jax.planning import compilation, computations, planner, report, topologies
from mcm_jax.planning.cost import Operation
from mcm_jax.reporting import paper
from mcm_jax.system.errors import InputError
from tests import forks
from tests.limits import refusal
from tests.planning.stored import stored
from tests.planning.test_table import RECORD
from tests.test_programs import call

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, which exists for Linux on x86-64"
)
OPERATION = Operation("a", "fusion", "estimated", 1, 0.1, 0.1, 0.0, 1e12, "")
SMALL = (
    *("--config=configs/openmoji.py:teacher", "--config.model.kinds=('resnet','transformer')"),
    *("--config.model.widths=(32,64)", "--config.model.blocks=(1,1)", "--config.model.dropouts=(0.0,0.0)"),
)
# The program, with stored results of the compiler.
STORED_PLAN = """
import runpy
from tests.planning.stored import stored
with stored():
    runpy.run_module("mcm_jax.plan", run_name="__main__", alter_sys=True)
"""


@needs_libtpu
def test_a_tiny_network_on_four_chips(tmp_path):
    """The whole way: the numbers that can be known otherwise are right, the others are there."""
    result = forks.run(
        STORED_PLAN,
        *SMALL,
        "--config.mesh.fsdp=4",
        "--config.model.remat=full",
        "--config.model.unroll=False",
        "--topology=v5e:2x2",
        f"--json={tmp_path / 'plan.json'}",
        f"--hlo={tmp_path / 'plan.hlo'}",
    )
    assert (result.returncode, result.stderr) == (0, "")
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["params"] == 214_019
    assert record["fits"] and record["hbm_capacity_bytes"] == int(15.75 * 2**30)
    # Parameters, their average and Adam's two moments in float32, at least split over 4; and a quarter of the
    # batch. Small arrays are not split, and what a tile of 8 x 128 has too much is padding.
    state, batch = 4 * 4 * record["params"], 64 / 4 * (16 * 16 * 3 * 4 + 4)
    assert state / 4 + batch < record["hbm_argument_bytes"] < 2 * (state + batch)
    assert record["published_steps_per_second"] is None
    assert record["estimated_step_seconds"] == pytest.approx(
        sum(record[name] for name in record if name.startswith("seconds_"))
    )
    assert 0 < record["estimated_mfu"] < 1
    assert record["collective_bytes"]["all-gather"] > 0
    assert "no measurements" in result.stdout and "estimated by the compiler" in result.stdout
    assert (tmp_path / "plan.hlo").read_text().startswith("HloModule jit_update")
    assert record["config"] == "configs/openmoji.py:teacher"
    assert "--config.model.unroll=False" in record["overrides"]
    table = call("plan", f"--table={tmp_path}")
    assert table.returncode == 0, table.stderr
    assert f"| openmoji teacher | v5e:2x2 | {record['estimated_step_seconds']:.3f} | " in table.stdout
    assert f"libtpu {importlib.metadata.version('libtpu')}" in table.stdout


@needs_libtpu
def test_sampling_on_four_chips():
    """The network of the same size, all of it on every chip, called once for every one of three steps.

    FLOPs tell how often: those of a step of one call are a third.
    """
    raw = rows.tiny("teacher", dataset="openmoji", resolution=16)
    raw.sampling.update(batch_per_device=8, sampler="ddim")
    flops = {}
    for steps in (1, 3):
        raw.sampling.teacher_steps = steps
        with stored():
            record, text, _ = planner.plan(raw, "v5e:2x2", program="sample")
        assert record["doubts"] == [] and record["fits"]
        flops[steps] = record["flops_per_step"]
    assert record["hbm_argument_bytes"] >= 4 * record["params"]
    assert record["images_per_step"] == 32 and record["collective_bytes"] == {}
    assert flops[3] == pytest.approx(3 * flops[1], rel=1e-3)
    rate = record["images_per_step"] / record["estimated_step_seconds"]
    assert f"{rate:.0f} per second, 50000 in {50_000 / rate:.1f} s" in text


@pytest.mark.parametrize("system", ["tract", "progressive,steps=8"])
def test_the_train_step_of_several_stages_is_that_of_the_last(system):
    raw = rows.tiny(system, dataset="openmoji", resolution=16)
    raw.teacher_checkpoint = "teacher"
    raw.model.update(kinds=("resnet",), widths=(8,), blocks=(1,), dropouts=(0.0,), embedding_width=16)
    config = validation.validate(raw)
    stages = config.loss.stages
    last = {"stages": stages[-2:]}
    if config.objective == "progressive":
        last["xvar_frac"] = config.loss.later_xvar_frac
    alone = dataclasses.replace(config, **{config.objective: dataclasses.replace(config.loss, **last)})
    found, expected = (
        computations.train(each, jax.devices()[:1], condition=Classes(7)) for each in (config, alone)
    )
    lowered = [each.function.lower(*each.arguments).as_text() for each in (found, expected)]
    assert len(stages) > 2 and lowered[0] == lowered[1]


@needs_libtpu
def test_features_on_four_chips(monkeypatch):
    """Of five of its eleven blocks, and rounded products: all of it, exact, compiles for minutes."""
    kept = ("mixed_5b", "mixed_6a", "mixed_6d", "mixed_7a", "mixed_7c")
    monkeypatch.setattr(inception, "_BLOCKS", {name: inception._BLOCKS[name] for name in kept})
    monkeypatch.setattr(jax, "default_matmul_precision", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(computations, "BATCH_PER_DEVICE", 2)
    inception_weights.abstract_network.cache_clear()
    try:
        network = inception_weights.abstract_network()
        raw = rows.tiny("teacher", dataset="openmoji", resolution=16)
        with stored():
            record, _, _ = planner.plan(raw, "v5e:2x2", program="features")
    finally:
        inception_weights.abstract_network.cache_clear()
    images = jax.ShapeDtypeStruct((8, 16, 16, 3), jnp.uint8)
    before_compilation = jax.jit(network.apply).lower(network.params, images).cost_analysis()["flops"]
    assert record["doubts"] == [] and record["collective_bytes"] == {}
    # Some products are padded, the pools' operations are not counted.
    assert 0.9 * before_compilation < record["flops_per_step"] < 1.2 * before_compilation


@needs_libtpu
def test_a_plan_leaves_the_compilation_cache_alone(tmp_path):
    """Executables for absent devices can't be loaded from it: the second plan would warn of that."""
    topology = topologies.describe("v5e:2x2")
    mesh = jax.sharding.Mesh(topology.devices[:1], "chip")
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    array = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=sharding)
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    compilation_cache.reset_cache()
    try:
        compilation.plan(jax.jit(jnp.sin), (array,), topology, mesh=mesh, package=tmp_path)
        assert not list(tmp_path.iterdir())
        jax.jit(jnp.sin)(jnp.ones((8, 128))).block_until_ready()
        assert list(tmp_path.iterdir())
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


@needs_libtpu
def test_the_fused_attention_is_a_kernel_on_a_tpu():
    """It compiles, with its gradient, and its FLOPs are those of seven products of L x D and D x L."""
    slice_ = topologies.describe("v5e:2x2")
    mesh = jax.sharding.Mesh(slice_.devices[:1], "x")
    there = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    queries = jax.ShapeDtypeStruct((2, 2, 256, 128), jnp.bfloat16, sharding=there)

    def gradient(q, k, v):
        return jax.grad(lambda *qkv: jnp.sum(attention.splash(*qkv).astype(jnp.float32)), argnums=(0, 1, 2))(
            q, k, v
        )

    plan = compilation.plan(
        jax.jit(gradient), (queries,) * 3, slice_, mesh=mesh, package=Path(attention.__file__).parent
    )
    kernels = [one for one in plan.operations if one.kind == "kernel"]
    assert len(kernels) == 2
    assert sum(one.flops for one in kernels) == 7 * 2 * 2 * 2 * 256 * 256 * 128
    assert {one.attention for one in kernels} == {(2, 2, 256, 128)}

    def written_out(q, k, v, gradient):
        values, back = jax.vjp(attention.einsum, q, k, v)
        return values, back(gradient)

    package = Path(attention.__file__).parent
    alone = compilation.plan(jax.jit(written_out), (queries,) * 4, slice_, mesh=mesh, package=package)
    unfused = compilation.seconds_unfused(plan, attention.einsum, slice_, dtype=jnp.dtype("bfloat16"))
    assert unfused == pytest.approx(plan.seconds() - plan.seconds("kernel") + alone.seconds())


def test_attention_written_out_counts_as_often_as_its_kernels(monkeypatch):
    """Three layers forwards, of which two also backwards: 1 s forwards, 5 s both ways, and 10 s of others."""
    sizes = (2, 2, 256, 128)
    operations = [
        Operation("splash_mha_fwd.1", "custom-call", "kernel", 3, 0.3, 0.3, 0.0, 1.0, "", sizes),
        Operation("splash_mha_dkv.1", "custom-call", "kernel", 2, 0.2, 0.2, 0.0, 1.0, "", sizes),
        Operation("a", "fusion", "estimated", 1, 10.0, 10.0, 0.0, 1.0, ""),
    ]

    def alone(function, arguments, *_, **__):
        assert {one.shape for one in arguments} == {sizes}
        seconds = {3: 1.0, 4: 5.0}[len(arguments)]
        return compilation.Plan(
            0, 0, 0, (Operation("b", "fusion", "estimated", 1, seconds, seconds, 0.0, 0.0, ""),), ""
        )

    monkeypatch.setattr(compilation, "plan", alone)
    topology = topologies.Topology("v5e:2x2", topologies.get_chip("v5e"), (2, 2), tuple(jax.devices()[:1]))
    whole = compilation.Plan(0, 0, 0, tuple(operations), "")
    found = compilation.seconds_unfused(whole, attention.einsum, topology, dtype=jnp.dtype("bfloat16"))
    assert found == pytest.approx(3 * 1 + 2 * (5 - 1) + 10)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--topology=v5e:3x3",), "--topology=v5e:3x3 does not exist; available: v4:2x2x1, "),
        (
            ("--config=configs/folder.py:teacher",),
            "config.data.dataset=.*: unknown classes; set --num_class",
        ),
        (
            ("--config.mesh.data=1", "--config.mesh.fsdp=3"),
            "config.mesh: data=1 x fsdp=3 is not the 4 devices",
        ),
        (("--config.training.batch_size=6",), "batch_size=6 can't be divided over 4 devices"),
        (("--config.model.remat=some",), "config.model.remat='some' must be one of none, full, dots, names"),
    ],
)
@needs_libtpu
def test_bad_input_is_one_line(arguments, said):
    result = call("plan", *SMALL, "--topology=v5e:2x2", *arguments)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert re.search(said, line), line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "contains no plans .*; write one with --json=.*/NAME.json"),
        ("{", "plan.json is not the record of a plan"),
        ("[]", "plan.json is not the record of a plan"),
        ('{"params": 1}', "plan.json is not the record of a plan .*'(overrides|program)'"),
    ],
)
def test_a_table_of_what_is_no_plan(tmp_path, text, said):
    if text is not None:
        (tmp_path / "plan.json").write_text(text)
    for show in (planner.table, planner.scaling):
        with pytest.raises(InputError, match=said):
            show(tmp_path)


@pytest.mark.parametrize("change", [{"chips": 0}, {"images_per_step": 10**400}])
def test_a_plan_of_impossible_numbers(tmp_path, change):
    (tmp_path / "plan.json").write_text(json.dumps({**RECORD, **change}))
    found = refusal(lambda: planner.scaling(tmp_path))
    assert found is not None and "plan.json is not the record of a plan" in found


@pytest.mark.parametrize("flags", [(), ("--table=runs/plan", *SMALL)])
def test_a_plan_or_a_table(flags):
    result = call("plan", *flags)
    assert result.returncode == 2
    assert "give --config=NAME:ROW for a plan, or --table=DIR or --scaling=DIR for a table" in result.stderr


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="needs its compiler, libtpu: pip install"):
        topologies.describe("v5e:2x2")


@needs_libtpu
@pytest.mark.parametrize("name", topologies.names())
def test_every_slice_exists(name):
    described = topologies.describe(name)
    assert len(described.devices) == described.num_chips
    coordinates = [device.coords for device in described.devices]
    assert [max(c[axis] for c in coordinates) + 1 for axis in range(len(described.bounds))] == list(
        described.bounds
    )


@pytest.mark.parametrize("compiles", [False, True])
def test_what_does_not_fit_says_what_would(monkeypatch, compiles):
    """Remat first, then all chips for the parameters, then parts of the batch, until it fits."""
    tried = []

    def compile_(program, config, topology, condition):
        assert program == "train"
        tried.append((config.model.remat, config.mesh.fsdp, config.training.accumulation_steps))
        refused = compilation.TooLarge(42.9 * 2**30, 15.75 * 2**30)
        if compiles:
            refused = compilation.Plan(0, 0, 43 * 2**30, (OPERATION,), "module")
        fits = compilation.Plan(0, 0, 15 * 2**30, (), "")
        size = SimpleNamespace(num_params=1000, images=64)
        return size, fits if config.training.accumulation_steps == 2 else refused

    monkeypatch.setattr(planner, "_compile", compile_)
    monkeypatch.setattr(
        topologies, "describe", lambda name: topologies.Topology(name, topologies.get_chip("v5e"), (2, 2), ())
    )
    config = rows.tiny("teacher", dataset="openmoji", resolution=16)
    record, text, hlo = planner.plan(config, "v5e:2x2")
    assert tried == [("none", 1, 1), ("full", 1, 1), ("full", 4, 1), ("full", 4, 2)]
    remedy = "--config.model.remat=full --config.mesh.fsdp=4 --config.training.accumulation_steps=2"
    assert record["would_fit_with"] == remedy and not record["fits"] and bool(hlo) == compiles
    needs = (
        "43.00 GiB in total, 15.75 GiB available: does not fit"
        if compiles
        else "needs 42.90 GiB, more than the 15.75 GiB per chip"
    )
    assert f"{needs}; it fits with {remedy}" in text


def test_the_record_adds_up():
    operations = [
        Operation("a", "fusion", "estimated", 2, 0.2, 0.2, 0.0, 197e11, "models/blocks.py:1"),
        Operation("k", "custom-call", "kernel", 1, 0.05, 0.05, 10.0, 0.0, ""),
        Operation("g", "all-gather", "collective", 4, 0.1, 0.025, 1e6, 0.0, ""),
    ]
    compiled = compilation.Plan(3 * 2**30, 2**30, 5 * 2**30, tuple(operations), "")
    topology = topologies.Topology("v5e:2x2", topologies.get_chip("v5e"), (2, 2), ())
    record = report.record(
        compiled, topology, program="train", num_params=10, images=11, published=2.7, seconds_unfused=0.4
    )
    assert record["modelled_share"] == pytest.approx(0.075 / 0.275)
    assert record["estimated_step_seconds"] == pytest.approx(0.275)
    # A tenth of a second's work at peak, in 0.275 s.
    assert record["estimated_mfu"] == pytest.approx(0.1 / 0.275)
    assert record["flops_per_step"] == pytest.approx(4 * 197e11)
    assert record["estimated_images_per_second"] == pytest.approx(40)
    text = report.as_text(compiled, record, topology, costliest=2)
    assert "step                one update on a batch of 11 images" in text
    assert "3.00 GiB arguments + 1.00 GiB temporaries, 5.00 GiB in total, 15.75 GiB available: fits" in text
    assert "all-gather        4 per step, 1 MB to each chip, 0.1000 s modelled, 75% overlapped" in text
    assert "2.7 steps per second, measured by its authors" in text
    assert "modelled share    27% of the step" in text
    assert "without kernels     0.4000 s, 2.50 steps per second" in text
    first, second = text.splitlines()[-2:]
    assert first.split() == ["200.00", "2", "x", "a", "estimated", "models/blocks.py:1"]
    assert second.split() == ["50.00", "1", "x", "k", "kernel"]


def test_the_papers_speeds():
    small = {"num_params": 396_000_000, "resolution": 64, "num_chips": 64}
    assert paper.steps_per_second(**small, objective="ct") == 2.7
    assert paper.steps_per_second(**small, objective="cd") == 2.5
    assert paper.steps_per_second(**small, objective="tract") is None
    assert paper.steps_per_second(**small | {"num_chips": 16}, objective="ct") is None
    large = {"num_params": 1_250_000_000, "resolution": 128, "num_chips": 256}
    assert paper.steps_per_second(**large, objective="cd") == 1.8
    text_to_image = {"num_params": 4_972_147_724, "resolution": 512, "num_chips": 256}
    assert paper.steps_per_second(**text_to_image | {"num_params": 10**9}, objective="cd") is None
    assert paper.steps_per_second(**text_to_image, objective="cd") == 0.71
    assert paper.steps_per_second(**text_to_image, objective="guidance") is None
