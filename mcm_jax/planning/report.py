"""Formats a plan as a record and as text, with separate estimates, models and published numbers."""

from mcm_jax.planning.compilation import Plan, TooLarge
from mcm_jax.planning.topologies import Topology
from mcm_jax.records import JsonObject

_GIB = 2**30
_STEP = {
    "train": "one update on a batch of {} images",
    "sample": "sampling a batch of {} images, from noise to pixels",
    "features": "computing FID's features of a batch of {} images",
}
# Number of samples for FID (SPEC 7).
FID_SAMPLES = 50_000


def record(
    compiled: Plan | TooLarge,
    topology: Topology,
    *,
    num_params: int,
    program: str,
    images: int,
    accumulation_steps: int = 1,
    published: float | None = None,
    fitting: str | None = None,
    seconds_unfused: float | None = None,
) -> JsonObject:
    """Returns the record that --json writes; without times if the compiler rejected the program (TooLarge).

    For programs other than the train step, a "step" is one execution.

    Args:
      images: number of images in one execution, over all chips.
      accumulation_steps: number of parts of the batch that are computed one after the other.
      published: steps per second measured by the paper's authors.
      fitting: flags that make a program fit that otherwise does not.
      seconds_unfused: time of the step without attention kernels, see `compilation.seconds_unfused`.
    """
    chip = topology.chip
    result: JsonObject = {
        "program": program,
        "topology": topology.name,
        "chips": topology.num_chips,
        "images_per_step": images,
        "accumulation_steps": accumulation_steps,
        "params": num_params,
        "hbm_capacity_bytes": int(chip.hbm_bytes),
        "published_steps_per_second": published,
        "would_fit_with": fitting,
    }
    if isinstance(compiled, TooLarge):
        return result | {
            "fits": False,
            "hbm_bytes_per_chip": None if compiled.needed_bytes is None else int(compiled.needed_bytes),
        }
    seconds = compiled.seconds()
    flops = compiled.flops * topology.num_chips
    modelled = seconds - compiled.seconds("estimated")
    return result | {
        "fits": compiled.fits(chip),
        "hbm_bytes_per_chip": compiled.total_bytes,
        "hbm_argument_bytes": compiled.argument_bytes,
        "hbm_temporary_bytes": compiled.temporary_bytes,
        "flops_per_step": flops,
        "estimated_step_seconds": seconds,
        "estimated_steps_per_second": 1 / seconds,
        "estimated_images_per_second": result["images_per_step"] / seconds,
        # Counts recomputed FLOPs too.
        "estimated_mfu": compiled.flops / chip.peak_flops / seconds,
        "estimated_step_seconds_attention_unfused": seconds_unfused,
        "modelled_share": modelled / seconds,
        "seconds_estimated_by_compiler": compiled.seconds("estimated"),
        "seconds_modelled_unestimated": compiled.seconds("unestimated"),
        "seconds_modelled_kernels": compiled.seconds("kernel"),
        "seconds_modelled_collectives_exposed": compiled.seconds("collective"),
        "seconds_modelled_copies_exposed": compiled.seconds("copy"),
        "doubts": list(compiled.doubts),
        "collective_bytes": {name: total for name, (_, total, _, _) in compiled.collectives().items()},
    }


def as_text(compiled: Plan | TooLarge, record: JsonObject, topology: Topology, *, costliest: int) -> str:
    """Formats the record for the terminal, with the costliest operations."""
    chip = topology.chip
    lines = [
        f"{topology.name}: {topology.num_chips} chips. The compiler's estimates and our models, "
        "no measurements.",
        f"step                {_STEP[record['program']].format(record['images_per_step'])}",
        f"parameters          {record['params'] / 1e6:.1f} M",
    ]
    if isinstance(compiled, TooLarge):
        available = f"{compiled.available_bytes / _GIB:.2f} GiB per chip"
        needs = f"needs more than {available}"
        if compiled.needed_bytes is not None:
            needs = f"needs {compiled.needed_bytes / _GIB:.2f} GiB, more than the {available}"
        return "\n".join([*lines, f"does not fit: {needs}{_remedy(record)}"])
    lines += [
        f"memory per chip     {_gib(compiled.argument_bytes)} arguments + {_gib(compiled.temporary_bytes)} "
        f"temporaries, {_gib(compiled.total_bytes)} in total, {_gib(chip.hbm_bytes)} available: "
        + ("fits" if record["fits"] else f"does not fit{_remedy(record)}"),
        f"work                {record['flops_per_step']:.4g} FLOPs per step (including recomputation)",
        f"estimated step      {record['estimated_step_seconds']:.4f} s, "
        f"{record['estimated_steps_per_second']:.2f} steps per second, "
        f"{100 * record['estimated_mfu']:.0f}% of peak",
        *_images(record),
        f"  of which          {compiled.seconds('estimated'):.4f} s estimated by the compiler",
        *_modelled(compiled),
        f"  modelled share    {100 * record['modelled_share']:.0f}% of the step",
    ]
    unfused = record["estimated_step_seconds_attention_unfused"]
    if unfused is not None:
        lines.append(
            f"without kernels     {unfused:.4f} s, {1 / unfused:.2f} steps per second, attention as matrix "
            "products, compiled alone; whether such a step fits is not checked"
        )
    if record["published_steps_per_second"] is not None:
        lines.append(
            f"paper               {record['published_steps_per_second']} steps per second, measured by its "
            "authors (appendix A.2)"
        )
    lines += [f"unknown             {doubt}" for doubt in compiled.doubts]
    lines += ["", f"the {costliest} costliest operations, ms per step", *_operations(compiled, costliest)]
    return "\n".join(lines)


def _images(record: JsonObject) -> list[str]:
    if record["program"] == "train":
        return []
    rate = record["estimated_images_per_second"]
    return [f"estimated images    {rate:.0f} per second, {FID_SAMPLES} in {FID_SAMPLES / rate:.1f} s"]


def _remedy(record: JsonObject) -> str:
    flags = record["would_fit_with"]
    return "; nothing tried makes it fit; use more chips" if flags is None else f"; it fits with {flags}"


def _modelled(compiled: Plan) -> list[str]:
    lines = [
        f"  of which          {compiled.seconds('unestimated'):.4f} s without an estimate, modelled",
        f"  of which          {compiled.seconds('kernel'):.4f} s custom kernels, modelled",
        f"  of which          {compiled.seconds('copy'):.4f} s copies between memories, not overlapped, "
        "modelled",
        f"  of which          {compiled.seconds('collective'):.4f} s collectives, not overlapped, modelled",
    ]
    for name, (count, num_bytes, seconds, exposed) in compiled.collectives().items():
        overlapped = 1 - exposed / seconds if seconds else 1.0
        lines.append(
            f"    {name:<18}{count} per step, {num_bytes / 1e6:.0f} MB to each chip, "
            f"{seconds:.4f} s modelled, {100 * overlapped:.0f}% overlapped"
        )
    return lines


def _operations(compiled: Plan, number: int) -> list[str]:
    return [
        f"{1e3 * o.exposed_seconds:8.2f}  {o.count:>4} x {o.name[:44]:<44} {o.kind:<10} {o.source}"
        for o in compiled.costliest(number)
    ]


def _gib(num_bytes: int | float) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"
