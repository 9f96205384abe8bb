"""What students of consistency have in common: the numbers of steps that they are trained for."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mcm_jax.diffusion import network
from mcm_jax.diffusion.network import ModelFn
from mcm_jax.fields import setting


@dataclasses.dataclass(frozen=True)
class Multistep:
    """The settings of one student for one or several numbers of steps.

    With several, each example draws its own S, and the network receives the log-SNR at the end of the
    example's segment as a further input. Where the segments of two S are the same, so is their task.
    """

    student_steps: tuple[int, ...] = setting(
        (),
        "S, network calls of the student's sampler; 1 is an ordinary consistency model, and several numbers "
        "train one student for all of them",
        low=1,
    )
    steps_power: float = setting(
        0.0, "several student_steps: S is drawn in proportion to S^steps_power", low=-4, high=4
    )
    steps_weight_power: float = setting(
        0.0,
        "several student_steps: the loss is weighted in proportion to S^steps_weight_power, with mean 1",
        low=-4,
        high=4,
    )
    teacher_guidance: float = setting(
        0.0, "cd and scd: g of the teacher's prediction; 0: none (open, see `teacher_prediction`)", low=0
    )

    @property
    def takes_end(self) -> bool:
        """Whether the network receives the end of its step: with one S, its time determines the end."""
        return len(self.student_steps) > 1

    def draw_steps(self, key: jax.Array, batch_size: int) -> int | Int[Array, " B"]:
        """S, or with several numbers of steps, one for each example."""
        if not self.student_steps:
            raise ValueError("student_steps is not set")
        if not self.takes_end:
            return self.student_steps[0]
        logits = self.steps_power * jnp.log(jnp.array(self.student_steps))
        return jnp.array(self.student_steps)[jax.random.categorical(key, logits, shape=(batch_size,))]

    def steps_weight(self, student_steps: int | Int[Array, " B"]) -> Float[Array, " B"] | float:
        """S^b / E[S^b], b = steps_weight_power; 1 with one S."""
        if not self.takes_end:
            return 1.0
        log_steps = jnp.log(jnp.array(self.student_steps))
        probabilities = jax.nn.softmax(self.steps_power * log_steps)
        mean = jnp.sum(probabilities * jnp.exp(self.steps_weight_power * log_steps))
        return jnp.asarray(student_steps, jnp.float32) ** self.steps_weight_power / mean

    def until(self, model_fn: ModelFn, logsnr_step: Float[Array, " B"]) -> ModelFn:
        """model_fn, given the log-SNR at the end of each example's step if it takes that input."""
        return network.until(model_fn, logsnr_step) if self.takes_end else model_fn
