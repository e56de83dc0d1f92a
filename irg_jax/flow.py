"""Flow matching along straight lines from noise (t = 1) to image (t = 0).

docs/spec.md, sections 4 and 7.
"""

import jax.numpy as jnp
import numpy as np

RENORMS = ("global", "channel", "text_channel")


def shift_time(t, shift):
  """Warps flow time t in [0, 1] towards noise; shift 1 is the identity."""
  return shift * t / (1 + (shift - 1) * t)


def schedule(steps: int, shift: float) -> np.ndarray:
  """Times of the Euler steps, float32 [steps], from 1 down to 0: `steps - 1` updates."""
  return shift_time(np.linspace(1, 0, steps, dtype=np.float32), np.float32(shift))


def guided(times_M, interval) -> np.ndarray:
  """Whether the step from each time but the last has guidance: low < t <= high, bool [M - 1]."""
  low, high = np.float32(interval)
  return (low < times_M[:-1]) & (times_M[:-1] <= high)


def interpolate(latents_PC, noise_PC, t):
  """x_t between image and noise; t broadcasts against [..., P, latent_dim]."""
  return (1 - t) * latents_PC + t * noise_PC


def guide(velocities, text_scale, image_scale, renorm: str, renorm_min):
  """Classifier-free guidance: combines the velocities of the full and the reduced contexts.

  Args:
    velocities: dict of float32 [B, P, latent_dim] with "full", "no_text" and, for image guidance,
      "no_image".
    text_scale, image_scale: scalars.
    renorm: how the guided velocity is scaled down to the norm of the full one: "global" over the
      whole image, "channel" token by token, "text_channel" token by token and before image
      guidance.
    renorm_min: lower bound of the scaling factor.

  Returns:
    float32 [B, P, latent_dim].

  Raises:
    ValueError: unknown renorm.
  """
  if renorm not in RENORMS:
    raise ValueError(f"unknown renorm {renorm!r}, not one of {RENORMS}")
  full_BPC, no_text_BPC = velocities["full"], velocities["no_text"]
  axes = (-2, -1) if renorm == "global" else -1
  norm = lambda v_BPC: jnp.linalg.norm(v_BPC, axis=axes, keepdims=True)
  rescale = lambda v_BPC: v_BPC * jnp.clip(
      norm(full_BPC) / (norm(v_BPC) + 1e-8), renorm_min, 1.0)

  guided_BPC = no_text_BPC + text_scale * (full_BPC - no_text_BPC)
  if renorm == "text_channel":
    guided_BPC = rescale(guided_BPC)
  if "no_image" in velocities:
    no_image_BPC = velocities["no_image"]
    guided_BPC = no_image_BPC + image_scale * (guided_BPC - no_image_BPC)
  return guided_BPC if renorm == "text_channel" else rescale(guided_BPC)
