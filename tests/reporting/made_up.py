"""Result files as evaluate writes them, with made-up numbers."""

import copy
import json
from pathlib import Path

import numpy as np

from mcm_jax.system.pictures import save_png

RECORD = {
    "workdir": "cd4",
    "objective": "cd",
    "dataset": "openmoji",
    "resolution": 16,
    "data_preprocessing": "drawn at 16x16",
    "training_seed": 0,
    "student_steps": 4,
    "trained_for": [],
    "checkpoint_step": 500,
    "parameters": "ema",
    "label_rule": "train_frequency",
    "seed": 0,
    "steps": 4,
    "sampler": "ddim",
    "guidance": 0.0,
    "guide": None,
    "guide_checkpoint": None,
    "noise_grid": "schedule",
    "x_var": None,
    "x_var_eta": None,
    "x_var_images": None,
    "clip": "last",
    "rounding": "nearest",
    "network_calls": 4,
    "origin": None,
    "guide_origin": None,
    "num_samples": 1024,
    "asked": ["frechet", "nearest"],
    "caption_scores": [],
    "version": 2,
    "checkpoint": None,
    "untrained_num": 256,
    "metrics": {
        "fd_effnet_lite0_1024": 480.0,
        "fd_effnet_lite0_132": 700.0,
        "nearest_neighbour_distance": 25.0,
    },
    "bounds": {
        "mean_image_fd_effnet_lite0": 2000.0,
        "test_images_fd_effnet_lite0_132": 386.25,
        "test_images_nearest_neighbour_distance": 21.0,
        "untrained_network_fd_effnet_lite0_256": 1464.0,
    },
    "rank_deficient": True,
    "features": {"network": "efficientnet-lite0", "sha256": "f" * 64, "input_resolution": 96},
    "reference": {
        "dataset": "openmoji",
        "resolution": 16,
        "split": "train",
        "count": 1260,
        "sha256": "a" * 64,
    },
    "grid": "evaluation/grid.png",
    "sampling_seconds": 4.5,
    "features_seconds": 1.5,
    "created": "2026-01-02T03:04:05+00:00",
    "versions": {"jax": "0.10.2", "flax": "0.12.8", "mcm_jax": "0.1.0"},
}
TEACHER = {"objective": "diffusion", "student_steps": None, "steps": 64, "sampler": "addim"}
CONFIG = {
    "objective": "cd",
    "seed": 0,
    "teacher_checkpoint": None,
    "data": {"dataset": "openmoji", "data_dir": "data", "resolution": 16},
    "model": {"widths": [32, 64]},
    "consistency": {
        "student_steps": 4,
        "teacher_steps_first": 64.0,
        "teacher_steps_last": 1280.0,
        "anneal_steps": 400,
    },
    "optimizer": {"learning_rate": 0.0003, "decay": "linear", "warmup_steps": 100, "ema_decay": 0.99},
    "training": {"num_steps": 500, "batch_size": 128, "log_every_steps": 50},
    "sampling": {"teacher_steps": 64},
}


def record(distance: float | None = None, **changes) -> dict:
    """RECORD with changed fields; `features__sha256` is a field of a field."""
    result = copy.deepcopy(RECORD)
    for name, value in changes.items():
        *parents, last = name.split("__")
        place = result
        for parent in parents:
            place = place[parent]
        place[last] = value
    if distance is not None:
        result["metrics"][f"fd_effnet_lite0_{result['num_samples']}"] = distance
    return result


def write(run: Path, *records: dict, picture: bool = True, config: dict | None = None) -> Path:
    """Appends the records to the run's results file, which it returns; draws the picture they name."""
    path = run / "evaluation" / "results.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.writelines(json.dumps(each) + "\n" for each in records)
    if picture:
        save_png(np.full((8, 8, 3), 200, np.uint8), run / RECORD["grid"])
    if config is not None:
        content = {
            "config": config,
            "dataset": {"num_examples": {"train": 1260}, "fingerprints": {"train": "x"}},
        }
        (run / "run.json").write_text(json.dumps(content))
    return path


def config(**changes) -> dict:
    """CONFIG with changed fields, as in `record`."""
    result = copy.deepcopy(CONFIG)
    for name, value in changes.items():
        *parents, last = name.split("__")
        place = result
        for parent in parents:
            place = place[parent]
        place[last] = value
    return result
