"""Times, bytes and FLOPs of a module written by hand in the compiler's layout, against sums by hand."""

from pathlib import Path

import pytest

from mcm_jax.planning import chips, compilation, cost, hlo

# Four chips of v5e, 2 x 2. A loop, in each round of which a gather is started, a product runs, and the gather
# is waited for; then a second product, and a gather that nothing hides. After the loop a reduce-scatter, a
# custom kernel, a copy that the update hides, and the update.
MODULE = Path(__file__).with_name("loop.hlo").read_text()
ROUNDS = 3  # 4, 6, 8: from 4 by 2 while less than 10
GATHERED = 1024 * 4096 * 2 * 3 / 4  # bytes that a chip has not
LINK = 4.5e10  # bytes a second


def costs(text):
    """(operations, doubts) of a module on the four chips."""
    return cost.operations(
        hlo.parse(text),
        chips.get_chip("v5e"),
        coordinates=[(0, 0), (0, 1), (1, 0), (1, 1)],
        bounds=(2, 2),
        package=Path("/checkout/mcm_jax"),
    )


@pytest.fixture(scope="module")
def operations():
    found, doubts = costs(MODULE)
    assert doubts == []
    return {one.name: one for one in found}


def test_loops_count_as_often_as_they_run(operations):
    first, second = operations["fusion.1"], operations["fusion.2"]
    assert (first.count, second.count, operations["update"].count) == (ROUNDS, ROUNDS, 1)
    assert first.seconds == pytest.approx(ROUNDS * 150_000 / 1.5e9)
    assert operations["update"].seconds == pytest.approx(15_000 / 1.5e9)
    assert first.kind == "estimated"


def test_flops_are_those_of_the_matrix_products(operations):
    assert operations["fusion.2"].flops == ROUNDS * 2 * 4096 * 1024 * 4096
    assert operations["update"].flops == 0


@pytest.mark.parametrize(
    ("line", "shapes", "expected"),
    [
        # Attention's batched product as the compiler writes it: 16 examples, 2 heads, 64 x 64 logits.
        (
            "%c = f32[16,2,64,64]{2,3,1,0} convolution(%a, %b), "
            "window={size=16x2 stride=15x1 lhs_dilate=16x2}, dim_labels=01bf_01oi->01bf",
            [(16, 2, 64, 32), (16, 2, 64, 32)],
            2 * 16 * 2 * 64 * 64 * 32,
        ),
        # A 3 x 3 convolution of 8 x 8: at the edge a tap is missing, 22 of 24 are there along each axis.
        (
            "%c = f32[4,8,8,5]{3,2,1,0} convolution(%a, %b), window={size=3x3 pad=1_1x1_1}, "
            "dim_labels=b01f_01io->b01f",
            [(4, 8, 8, 7), (3, 3, 7, 5)],
            2 * 4 * 5 * 7 * 22 * 22,
        ),
    ],
)
def test_flops_of_convolutions(line, shapes, expected):
    entry = f"HloModule m, is_scheduled=true\n\nENTRY %main () -> f32[] {{\n  {line}\n}}\n"
    (one,) = hlo.parse(entry).computations["main"]
    assert cost.convolution_flops(one, *shapes) == expected


def test_links_carry_one_thing_at_a_time():
    """A collective that nothing hides does not hide another one; a copy goes on meanwhile."""

    start, *_ = hlo.parse(MODULE).computations["body"]

    def transfers():
        kinds = {"gather": "collective", "copy": "copy"}
        return {name: cost._Transfer(start, name, kind, 0.0, 1.0, 1.0) for name, kind in kinds.items()}

    for busy, left in (("collective", [1.0, 0.75]), ("copy", [0.75, 1.0]), ("estimated", [0.75, 0.75])):
        in_flight = transfers()
        cost._advance(in_flight, 0.25, busy=busy)
        assert [one.remaining_seconds for one in in_flight.values()] == left


def test_what_runs_meanwhile_hides_a_collective(operations):
    """Both axes of 2 x 2 bring data, over one link each; the first product takes 0.1 ms of it away."""
    gather = operations["gather-start"]
    assert gather.kind == "collective" and gather.opcode == "all-gather"
    assert gather.num_bytes == ROUNDS * GATHERED
    assert gather.seconds == pytest.approx(ROUNDS * GATHERED / (2 * LINK))
    # 70 microseconds are all hidden by a product of 100.
    assert gather.exposed_seconds == 0


def test_a_collective_over_one_axis_that_nothing_hides(operations):
    gather = operations["gather.2"]
    assert gather.num_bytes == ROUNDS * 1024 * 4096 * 2 / 2
    assert gather.exposed_seconds == gather.seconds == pytest.approx(gather.num_bytes / LINK)


def test_half_an_all_reduce_is_a_reduce_scatter(operations):
    scatter = operations["scattered"]
    assert scatter.opcode == "reduce-scatter"
    assert scatter.num_bytes == 1024 * 4096 * 4 * 3 / 4
    assert scatter.exposed_seconds == pytest.approx(scatter.num_bytes / (2 * LINK))


def test_a_kernel_is_modelled_by_its_counts(operations):
    """788 MFLOPs at 40% of 197 TFLOP/s are 10 microseconds, more than its 81 kB at 0.81 TB/s."""
    kernel = operations["kernel.1"]
    assert kernel.kind == "kernel"
    assert kernel.seconds == pytest.approx(1e-5)


def test_a_copy_between_memories(operations):
    """4 MB at 0.81 TB/s are 5.2 microseconds, the update hides 10."""
    copy = operations["copy-start.1"]
    assert copy.kind == "copy" and copy.num_bytes == 256 * 4096 * 4
    assert copy.seconds == pytest.approx(256 * 4096 * 4 / 0.81e12)
    assert copy.exposed_seconds == 0


def test_parts_of_tuples():
    shape = "((bf16[2,3]{1,0:T(8,128)(2,1)}), bf16[2,3]{1,0}, /*index=2*/s32[]{:S(2)})"
    assert hlo.tuple_parts(shape) == ["(bf16[2,3]{1,0:T(8,128)(2,1)})", "bf16[2,3]{1,0}", "s32[]{:S(2)}"]


def test_a_partly_hidden_collective():
    slow = MODULE.replace('"estimated_cycles":"150000"', '"estimated_cycles":"15000"')
    (gather,) = [one for one in costs(slow)[0] if one.name == "gather-start"]
    assert gather.exposed_seconds == pytest.approx(gather.seconds - ROUNDS * 1e-5)


@pytest.mark.parametrize(
    ("line", "other", "doubt"),
    [
        ("%start = (s32[]", None, "no constant start"),
        ("%bound = s32[]{:T(128)} constant(10)", "%bound = s32[]{:T(128)} parameter(1)", "no constant bound"),
        ("constant(2)", "parameter(1)", "no constant stride"),
        ("compare(%at.1, %bound), direction=LT", "and(%at.1, %bound)", "its condition is and"),
    ],
)
def test_a_loop_that_can_not_be_read_is_told(line, other, doubt):
    """And counted once; the rest of the plan is there."""
    text = MODULE
    if other is None:
        (counter,) = [one for one in MODULE.splitlines() if "constant(4)" in one]
        text = MODULE.replace(counter, counter.replace("constant(4)", "parameter(3)"))
    else:
        assert line in MODULE
        text = MODULE.replace(line, other)
    found, doubts = costs(text)
    [told] = doubts
    assert doubt in told and "while.1" in told
    assert {one.count for one in found} == {1}


def test_source_lines_name_this_program_first(operations):
    assert operations["fusion.1"].source == "models/blocks.py:123"
    module = hlo.parse(MODULE)
    (product,) = [i for i in module.computations["body"] if i.name == "fusion.1"]
    assert module.source(product, package=Path("/elsewhere")) == "/site-packages/flax/linear.py:7"


def test_bytes_of_shapes():
    assert hlo.shape_bytes("f32[8,256]{1,0:T(8,128)}") == 8 * 256 * 4
    assert hlo.shape_bytes("(bf16[2,3]{1,0}, /*index=1*/s32[], pred[4]{0})") == 12 + 4 + 4
    assert hlo.shape_bytes("u8[]") == 1


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}", [0, 2]),
        ("replica_groups=[2,2]<=[4]", [0, 1]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [0, 2]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [0, 2]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [0, 1, 2, 3]),
        ("source_target_pairs={{0,1},{1,0}}", [0, 1]),
        ("dimensions={0}", [0, 1, 2, 3]),
    ],
)
def test_groups(text, group):
    assert cost.first_group(text, 4) == group


def test_a_ring_brings_twice_what_a_line_brings():
    v5e = chips.get_chip("v5e")
    line, ring = [(x, 0) for x in range(8)], [(x, 0) for x in range(16)]
    speed = chips.incoming_bytes_per_second
    assert speed(v5e, line, (8, 8)) == LINK
    assert speed(v5e, ring, (16, 16)) == 2 * LINK
    assert speed(v5e, ring[:8], (16, 16)) == LINK  # Half of a ring is a line.
    assert speed(v5e, [(x, y) for x in range(16) for y in range(16)], (16, 16)) == 4 * LINK
    v4, column = chips.get_chip("v4"), [(0, 0, z) for z in range(4)]
    assert speed(v4, column, (4, 4, 4)) == 2 * LINK
    assert speed(v4, column, (2, 2, 4)) == LINK


def test_an_exchange_waits_for_the_narrowest_cut():
    v5e, speed = chips.get_chip("v5e"), chips.exchange_bytes_per_second
    # Every chip gets one part from each of the others; counted over the middle link by hand.
    assert speed(v5e, [(0, 0), (0, 1)], (8, 8)) == LINK
    assert speed(v5e, [(0, y) for y in range(4)], (8, 8)) == pytest.approx(LINK * 3 / 4)
    square = [(x, y) for x in range(8) for y in range(8)]
    assert speed(v5e, square, (8, 8)) == pytest.approx(8 * LINK * 63 / (32 * 32))
    square = [(x, y) for x in range(16) for y in range(16)]  # Rings: every line is cut twice.
    assert speed(v5e, square, (16, 16)) == pytest.approx(2 * 16 * LINK * 255 / (128 * 128))


def test_all_to_all_is_an_exchange():
    everywhere = MODULE.replace("{'axis_1'}", "{'axis_0','axis_1'}")
    gather, exchange = (
        next(one for one in costs(text)[0] if one.name == "gather.2")
        for text in (everywhere, everywhere.replace(" all-gather(", " all-to-all("))
    )
    # Four chips of 2 x 2: two links each bring 3 parts, and the cut's two links carry 4.
    assert exchange.seconds / gather.seconds == pytest.approx(4 / 3)


def test_text_that_is_no_scheduled_module():
    with pytest.raises(ValueError, match="not the text of a scheduled HLO module"):
        hlo.parse("HloModule jit_step\n")


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
            "(17.59G) exceeds available HBM (15.75G).",
            17.59,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 42.90G of 15.75G hbm. Exceeded",
            42.9,
        ),
    ],
)
def test_out_of_memory_is_an_answer(message, needed):
    refused = compilation.too_large(message, available=1.0)
    assert refused.needed_bytes == pytest.approx(needed * 2**30)
    assert refused.available_bytes == pytest.approx(15.75 * 2**30)


def test_other_errors_are_none():
    assert compilation.too_large("INTERNAL: Mosaic failed to compile", available=1.0) is None


@pytest.mark.parametrize(
    ("name", "products"), [("splash_mha_fwd_residuals", 2), ("splash_mha_dkv.1", 5), ("name.3", 0)]
)
def test_attentions_kernels_are_counted_here(name, products):
    """They carry no counts: a product of L x D and D x L' is 2 L L' D, whichever way round.

    Of a kernel that nobody knows it is said.
    """
    shapes = ["bf16[32,8,256,128]{3,2,1,0}", "bf16[32,8,512,128]{3,2,1,0}", "bf16[32,8,512,128]{3,2,1,0}"]
    text = "\n".join(
        [
            "HloModule m, is_scheduled=true",
            "ENTRY %main () -> f32[] {",
            "  %mask = s8[1,1,1]{2,1,0} parameter(0)",
            *(f"  %p{n} = {shape} parameter({n + 1})" for n, shape in enumerate(shapes)),
            f"  ROOT %{name} = bf16[32,8,256,128]{{3,2,1,0}} custom-call(%mask, %p0, %p1, %p2), "
            'custom_call_target="tpu_custom_call"',
            "}",
        ]
    )
    [kernel], doubts = cost.operations(
        hlo.parse(text), chips.get_chip("v5e"), coordinates=[(0, 0)], bounds=(1, 1), package=Path("/")
    )
    assert kernel.kind == "kernel" and kernel.flops == products * 2 * 32 * 8 * 256 * 512 * 128
    if products:
        assert kernel.seconds == pytest.approx(kernel.flops / (0.4 * 197e12)) and doubts == []
    else:
        # The query, two keys or values, the result, two bytes a number, and the mask.
        num_bytes = 2 * 32 * 8 * 128 * (256 + 512 + 512 + 256) + 1
        assert kernel.seconds == pytest.approx(num_bytes / 0.81e12)
        assert doubts == ["the kernel name.3 reports no FLOPs; only its bytes are modelled"]
