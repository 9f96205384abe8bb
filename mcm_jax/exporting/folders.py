"""Writes the folders of `mcm_jax.export`."""

import dataclasses
import json
from pathlib import PurePosixPath
from typing import Any

import jax
import numpy as np
from jax import export

import mcm_jax
from mcm_jax.data import layout
from mcm_jax.exporting import cards, programs
from mcm_jax.records import JsonObject, Sampling
from mcm_jax.runs import exported
from mcm_jax.runs.run import Run
from mcm_jax.runs.workdirs import RunRecord
from mcm_jax.system import files
from mcm_jax.system.paths import Path

CARD = "README.md"
SAMPLER, TENSORS, SIGNATURE = "sampler.jax_export", "parameters.npz", "sampler.json"
_CHECKED_IMAGES = 2

_USE_MODEL = """
`model.safetensors` contains the parameters by dotted names, `config.json` the settings of the run. The
package mcm_jax reads this folder like the directory of a run, also as a teacher:

```bash
python -m mcm_jax.sample --workdir=.{flag} --num=16 --out=samples.png
```

```python
import mcm_jax

run = mcm_jax.load("."{argument})
images, labels = run.sample(16)
```
"""

_USE_SAMPLER = """
`{sampler}` is the sampler with {sampling}, as a program for {platforms}. Its parameters are in
`{tensors}`. It needs JAX and no other package. It was written by JAX {jax}; JAX promises that
later versions read it for at least six months.

```python
import jax
import numpy as np
from jax import export

with open("{sampler}", "rb") as file:
    sampler = export.deserialize(bytearray(file.read()))
params = jax.device_put(dict(np.load("{tensors}")))
labels = np.arange(8, dtype=np.int32) % {num_classes}  # any number of labels
images = np.asarray(sampler.call(params, np.uint32(0), labels))  # seed 0; uint8 [8, {side}, {side}, 3]
```

Image n depends only on the seed, n and its label. Labels must be from 0 to {last}; the program does not
check them. `{signature}` describes the arguments and names the classes.
"""


def write_model(run: Run, record: RunRecord, folder: Path) -> None:
    """Writes the run's parameters, its record and a model card; `folder` then loads like its workdir.

    Args:
      record: the content of its run.json.
    """
    record = _portable(record)
    raw = run.parameters == "raw"
    use = _USE_MODEL.format(
        flag=" --parameters=raw" if raw else "", argument=', parameters="raw"' if raw else ""
    )
    files.write_output(folder / CARD, cards.card(run, record, use=use))
    exported.write(
        folder,
        run.params,
        record.to_json(),
        version=mcm_jax.__version__,
        checkpoint_step=run.checkpoint_step,
        parameters=run.parameters,
        checkpoint=run.checkpoint,
    )


def write_sampler(run: Run, settings: Sampling, record: RunRecord, folder: Path) -> str:
    """Writes the run's sampler as a program, parameters, signature and model card; reads back and runs it.

    Returns:
      How much its images differ from those of `run.sample`.

    Raises:
      InputError: the sampler can't be exported; see `programs.exported_sampler`.
    """
    program = programs.exported_sampler(run, settings)
    use = _USE_SAMPLER.format(
        sampler=SAMPLER,
        tensors=TENSORS,
        signature=SIGNATURE,
        sampling=f"{settings.steps} steps of {settings.label}",
        platforms=", ".join(program.platforms),
        jax=jax.__version__,
        num_classes=run.dataset.num_classes,
        last=run.dataset.num_classes - 1,
        side=run.dataset.resolution,
    )
    signature = json.dumps(_signature(program, run, settings), indent=2)
    files.write_output(folder / CARD, cards.card(run, _portable(record), use=use))
    files.write_output(folder / SIGNATURE, signature + "\n")
    tensors = exported.by_name(jax.device_get(run.params))
    files.write_output(folder / TENSORS, lambda file: np.savez(file, **tensors))
    files.write_output(folder / SAMPLER, bytes(program.serialize()))
    return _comparison(folder, run, settings)


def _portable(record: RunRecord) -> RunRecord:
    """The record without paths of this machine, which name nothing elsewhere and may name a person.

    The data set is at its default place, and a teacher or guide has only its name.
    """
    config, dataset = record.config, record.dataset
    models = {
        name: path and (PurePosixPath(path).name or path)
        for name in ("teacher_checkpoint", "guide_checkpoint")
        for path in [getattr(config, name)]
    }
    data = dataclasses.replace(config.data, data_dir=layout.DEFAULT_DATA_DIR)
    path = layout.dataset_dir(layout.DEFAULT_DATA_DIR, dataset=dataset.dataset, resolution=dataset.resolution)
    return dataclasses.replace(
        record,
        config=dataclasses.replace(config, data=data, **models),
        dataset=dataclasses.replace(dataset, path=path),
    )


def _signature(program: export.Exported, run: Run, settings: Sampling) -> JsonObject:
    def described(name: str, aval: Any) -> JsonObject:
        shape = [side if isinstance(side, int) else str(side) for side in aval.shape]
        return {"name": name, "dtype": str(aval.dtype), "shape": shape}

    *_, seed, labels = program.in_avals
    return {
        "file": SAMPLER,
        "inputs": [
            {"name": "params", "file": TENSORS},
            described("seed", seed),
            described("labels", labels) | {"minimum": 0, "maximum": run.dataset.num_classes - 1},
        ],
        "outputs": [described("images", program.out_avals[0])],
        "class_names": run.dataset.class_names,
        "sampling": settings.to_json(),
        "checkpoint_step": run.checkpoint_step,
        "parameters": run.parameters,
        "checkpoint": run.checkpoint,
        "platforms": program.platforms,
        "calling_convention_version": program.calling_convention_version,
        "jax": jax.__version__,
        "mcm_jax": mcm_jax.__version__,
    }


def _comparison(folder: Path, run: Run, settings: Sampling) -> str:
    """Reads what was written, draws with it, and compares."""
    program = export.deserialize(bytearray(files.read_bytes(folder / SAMPLER)))
    with files.reading(folder / TENSORS) as file:
        params = dict(np.load(file))
    labels = np.arange(_CHECKED_IMAGES, dtype=np.int32) % run.dataset.num_classes
    ours, _ = run.sample(
        _CHECKED_IMAGES,
        labels=labels,
        steps=settings.steps,
        guidance=settings.guidance,
        batch_per_device=_CHECKED_IMAGES,
    )
    its = np.asarray(program.call(params, np.uint32(0), labels))
    difference = np.abs(ours.astype(int) - its)
    return (
        f"read back: {_CHECKED_IMAGES} images differ from those of mcm_jax.sample in "
        f"{np.count_nonzero(difference)} of {difference.size} values, by at most {difference.max()} of 255"
    )
