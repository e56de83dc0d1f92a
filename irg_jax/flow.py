"""Flow matching: from noise (t = 1) to image (t = 0) along straight lines (spec 4 and 7)."""

import jax.numpy as jnp
import numpy as np

RENORMS = ("global", "channel", "text_channel")


def shift_time(t, shift):
  """Warps flow time t in [0, 1] towards noise; shift 1 is the identity."""
  return shift * t / (1 + (shift - 1) * t)


def schedule(steps: int, shift: float) -> np.ndarray:
  """Times of the Euler steps, float32 [steps], from 1 down to 0: `steps - 1` updates."""
  return shift_time(np.linspace(1, 0, steps, dtype=np.float32), np.float32(shift))


def interpolate(latents, noise, t):
  """x_t between image and noise; t broadcasts against [..., latent_dim]."""
  return (1 - t) * latents + t * noise


def guide(velocities, text_scale, image_scale, renorm: str, renorm_min):
  """Combines the velocities of the full context and of the guidance contexts.

  Args:
    velocities: dict with "full" and "no_text", and "no_image" where there is image guidance;
      float32 [B, P, latent_dim] each.
    text_scale, image_scale: scalars.
    renorm: "global" scales the guided velocity down to the norm of the full one over the
      whole image (never over the batch), "channel" token by token, "text_channel" token by
      token and before the image guidance is applied.
    renorm_min: lowest factor of that scaling.

  Returns:
    float32 [B, P, latent_dim].

  Raises:
    ValueError: unknown renorm.
  """
  if renorm not in RENORMS:
    raise ValueError(f"unknown renorm {renorm!r}, not one of {RENORMS}")
  full, no_text = velocities["full"], velocities["no_text"]
  axes = (-2, -1) if renorm == "global" else -1
  norm = lambda v: jnp.linalg.norm(v, axis=axes, keepdims=True)
  rescale = lambda v: v * jnp.clip(norm(full) / (norm(v) + 1e-8), renorm_min, 1.0)

  guided = no_text + text_scale * (full - no_text)
  if renorm == "text_channel":
    guided = rescale(guided)
  if "no_image" in velocities:
    no_image = velocities["no_image"]
    guided = no_image + image_scale * (guided - no_image)
  return guided if renorm == "text_channel" else rescale(guided)
