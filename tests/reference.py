"""A second implementation of the formulas of SPEC 1 to 4, in float64 NumPy, directly from the definitions.

It is deliberately independent of mcm_jax: no numerically stable forms, no shared helpers, and loops where
they are clearest.
"""

import math

import numpy as np


def alpha_sigma(logsnr):
    """alpha and sigma at one log-SNR, both floats."""
    return math.sqrt(1 / (1 + math.exp(-logsnr))), math.sqrt(1 / (1 + math.exp(logsnr)))


def cosine_logsnr(t, *, low=-15.0, high=15.0):
    """-2 log tan(pi u / 2) with u linear in t between the log-SNRs high (t = 0) and low (t = 1)."""
    u_0 = 2 / math.pi * math.atan(math.exp(-high / 2))
    u_1 = 2 / math.pi * math.atan(math.exp(-low / 2))
    return -2 * math.log(math.tan(math.pi / 2 * (u_0 + t * (u_1 - u_0))))


def ddim(x, z_t, t, s):
    """DDIM for one example; t and s are log-SNRs."""
    (a_t, s_t), (a_s, s_s) = alpha_sigma(t), alpha_sigma(s)
    return a_s * x + s_s * (z_t - a_t * x) / s_t


def inv_ddim(z_s, z_t, t, s):
    (a_t, s_t), (a_s, s_s) = alpha_sigma(t), alpha_sigma(s)
    return (z_s - s_s / s_t * z_t) / (a_s - a_t * s_s / s_t)


def addim(x, z_t, t, s, x_var):
    (a_t, s_t), (a_s, s_s) = alpha_sigma(t), alpha_sigma(s)
    eps = (z_t - a_t * x) / s_t
    z_s_var = (a_s - a_t * s_s / s_t) ** 2 * x_var
    return a_s * x + math.sqrt(s_s**2 + eps.size / np.sum(eps**2) * z_s_var) * eps


def consistency_target(x_teacher, x_ref, z_t, t, s, step, x_var):
    """Algorithm 1 taken literally: aDDIM to s, DDIM to t_step, invDDIM back to an x at t."""
    z_s = addim(x_teacher, z_t, t, s, x_var)
    return inv_ddim(ddim(x_ref, z_s, s, step), z_t, t, step)


def heun(z_s, eps_t, eps_s, z_t, t, s):
    """Heun's step in ybar = z / alpha and sbar = sigma / alpha; ignores z_s and starts again from z_t."""
    del z_s
    (a_t, s_t), (a_s, s_s) = alpha_sigma(t), alpha_sigma(s)
    return a_s * (z_t / a_t + (s_s / a_s - s_t / a_t) * (eps_t + eps_s) / 2)


def ddpm(x, z_t, noise, t, s):
    """A draw from q(z_s | z_t, x), derived by Bayes' rule from q(z_t | z_s) and q(z_s | x)."""
    (a_t, s_t), (a_s, s_s) = alpha_sigma(t), alpha_sigma(s)
    a_ts = a_t / a_s
    var_ts = s_t**2 - a_ts**2 * s_s**2
    precision = a_ts**2 / var_ts + 1 / s_s**2
    mean = (a_ts * z_t / var_ts + a_s * x / s_s**2) / precision
    return mean + math.sqrt(1 / precision) * noise


def noisy_ddim(x, z_t, noise, t, s, x_var):
    return ddim(x + math.sqrt(x_var) * noise, z_t, t, s)


def pseudo_huber(x_diff, epsilon):
    return math.sqrt(np.mean(x_diff**2) + epsilon**2) - epsilon
