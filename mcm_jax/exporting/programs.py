"""A run's sampler as a program that JAX runs without this package."""

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array, Float, Int, UInt8, UInt32

from mcm_jax.data.layout import DatasetInfo
from mcm_jax.records import Sampling
from mcm_jax.runs import exported, samplers
from mcm_jax.runs.run import Run
from mcm_jax.system.errors import InputError
from mcm_jax.system.paths import Path

PLATFORMS = ("cpu", "cuda", "tpu")


def exported_sampler(run: Run, settings: Sampling) -> export.Exported:
    """(params, seed uint32 [], labels int32 [b]) -> images uint8 [b, r, r, 3], for any b, on `PLATFORMS`.

    Image n is image n of `run.sample(b, seed=seed, labels=labels)`. Labels are not checked: they must lie in
    the run's range. `params` is `exported.by_name(run.params)`.

    The parameters could instead be constants of the program. It would then be a single file, but of at most
    2 GB, and the compiler would copy the constants: with 400 MB of them, a program of four matrix products
    took 31 seconds and 3.8 GB of memory to load and run on 2 CPU cores.

    Args:
      settings: from `run.sampling`, without a guide.

    Raises:
      InputError: the run is conditioned on captions.

    Examples:
      >>> program = exported_sampler(run, run.sampling())  # doctest: +SKIP
      >>> params = exported.by_name(run.params)  # doctest: +SKIP
      >>> images = program.call(params, np.uint32(0), np.array([2, 7], np.int32))  # doctest: +SKIP
    """
    require_labels(run.dataset, run.workdir)
    x_var = run.x_var(settings)
    # The network as it is: on no mesh, with attention that every platform can compute.
    sample = samplers.sampler_fn(run.config, run.network, settings)
    abstract = run.network.abstract_params

    def draw(
        tensors: dict[str, Float[Array, "..."]], seed: UInt32[Array, ""], labels: Int[Array, " b"]
    ) -> UInt8[Array, "b r r 3"]:
        params = exported.as_tree(tensors, abstract)
        indices = jnp.arange(labels.shape[0], dtype=jnp.int32)
        images, _ = sample(params, jax.random.key(seed), x_var, indices, labels)
        return images

    (b,) = export.symbolic_shape("b")
    labels = jax.ShapeDtypeStruct((b,), jnp.int32)
    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    return export.export(jax.jit(draw), platforms=PLATFORMS)(exported.by_name(abstract), seed, labels)


def require_labels(dataset: DatasetInfo, workdir: Path | None) -> None:
    """Raises InputError for a run on captions, because the program has no text encoder."""
    if dataset.encoding is not None:
        raise InputError(
            f"--format=stablehlo: {workdir} is conditioned on captions, and its text encoder is not part "
            "of the sampler; use --format=safetensors"
        )
