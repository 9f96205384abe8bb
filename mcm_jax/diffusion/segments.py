"""Student segments and the teacher's grid inside them (MCM Algorithm 1; SPEC 4, steps 1 to 3)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

PRNGKey = jax.Array


def annealed_teacher_steps(
    train_step: Int[Array, ""], *, first: float, last: float, anneal_steps: int
) -> Float[Array, ""]:
    """N_teacher(i) = exp(log first + clip(i / anneal_steps, 0, 1) (log last - log first)).

    Args:
      train_step: i, the number of updates done so far.
      first, last: teacher steps over the whole of [0, 1], at i = 0 and from i = anneal_steps on. Equal values
        give the constant N_teacher of the ablation.
      anneal_steps: length of the annealing in updates, at least 1.

    Examples:
      >>> n = annealed_teacher_steps(jnp.int32(50_000), first=64.0, last=1280.0, anneal_steps=100_000)
      >>> round(float(n), 1)
      286.2
    """
    fraction = jnp.clip(train_step / anneal_steps, 0.0, 1.0)
    return jnp.exp(np.log(first) + fraction * (np.log(last) - np.log(first)))


def doubling_teacher_steps(
    train_step: Int[Array, ""], *, first: float, last: float, anneal_steps: int
) -> Float[Array, ""]:
    """N_teacher(i) = min(first 2^floor(i / K'), last): it doubles at equal intervals (iCT, arXiv:2310.14189).

    K' = floor(anneal_steps / (log2(floor(last / first)) + 1)), and at least 1.

    Examples:
      >>> n = doubling_teacher_steps(jnp.int32(50_000), first=10.0, last=1280.0, anneal_steps=400_000)
      >>> float(n)
      20.0
    """
    interval = max(1, int(anneal_steps / (np.log2(np.floor(last / first)) + 1)))
    return jnp.minimum(first * 2.0 ** (train_step // interval), last)


def steps_per_segment(
    teacher_steps: Float[Array, ""], *, student_steps: int | Int[Array, " B"]
) -> Int[Array, "*B"]:
    """N_per = max(1, round(N_teacher / S)), the number of teacher steps in one student step.

    Examples:
      >>> int(steps_per_segment(jnp.float32(286.2), student_steps=8))
      36
    """
    return jnp.maximum(1, jnp.round(teacher_steps / student_steps)).astype(jnp.int32)


class Times(NamedTuple):
    """A batch of teacher steps t -> s, each inside a student segment that ends at t_step <= s < t."""

    t: Float[Array, " B"]
    s: Float[Array, " B"]
    t_step: Float[Array, " B"]
    is_last: Bool[Array, " B"]  # whether s = t_step: the teacher step ends at the end of the segment


def draw_times(
    key: PRNGKey,
    *,
    batch_size: int,
    student_steps: int | Int[Array, " B"],
    steps_per_segment: Int[Array, "*B"],
) -> Times:
    """step ~ U{0..S-1}, n_rel ~ U{1..N_per}; t = (step N_per + n_rel) / T, s = t - 1/T, T = N_per S.

    S and N_per may differ between examples.

    The times are computed from integers, so s = t_step is decided exactly (n_rel = 1), and both are then the
    same float.

    Examples:
      >>> import jax
      >>> times = draw_times(
      ...     jax.random.key(0), batch_size=5, student_steps=4, steps_per_segment=jnp.int32(16)
      ... )
      >>> bool(jnp.all((times.t_step <= times.s) & (times.s < times.t)))
      True
    """
    key_step, key_rel = jax.random.split(key)
    step = jax.random.randint(key_step, (batch_size,), 0, student_steps)
    n_rel = jax.random.randint(key_rel, (batch_size,), 1, steps_per_segment + 1)
    start = step * steps_per_segment
    grid_steps = (student_steps * steps_per_segment).astype(jnp.float32)
    return Times(
        t=(start + n_rel) / grid_steps,
        s=(start + n_rel - 1) / grid_steps,
        t_step=start / grid_steps,
        is_last=n_rel == 1,
    )


def draw_continuous_times(
    key: PRNGKey, *, batch_size: int, student_steps: int | Int[Array, " B"]
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """(t, t_step): t ~ U(0, 1) and the end of its segment, t_step = floor(S t) / S."""
    t = jax.random.uniform(key, (batch_size,))
    return t, jnp.floor(t * student_steps) / student_steps


def draw_jumps(
    key: PRNGKey, *, batch_size: int, student_steps: int
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """(t, s): s ~ U(0, 1) and t = min(s + U(0, 1 / S), 1), at most a student's step apart.

    Examples:
      >>> t, s = draw_jumps(jax.random.key(0), batch_size=5, student_steps=4)
      >>> bool(jnp.all((s <= t) & (t <= s + 1 / 4) & (t <= 1)))
      True
    """
    key_s, key_gap = jax.random.split(key)
    s = jax.random.uniform(key_s, (batch_size,))
    return jnp.minimum(s + jax.random.uniform(key_gap, (batch_size,)) / student_steps, 1.0), s


def draw_halves(
    key: PRNGKey, *, batch_size: int, student_steps: int | Int[Array, " B"]
) -> tuple[Float[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
    """(t, m, s): a student step t -> s and its midpoint m, at which two teacher steps meet.

    s = 2 step / 2S, m = (2 step + 1) / 2S, t = (2 step + 2) / 2S with step ~ U{0..S-1}, computed from
    integers (arXiv:2202.00512). S may differ between examples.
    """
    start = 2 * jax.random.randint(key, (batch_size,), 0, student_steps)
    t, m, s = ((start + n) / jnp.asarray(2 * student_steps, jnp.float32) for n in (2, 1, 0))
    return t, m, s
