"""Reads the settings of runs that were started by older versions."""

from collections.abc import Mapping
from typing import Any

# Settings that version 0.1 had in its section `consistency`, which four objectives shared.
_MOVED = {
    "tract": ("stages", "loss_weight", "target_decay"),
    "progressive": ("stages", "teacher_step", "xvar_frac", "later_xvar_frac", "loss_weight"),
}


# Sections that had a single number of student steps, or None.
_SINGLE = ("consistency", "continuous")


def upgraded(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Converts settings of older versions to equivalent current ones; returns current ones unchanged."""
    result = _from_version_0_1(raw)
    for section in _SINGLE:
        steps = (result.get(section) or {}).get("student_steps", ())
        if not isinstance(steps, list | tuple):
            result[section] = {**result[section], "student_steps": () if steps is None else (steps,)}
    return result


def _from_version_0_1(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Converts settings of version 0.1 to later ones; returns later ones unchanged.

    Version 0.1 had `teacher_guidance` outside the sections, and in some settings None for the objective's own
    default. Settings that had no effect on the selected objective are dropped.
    """
    result = dict(raw)
    if "teacher_guidance" not in result:
        return result
    objective, teacher_guidance = result["objective"], result.pop("teacher_guidance")
    old = {name: value for name, value in result.pop("consistency").items() if value is not None}
    if objective in _MOVED:
        result[objective] = {name: old[name] for name in _MOVED[objective] if name in old}
    elif objective in ("cd", "ct"):
        result["consistency"] = {
            name: value for name, value in old.items() if name not in ("stages", "later_xvar_frac")
        }
        result["consistency"]["teacher_guidance"] = teacher_guidance
    elif objective == "guidance":
        result["guidance"] = {"teacher_guidance": teacher_guidance}
    if objective != "diffusion":
        result.pop("diffusion", None)
    return result
