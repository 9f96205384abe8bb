"""The libraries that take seconds to import."""

LIBRARIES = (
    "beartype",
    "clu.metric_writers",
    "flax.nnx",
    "grain",
    "hypothesis.extra.numpy",
    "jax.experimental.pallas.ops.tpu.splash_attention",
    "matplotlib.figure",
    "orbax.checkpoint",
    "PIL.Image",
    "pytest",
    "rich.progress",
    "scipy.stats",
    "tensorflow_datasets",
)
