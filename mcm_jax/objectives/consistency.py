"""Multistep consistency training and distillation (MCM Algorithm 1; SPEC 4).

Everything between z_t and the loss is written in terms of y = z / sigma and rho = alpha / sigma, in which a
DDIM step is a straight line with slope x, and two consecutive steps equal one step with a weighted mean of
their x. This reduces Algorithm 1's invDDIM(DDIM(x_ref, aDDIM(x_teacher, z_t)), z_t) to one line,
`consistency_target`, which is exact at the segment's end.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mcm_jax.diffusion import guidance, process, segments, steps
from mcm_jax.diffusion.conditions import Cond
from mcm_jax.diffusion.network import ModelFn
from mcm_jax.diffusion.schedules import Schedule
from mcm_jax.fields import setting
from mcm_jax.objectives.distances import Distance, LossWeight, Reduction, distance, weight
from mcm_jax.objectives.levels import Proposal, draw_in_segments, ect_logsnr
from mcm_jax.objectives.multistep import Multistep
from mcm_jax.objectives.objective import Networks

TeacherStep = Literal["addim", "ddim"]
TeacherGrid = Literal["annealed", "doubling", "ect"]
StepWeight = Literal[LossWeight, "inverse_gap"]
Integrator = Literal[TeacherStep, "heun"]
TargetNetwork = Literal["student", "ema"]


class Levels(NamedTuple):
    """The log-SNRs at both ends of a teacher's step t -> s, and at the end t_step of its segment."""

    logsnr_t: Float[Array, " B"]
    logsnr_s: Float[Array, " B"]
    logsnr_step: Float[Array, " B"]
    is_last: Bool[Array, " B"]  # whether s = t_step


@dataclasses.dataclass(frozen=True)
class Consistency(Multistep):
    """w_t huber(x_target - f(z_t, t)) (MCM Algorithm 1): CD with networks.teacher, CT without.

    The gradient flows only through f(z_t, t). Both calls of the student share their dropout mask.
    """

    teacher_grid: TeacherGrid = setting(
        "annealed",
        "how the teacher's steps become shorter: annealed, N_teacher grows exponentially (MCM); doubling, it "
        "doubles at equal intervals of anneal_steps (iCT); ect, off the grid, by the factor ect_q in each "
        "stage (ECT)",
    )
    teacher_steps_first: float = setting(64.0, "N_teacher at the first update", low=1)
    teacher_steps_last: float = setting(1280.0, "N_teacher at the end of the annealing", low=1)
    anneal_steps: int = setting(
        100_000, "updates of the annealing from first to last; with doubling, K of iCT", low=1
    )
    ect_q: float = setting(2.0, "ect: q; ECT on ImageNet-64: 4", low=1.001)
    ect_stages: int = setting(8, "ect: number of stages; the last one stays (open)", low=1, high=16)
    ect_stage_steps: int = setting(25_000, "ect: updates of a stage (open)", low=1)
    proposal: Proposal = setting(
        "uniform", "ect: distribution of t, uniform or lognormal (as in ECT), see proposal_mean"
    )
    proposal_mean: float = setting(-1.1, "lognormal: mean of log(sigma / alpha) (that of the published code)")
    proposal_std: float = setting(
        2.0, "lognormal: standard deviation of log(sigma / alpha) (that of the published code)", low=1e-3
    )
    teacher_step: Integrator = setting(
        "addim", "integrator of the teacher's step; heun (not the paper's) calls the teacher once more"
    )
    xvar_frac: float = setting(0.75, "x_var = xvar_frac ||x_teacher - x||^2 / d", low=0)
    distance: Distance = setting("huber", "huber or squared, see `distances.distance`")
    huber_epsilon: float = setting(
        1e-4,
        "pseudo-Huber's epsilon, in units of a pixel; on data of few dimensions a small one favours the "
        "largest mode, see `distances.pseudo_huber`",
        low=1e-30,
    )
    huber_reduction: Reduction = setting(
        "mean", "reduction of the squares in the distance (open; see `distances.pseudo_huber`)"
    )
    loss_weight: StepWeight = setting(
        "sqrt_snr_plus_one",
        "w_t (open); sqrt_snr_plus_one makes the unsquared distance in x one in v, see `distances.weight`; "
        "not the paper's: edm (as in ECT), its root sqrt_edm, and inverse_gap, one over the difference of "
        "the noise levels sigma / alpha at t and s (as in iCT)",
    )
    target_network: TargetNetwork = setting(
        "student", "the network of x_ref: the student itself, or its averaged parameters (ema)"
    )
    target_decay: float = setting(
        0.95, "target_network=ema: decay of its bias-corrected average (open)", low=0, high=0.999999
    )

    def __call__(
        self,
        networks: Networks,
        x: Float[Array, "B ..."],
        cond: Cond,
        key: jax.Array,
        train_step: Int[Array, ""],
    ) -> Float[Array, " B"]:
        """The loss of every example; see `objective.Objective`."""
        key_times, key_eps, key_dropout = jax.random.split(key, 3)
        # No bits are shared with the draw of times, which splits the keys that it makes of key_times.
        student_steps = self.draw_steps(jax.random.fold_in(key_times, 0), len(x))
        levels = self._draw_levels(key_times, len(x), networks.schedule, train_step, student_steps)
        logsnr_t, logsnr_s, logsnr_step, is_last = levels
        z_t = process.diffuse(x, jax.random.normal(key_eps, x.shape), logsnr_t=logsnr_t)

        x_step = self._teacher_x(networks, x, z_t, cond, logsnr_t=logsnr_t, logsnr_s=logsnr_s)
        z_s = steps.ddim(x_step, z_t, logsnr_t=logsnr_t, logsnr_s=logsnr_s)

        target_fn = self.until(networks.target or networks.student, logsnr_step)
        v_ref = target_fn(z_s, logsnr_s, cond, key_dropout)
        x_ref = jax.lax.stop_gradient(process.x_from_v(v_ref, z_s, logsnr_t=logsnr_s))
        x_target = consistency_target(
            x_step,
            x_ref,
            logsnr_t=logsnr_t,
            logsnr_s=logsnr_s,
            logsnr_step=logsnr_step,
            is_last=is_last,
        )
        v_hat = self.until(networks.student, logsnr_step)(z_t, logsnr_t, cond, key_dropout)
        x_diff = x_target - process.x_from_v(v_hat, z_t, logsnr_t=logsnr_t)
        w_t = self._weight(logsnr_t, logsnr_s) * self.steps_weight(student_steps)
        return w_t * distance(
            x_diff, kind=self.distance, huber_epsilon=self.huber_epsilon, reduction=self.huber_reduction
        )

    def _draw_levels(
        self,
        key: jax.Array,
        batch_size: int,
        schedule: Schedule,
        train_step: Int[Array, ""],
        student_steps: int | Int[Array, " B"],
    ) -> Levels:
        """Draws the teacher's steps of `train_step` inside the student's segments."""
        if self.teacher_grid == "ect":
            logsnr_t, logsnr_step = draw_in_segments(
                key,
                schedule,
                jnp.broadcast_to(student_steps, (batch_size,)),
                most_steps=max(self.student_steps),
                proposal=self.proposal,
                mean=self.proposal_mean,
                std=self.proposal_std,
            )
            # The draws end there; at twice that noise level, the step is still one of ECT's.
            logsnr_t = jnp.minimum(logsnr_t, schedule(jnp.zeros(())) - 2 * jnp.log(2.0))
            stage = jnp.minimum(train_step // self.ect_stage_steps, self.ect_stages - 1)
            logsnr_s = ect_logsnr(logsnr_t, logsnr_step, stage=stage, q=self.ect_q)
            return Levels(logsnr_t, logsnr_s, logsnr_step, logsnr_s == logsnr_step)
        doubling = self.teacher_grid == "doubling"
        grow = segments.doubling_teacher_steps if doubling else segments.annealed_teacher_steps
        teacher_steps = grow(
            train_step,
            first=self.teacher_steps_first,
            last=self.teacher_steps_last,
            anneal_steps=self.anneal_steps,
        )
        n_per = segments.steps_per_segment(teacher_steps, student_steps=student_steps)
        times = segments.draw_times(
            key, batch_size=batch_size, student_steps=student_steps, steps_per_segment=n_per
        )
        return Levels(schedule(times.t), schedule(times.s), schedule(times.t_step), times.is_last)

    def _weight(self, logsnr_t: Float[Array, " B"], logsnr_s: Float[Array, " B"]) -> Float[Array, " B"]:
        if self.loss_weight == "inverse_gap":
            return 1 / (jnp.exp(-logsnr_t / 2) - jnp.exp(-logsnr_s / 2))
        return weight(logsnr_t, kind=self.loss_weight)

    def _teacher_x(
        self,
        networks: Networks,
        x: Float[Array, "B ..."],
        z_t: Float[Array, "B ..."],
        cond: Cond,
        *,
        logsnr_t: Float[Array, " B"],
        logsnr_s: Float[Array, " B"],
    ) -> Float[Array, "B ..."]:
        """`teacher_x` with the teacher's prediction (CD) or with the data (CT)."""
        x_teacher, x_cond = x, x
        if networks.teacher is not None:
            predict = functools.partial(
                teacher_prediction,
                networks.teacher,
                networks.require_guide(),
                cond=cond,
                teacher_guidance=self.teacher_guidance,
            )
            x_teacher, x_cond = predict(z_t, logsnr_t=logsnr_t)
            if self.teacher_step == "heun":
                z_s = steps.ddim(x_teacher, z_t, logsnr_t=logsnr_t, logsnr_s=logsnr_s)
                x_second, _ = predict(z_s, logsnr_t=logsnr_s)
                return steps.heun_x(x_teacher, x_second, logsnr_t=logsnr_t, logsnr_s=logsnr_s)
        return teacher_x(
            x_teacher,
            z_t,
            x_var=self.xvar_frac * process.mean_square(x_cond - x),
            logsnr_t=logsnr_t,
            logsnr_s=logsnr_s,
            teacher_step="ddim" if self.teacher_step == "heun" else self.teacher_step,
        )


def teacher_prediction(
    teacher_fn: ModelFn,
    guide_fn: ModelFn,
    z_t: Float[Array, "B ..."],
    cond: Cond,
    *,
    logsnr_t: Float[Array, " B"],
    teacher_guidance: float,
) -> tuple[Float[Array, "B ..."], Float[Array, "B ..."]]:
    """(guided, conditional) x_hat of the teacher, without dropout; both are equal if teacher_guidance = 0.

    Guidance costs a call of the guide. The paper does not say where guidance enters; ours takes the step with
    the guided prediction but uses the x_var of the conditional prediction in aDDIM (SPEC 3).
    """
    v_cond = teacher_fn(z_t, logsnr_t, cond, None)
    x_cond = process.x_from_v(v_cond, z_t, logsnr_t=logsnr_t)
    if teacher_guidance == 0:
        return x_cond, x_cond
    v_guide = guide_fn(z_t, logsnr_t, cond, None)
    x_guide = process.x_from_v(v_guide, z_t, logsnr_t=logsnr_t)
    return guidance.guide(x_cond, x_guide, guidance=teacher_guidance), x_cond


def teacher_x(
    x_teacher: Float[Array, "B ..."],
    z_t: Float[Array, "B ..."],
    *,
    x_var: Float[Array, " B"],
    logsnr_t: Float[Array, " B"],
    logsnr_s: Float[Array, " B"],
    teacher_step: TeacherStep,
) -> Float[Array, "B ..."]:
    """The x whose DDIM step from t to s equals the teacher's step.

    Args:
      x_var: aDDIM's variance; in training, xvar_frac ||x_teacher - x||^2 / d per example (SPEC 3a).
      teacher_step: the integrator; any deterministic step equals a DDIM step with some x.
    """
    if teacher_step == "ddim":
        return x_teacher
    return steps.addim_x(x_teacher, z_t, logsnr_t=logsnr_t, logsnr_s=logsnr_s, x_var=x_var)


def consistency_target(
    x_step: Float[Array, "B ..."],
    x_ref: Float[Array, "B ..."],
    *,
    logsnr_t: Float[Array, " B"],
    logsnr_s: Float[Array, " B"],
    logsnr_step: Float[Array, " B"],
    is_last: Bool[Array, " B"],
) -> Float[Array, "B ..."]:
    """x_target = (1 - w) x_step + w x_ref, w = (rho_u - rho_s) / (rho_u - rho_t), u = t_step.

    It equals invDDIM_{t->u}(DDIM_{s->u}(x_ref, z_s), z_t) with z_s = DDIM_{t->s}(x_step, z_t). On the
    segment's last step, s = u, it is x_step itself, whatever x_ref is: this anchor prevents collapse.

    Args:
      x_step: the x whose DDIM step from t to s equals the teacher's step.
      x_ref: the student's prediction at s.
      logsnr_t, logsnr_s, logsnr_step: log-SNRs at t, s and t_step, where t_step <= s < t.
      is_last: whether s = t_step.
    """
    x_target = steps.composed_x(x_step, x_ref, logsnr_t=logsnr_t, logsnr_m=logsnr_s, logsnr_s=logsnr_step)
    return jnp.where(process.over_pixels(is_last, x_ref), x_step, x_target)
