"""A Flax NNX module as two pure functions over a plain dict of parameters."""

import dataclasses
from typing import Any, Protocol

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

Params = dict[str, Any]


class Spec(Protocol):
    """Every size of a network: `uvit.UViTSpec` for images, `mlp.MLPSpec` for vectors."""

    num_classes: int

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The module, called with (z_t, logsnr_t, label, key)."""


@dataclasses.dataclass(frozen=True)
class Network:
    """init(key) -> parameters; apply(parameters, z_t, logsnr_t, label, key) -> v_hat."""

    spec: Any  # a Spec

    @property
    def null_class(self) -> int:
        """The label that stands for 'any class'."""
        return self.spec.num_classes

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters. Traceable: use it under jit or eval_shape."""
        return nnx.to_pure_dict(nnx.state(self.spec.build(nnx.Rngs(params=key)), nnx.Param))

    def apply(
        self,
        params: Params,
        z_t: Float[Array, "B ..."],
        logsnr_t: Float[Array, "B"],
        label: Int[Array, "B"],
        key: jax.Array | None,
    ) -> Float[Array, "B ..."]:
        """v_hat(z_t, lambda_t, label); `key` is dropout's, None switches it off."""
        return self._module(params)(z_t, logsnr_t, label, key)

    def rounded(self, params: Params) -> Params:
        """`params` with the weights of every layer in the dtype that it multiplies in.

        `apply` gives the same with them, and they are half as large to send where that is bfloat16.
        """
        model = self._module(params)
        for _, layer in nnx.iter_modules(model):
            if isinstance(layer, nnx.Linear | nnx.Conv) and layer.dtype is not None:
                for weights in (layer.kernel, layer.bias):
                    if weights is not None:
                        weights.set_value(weights[...].astype(layer.dtype))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def _module(self, params: Params) -> nnx.Module:
        """The module with these parameters; nothing is initialised."""
        model = nnx.eval_shape(lambda: self.spec.build(nnx.Rngs(0)))
        nnx.update(model, params)
        return model
