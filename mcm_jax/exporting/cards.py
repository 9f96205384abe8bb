"""The model card: README.md of an exported folder, with the metadata that the Hugging Face hub reads."""

import json

import jax

import mcm_jax
from mcm_jax.records import JsonObject, Origin
from mcm_jax.runs.run import Run
from mcm_jax.runs.workdirs import RunRecord
from mcm_jax.system.errors import printable

_PARAMETERS = {"ema": "averaged over training", "raw": "those after the last update"}


def card(run: Run, record: RunRecord, *, use: str) -> str:
    """The text of README.md. It states what the run records, and what is unknown; it contains no results.

    Args:
      record: that of the run, without paths of this machine.
      use: Markdown that says how to use the files beside it.
    """
    front = "\n".join(f"{name}: {json.dumps(value)}" for name, value in _metadata(run, record).items())
    facts = "\n".join(f"- {name}: {printable(value)}" for name, value in _facts(run, record).items())
    unknown = "\n".join(f"- {text}" for text in _unknown(record))
    title = f"# {run.objective} on {run.dataset.dataset} at {run.dataset.resolution}x{run.dataset.resolution}"
    sections = (f"---\n{front}\n---", title, facts, "## Use", use.strip(), "## What is unknown", unknown)
    return "\n\n".join(sections) + "\n"


def _origins(record: RunRecord) -> list[Origin]:
    return [origin for origin in (record.origin, record.guide_origin) if origin is not None]


def _metadata(run: Run, record: RunRecord) -> JsonObject:
    """The front matter; each value as JSON, which YAML reads too."""
    origins = _origins(record)
    licence: JsonObject = {"license": "unknown"}
    if origins:
        names = dict.fromkeys(origin.licence for origin in origins)
        licence = {
            "license": "other",
            "license_name": "; ".join(names),
            "license_link": f"https://{origins[0].source}",
        }
    captioned = run.dataset.encoding is not None
    return {
        **licence,
        "library_name": "mcm_jax",
        "pipeline_tag": "text-to-image" if captioned else "unconditional-image-generation",
        "tags": list(dict.fromkeys(["jax", "diffusion", "multistep-consistency-models", run.objective])),
        "mcm_jax": {
            "version": mcm_jax.__version__,
            "objective": run.objective,
            "student_steps": run.student_steps,
            "dataset": run.dataset.dataset,
            "resolution": run.dataset.resolution,
            "checkpoint_step": run.checkpoint_step,
            "parameters": run.parameters,
            "origin": [origin.to_json() for origin in origins],
        },
    }


def _facts(run: Run, record: RunRecord) -> dict[str, str]:
    config, dataset, settings = record.config, run.dataset, run.sampling()
    count = sum(leaf.size for leaf in jax.tree.leaves(run.params))
    steps = f"trained for {', '.join(map(str, run.student_steps))}" if run.student_steps else "any number"
    condition = f"{dataset.num_classes} classes"
    if dataset.encoding is not None:
        condition = f"captions, embedded by {dataset.encoding.encoder}"
    facts = {
        "Objective": run.objective,
        "Sampling steps": f"{steps}; by default {settings.steps} of {settings.label}",
        "Data set": f"{dataset.dataset} at {dataset.resolution}x{dataset.resolution}, "
        f"{dataset.num_examples['train']:,} training images, conditioned on {condition}",
        "Its source": dataset.source,
        "Preparation of the images": dataset.preprocessing,
        "Network": f"{config.architecture} with {count:,} parameters, {_PARAMETERS[run.parameters]}",
        "Training": f"{run.checkpoint_step:,} of {config.training.num_steps:,} updates of "
        f"{config.training.batch_size:,} images, seed {config.seed}",
    }
    if config.teacher_checkpoint is not None:
        facts["Started from"] = config.teacher_checkpoint
    for name, origin in (("Origin", record.origin), ("Origin of its guide", record.guide_origin)):
        if origin is not None:
            facts[name] = f"{origin.file} ({origin.kind}) of {origin.source}, sha256 {origin.sha256}"
            facts[f"Licence of {origin.file}"] = origin.licence
    facts["Written by"] = f"mcm_jax {mcm_jax.__version__}"
    return facts


def _unknown(record: RunRecord) -> list[str]:
    licence = "The licence of the parameters: the run records none. Its author must add one."
    if _origins(record):
        licence = "Whether the licence above allows your use: read it."
    return [
        licence,
        "The licence of the training images: the run does not record it.",
        "The quality of the samples: `python -m mcm_jax.evaluate` measures it; this card has no results.",
        "Biases and limits: nobody has examined them.",
    ]
