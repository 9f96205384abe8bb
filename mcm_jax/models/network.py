"""Wraps a Flax NNX module as two pure functions of a plain dict of parameters."""

import dataclasses
import functools
from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PyTree

from mcm_jax.diffusion.conditions import Cond
from mcm_jax.models.conditions import Classes, Condition
from mcm_jax.models.placement import Placement

# Nested dict: module -> ... -> parameter.
Params = dict[str, PyTree]


@runtime_checkable
class NetworkSettings(Protocol):
    """All sizes of a network: `uvit.UViTSettings` for images, `mlp.MLPSettings` for vectors."""

    def build(
        self,
        shape: tuple[int, ...],
        *,
        condition: Condition,
        takes_end: bool,
        placement: Placement,
        rngs: nnx.Rngs,
    ) -> nnx.Module:
        """Builds the module for examples of this shape; call it with (z_t, logsnr_t, cond, key, logsnr_u)."""
        ...


@dataclasses.dataclass(frozen=True)
class Network:
    """init(key) -> parameters; apply(parameters, z_t, logsnr_t, cond, key, logsnr_u) -> v_hat.

    Attributes:
      settings: the sizes of the network.
      shape: the shape of an example: (resolution, resolution, channels) for images, (dimension,) for vectors.
      condition: the kind of `cond`: class labels or captions.
      placement: how the computation is split over devices.
      takes_end: whether the network receives the end of the step, as students of several numbers of steps and
        flow maps do.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mcm_jax.models.mlp import MLPSettings
      >>> network = Network(MLPSettings(width=8, blocks=1), shape=(2,))
      >>> params = jax.jit(network.init)(jax.random.key(0))
      >>> network.apply(params, jnp.ones((3, 2)), jnp.zeros(3), jnp.zeros(3, jnp.int32), None).shape
      (3, 2)
    """

    settings: NetworkSettings
    shape: tuple[int, ...]
    condition: Condition = Classes()
    placement: Placement = Placement()
    takes_end: bool = False

    def init(self, key: jax.Array) -> Params:
        """Initialises float32 parameters; can be traced by jit or eval_shape."""
        return nnx.to_pure_dict(nnx.state(_build(self, nnx.Rngs(params=key)), nnx.Param))

    def init_from(self, key: jax.Array, params: Params) -> Params:
        """This network's parameters, given those of a network that does not take the end of the step.

        With them, this network ignores the end and computes the same.

        Args:
          key: initialises the parameters that only this network has.
        """
        if not self.takes_end:
            return params
        return unflatten_dict(flatten_dict(self.init(key)) | flatten_dict(params))

    @property
    def without_end(self) -> "Network":
        """The network of a teacher, which does not receive the end of the step."""
        return dataclasses.replace(self, takes_end=False)

    @property
    def abstract_params(self) -> Params:
        """The shapes and dtypes of the parameters, as jax.ShapeDtypeStruct."""
        return nnx.to_pure_dict(_structure(self)[1])

    def apply(
        self,
        params: Params,
        z_t: Float[Array, "B ..."],
        logsnr_t: Float[Array, " B"],
        cond: Cond,
        key: jax.Array | None,
        logsnr_u: Float[Array, " B"] | None = None,
    ) -> Float[Array, "B ..."]:
        """v_hat(z_t, lambda_t, cond).

        Args:
          key: the randomness of dropout; None disables it.
          logsnr_u: the log-SNR at the end of the step, if and only if the network takes it.
        """
        if self.takes_end != (logsnr_u is not None):
            needs = "needs" if self.takes_end else "does not take"
            raise ValueError(f"this network {needs} the end of the step, logsnr_u")
        return self._module(params)(z_t, logsnr_t, cond, key, logsnr_u)

    def rounded(self, params: Params) -> Params:
        """Casts the weights of every layer to the dtype in which the layer multiplies.

        `apply` returns the same values with them. If the dtype is bfloat16, devices exchange half as many
        bytes.
        """
        model = self._module(params)
        for _, layer in nnx.iter_modules(model):
            if isinstance(layer, nnx.Linear | nnx.Conv) and layer.dtype is not None:
                for weights in (layer.kernel, layer.bias):
                    if weights is not None:
                        weights.set_value(weights[...].astype(layer.dtype))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def _module(self, params: Params) -> nnx.Module:
        """The module with these parameters, built without initialising any."""
        graphdef, state = _structure(self)
        # A variable can be set only within the trace that created it, so each trace creates its own.
        model = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))
        nnx.update(model, params)
        return model


def _build(network: Network, rngs: nnx.Rngs) -> nnx.Module:
    return network.settings.build(
        network.shape,
        condition=network.condition,
        takes_end=network.takes_end,
        placement=network.placement,
        rngs=rngs,
    )


@functools.lru_cache(maxsize=32)
def _structure(network: Network) -> tuple[Any, Any]:
    """The module's graph and abstract parameters; built once, used by every trace of `apply`."""
    return nnx.split(nnx.eval_shape(lambda: _build(network, nnx.Rngs(0))), nnx.Param)
