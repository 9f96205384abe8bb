"""Choices that the paper leaves open; the bench compares each alternative with our default (SPEC 2, 4)."""

import dataclasses
from collections.abc import Sequence

from mcm_jax.bench.cells import Cell, Overrides, Store
from mcm_jax.bench.findings import Measured, measure

# Each choice is measured with few and with many student steps.
STUDENT_STEPS = (1, 4)


@dataclasses.dataclass(frozen=True)
class Choice:
    """An alternative to a default, as overrides of config fields, and the system that it is measured on."""

    name: str
    overrides: Overrides
    system: str = "cd"


def choices(learning_rate: float, resolution: int) -> tuple[Choice, ...]:
    """All open choices, given the default learning rate and the resolution of the data."""
    return (
        Choice("loss weight SNR + 1", (("consistency.loss_weight", "snr_plus_one"),)),
        Choice("loss weight max(SNR, 1)", (("consistency.loss_weight", "max_snr_one"),)),
        Choice("sum in the Huber distance", (("consistency.huber_reduction", "sum"),)),
        Choice("Huber epsilon 1", (("consistency.huber_epsilon", 1.0),)),
        Choice("target network: average, decay 0.95", (("consistency.target_network", "ema"),)),
        Choice("dropout 0.1", (("model.dropouts", (0.1, 0.1, 0.1)),)),
        Choice("learning rate / 3", (("optimizer.learning_rate", learning_rate / 3),)),
        Choice("learning rate x 3", (("optimizer.learning_rate", learning_rate * 3),)),
        Choice("schedule shifted by half, ends moved", _shift(resolution // 2, "moved")),
        Choice("schedule shifted by half, ends kept", _shift(resolution // 2, "kept")),
        Choice(
            "PD: x_var of the second step from fresh noise",
            (("progressive.midpoint_xvar", "fresh"),),
            "progressive",
        ),
    )


def _shift(resolution: int, end_points: str) -> Overrides:
    return (
        ("schedule.noise_resolution_low", resolution),
        ("schedule.noise_resolution_high", resolution),
        ("schedule.end_points", end_points),
    )


def cells_of(chosen: Sequence[Choice], problem: str, seeds: Sequence[int]) -> list[Cell]:
    """Every cell that the choices need, including the cells with defaults."""
    defaults = [(choice.system, ()) for choice in chosen]
    systems = dict.fromkeys([*defaults, *((choice.system, choice.overrides) for choice in chosen)])
    return [
        Cell(problem, system, steps, seed, changed)
        for seed in seeds
        for system, changed in systems
        # Progressive distillation passes through the larger number, which the bench remembers.
        for steps in sorted(STUDENT_STEPS, reverse=system == "progressive")
    ]


def measured(choice: Choice, store: Store, problem: str, steps: int, seeds: Sequence[int]) -> Measured | None:
    """The alternative's distance minus the default's, paired by seed; None if a cell is missing."""
    pairs = [
        tuple(Cell(problem, choice.system, steps, seed, changed) for changed in (choice.overrides, ()))
        for seed in seeds
    ]
    if any(cell not in store for pair in pairs for cell in pair):
        return None
    return measure([store[a]["distance"] - store[b]["distance"] for a, b in pairs])
