"""Algorithm 1 of the paper in PyTorch, with its DDIM and invDDIM as printed."""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

# (z_t [B, C, H, W], log-SNR [B], label [B]) -> v_hat [B, C, H, W].
VHat = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Times:
    """Log-SNRs at t, at the teacher's next point s, and at the end u of the student's segment."""

    logsnr_t: Tensor
    logsnr_s: Tensor
    logsnr_u: Tensor


def alpha_sigma(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """For images NCHW."""
    return tuple(torch.sigmoid(sign * logsnr).sqrt()[:, None, None, None] for sign in (1, -1))


def x_hat(model: VHat, z: Tensor, logsnr: Tensor, label: Tensor) -> Tensor:
    alpha, sigma = alpha_sigma(logsnr)
    return alpha * z - sigma * model(z, logsnr, label)


def mean_square(x: Tensor) -> Tensor:
    return x.square().mean(dim=(1, 2, 3), keepdim=True)


def ddim(x: Tensor, z_t: Tensor, logsnr_t: Tensor, logsnr_s: Tensor) -> Tensor:
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(logsnr_t), alpha_sigma(logsnr_s)
    return alpha_s * x + sigma_s / sigma_t * (z_t - alpha_t * x)


def inv_ddim(z_s: Tensor, z_t: Tensor, logsnr_t: Tensor, logsnr_s: Tensor) -> Tensor:
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(logsnr_t), alpha_sigma(logsnr_s)
    return (z_s - sigma_s / sigma_t * z_t) / (alpha_s - alpha_t * sigma_s / sigma_t)


def addim(x: Tensor, z_t: Tensor, x_var: Tensor, logsnr_t: Tensor, logsnr_s: Tensor) -> Tensor:
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(logsnr_t), alpha_sigma(logsnr_s)
    eps = (z_t - alpha_t * x) / sigma_t
    z_s_var = (alpha_s - alpha_t * sigma_s / sigma_t) ** 2 * x_var
    return alpha_s * x + torch.sqrt(sigma_s**2 + z_s_var / mean_square(eps)) * eps


def loss(
    student: VHat,
    teacher: VHat | None,
    x: Tensor,
    label: Tensor,
    eps: Tensor,
    times: Times,
    *,
    xvar_frac: float,
    huber_epsilon: float,
) -> Tensor:
    """The mean loss of a batch: CD with a teacher, CT without."""
    t, s, u = times.logsnr_t, times.logsnr_s, times.logsnr_u
    alpha_t, sigma_t = alpha_sigma(t)
    z_t = alpha_t * x + sigma_t * eps
    with torch.no_grad():
        x_teacher = x if teacher is None else x_hat(teacher, z_t, t, label)
        z_s = addim(x_teacher, z_t, xvar_frac * mean_square(x_teacher - x), t, s)
        z_u = ddim(x_hat(student, z_s, s, label), z_s, s, u)
        x_target = inv_ddim(z_u, z_t, t, u)
    square = mean_square(x_target - x_hat(student, z_t, t, label)).flatten()
    return torch.mean(torch.sqrt(1 + t.exp()) * (torch.sqrt(square + huber_epsilon**2) - huber_epsilon))


def draw_times(batch: int, *, student_steps: int, teacher_steps: int, device: torch.device) -> Times:
    """Algorithm 1's times under the plain cosine schedule, within t = 0.003 and 0.997."""
    per_segment = teacher_steps // student_steps
    segment = torch.randint(student_steps, (batch,), device=device)
    position = torch.randint(1, per_segment + 1, (batch,), device=device)

    def logsnr(point: Tensor) -> Tensor:
        t = (point / teacher_steps).clamp(0.003, 0.997)
        return -2 * torch.log(torch.tan(math.pi / 2 * t))

    start = segment * per_segment
    return Times(logsnr(start + position), logsnr(start + position - 1), logsnr(start))


@torch.inference_mode()
def sample(model: VHat, z_1: Tensor, label: Tensor, *, steps: int) -> Tensor:
    """uint8 images by DDIM under the plain cosine schedule."""
    points = torch.linspace(0.997, 1 / steps, steps, device=z_1.device)
    grid = -2 * torch.log(torch.tan(math.pi / 2 * points))
    z = z_1
    for i in range(steps):
        logsnr_t = grid[i].expand(len(z))
        x = x_hat(model, z, logsnr_t, label)
        z = x if i == steps - 1 else ddim(x, z, logsnr_t, grid[i + 1].expand(len(z)))
    return ((z.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
