"""A UViT as two pure functions over a plain dict of parameters."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from mcm_jax.models.uvit import UViT, UViTSpec

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Network:
    """init(key) -> parameters; apply(parameters, z_t, logsnr_t, label, key) -> v_hat."""

    spec: UViTSpec

    @property
    def null_class(self) -> int:
        """The label that stands for 'any class'."""
        return self.spec.num_classes

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters. Traceable: use it under jit or eval_shape."""
        return nnx.to_pure_dict(nnx.state(UViT(self.spec, rngs=nnx.Rngs(params=key)), nnx.Param))

    def apply(
        self,
        params: Params,
        z_t: Float[Array, "B H W C"],
        logsnr_t: Float[Array, "B"],
        label: Int[Array, "B"],
        key: jax.Array | None,
    ) -> Float[Array, "B H W C"]:
        """v_hat(z_t, lambda_t, label); `key` is dropout's, None switches it off."""
        model = nnx.eval_shape(lambda: UViT(self.spec, rngs=nnx.Rngs(0)))
        nnx.update(model, params)
        return model(z_t, logsnr_t, label, key)
