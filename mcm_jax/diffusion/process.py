"""The variance-preserving forward process and the three predictions (SPEC 1).

z_t = alpha_t x + sigma_t eps, alpha_t^2 = sigmoid(lambda_t), sigma_t^2 = sigmoid(-lambda_t). Images
have shape [B, ...], log-SNRs lambda [B]. Examples never influence each other.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

Image = Float[Array, "B ..."]
PerExample = Float[Array, "B"]


def alpha(logsnr: Float[Array, "..."]) -> Float[Array, "..."]:
    """alpha = sqrt(sigmoid(lambda))."""
    return jnp.sqrt(jax.nn.sigmoid(logsnr))


def sigma(logsnr: Float[Array, "..."]) -> Float[Array, "..."]:
    """sigma = sqrt(sigmoid(-lambda))."""
    return jnp.sqrt(jax.nn.sigmoid(-logsnr))


def angle(logsnr: Float[Array, "..."]) -> Float[Array, "..."]:
    """theta = arctan(sigma / alpha) in (0, pi / 2): alpha = cos(theta), sigma = sin(theta), dz/dtheta = v."""
    return jnp.arctan(jnp.exp(-logsnr / 2))


def over_pixels(per_example: Shaped[Array, " B"], image: Shaped[Array, "B ..."]) -> Shaped[Array, "B ..."]:
    """Reshapes [B] to [B, 1, ..., 1], so that the result broadcasts over the axes of `image`."""
    return per_example.reshape(per_example.shape + (1,) * (image.ndim - 1))


def mean_square(image: Image) -> PerExample:
    """||a||^2 / d for every example a with d entries."""
    return jnp.mean(jnp.square(image), axis=tuple(range(1, image.ndim)))


def diffuse(x: Image, eps: Image, *, logsnr_t: PerExample) -> Image:
    """z_t = alpha_t x + sigma_t eps.

    Examples:
      At log-SNR 0, signal and noise have equal weights:

      >>> x, eps = jnp.ones((1, 2)), jnp.array([[1.0, -1.0]])
      >>> [round(value, 4) for value in diffuse(x, eps, logsnr_t=jnp.zeros(1))[0].tolist()]
      [1.4142, 0.0]
    """
    return over_pixels(alpha(logsnr_t), x) * x + over_pixels(sigma(logsnr_t), x) * eps


def v_from_x_eps(x: Image, eps: Image, *, logsnr_t: PerExample) -> Image:
    """v = alpha_t eps - sigma_t x."""
    return over_pixels(alpha(logsnr_t), x) * eps - over_pixels(sigma(logsnr_t), x) * x


def x_from_v(v_hat: Image, z_t: Image, *, logsnr_t: PerExample) -> Image:
    """x_hat = alpha_t z_t - sigma_t v_hat."""
    return over_pixels(alpha(logsnr_t), z_t) * z_t - over_pixels(sigma(logsnr_t), z_t) * v_hat


def eps_from_v(v_hat: Image, z_t: Image, *, logsnr_t: PerExample) -> Image:
    """eps_hat = sigma_t z_t + alpha_t v_hat."""
    return over_pixels(sigma(logsnr_t), z_t) * z_t + over_pixels(alpha(logsnr_t), z_t) * v_hat


def eps_from_x(x_hat: Image, z_t: Image, *, logsnr_t: PerExample) -> Image:
    """eps_hat = (z_t - alpha_t x_hat) / sigma_t; sigma_t > 0 at every finite log-SNR."""
    return (z_t - over_pixels(alpha(logsnr_t), z_t) * x_hat) / over_pixels(sigma(logsnr_t), z_t)
