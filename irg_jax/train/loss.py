"""The two losses of a packed batch (spec section 4)."""

import jax
import jax.numpy as jnp

from irg_jax import flow


def token_losses(model, params, batch, timestep, noise):
  """Losses of every token, before any mean.

  Args:
    model: UnifiedTransformer.
    params: its parameters.
    batch: `data.batch.Batch`.
    timestep: float32 [B, G], flow time of each latent token; 0 on clean ones.
    noise: float32 [B, G, latent_dim], the standard normal draw.

  Returns:
    (cross-entropy float32 [B, U], squared velocity error averaged over the latent's numbers
    float32 [B, G]), 0 on tokens without a loss.
  """
  noised = flow.interpolate(batch.latents, noise, timestep[..., None])
  logits, velocity = model.apply({"params": params}, batch, noised, timestep)
  target = jnp.take_along_axis(logits, batch.text_target[..., None], -1)[..., 0]
  cross_entropy = jax.nn.logsumexp(logits, -1) - target
  error = jnp.mean((velocity - (noise - batch.latents)) ** 2, -1)
  return cross_entropy * (batch.text_weight > 0), error * (batch.latent_weight > 0)


def mean_losses(cross_entropy, error, batch):
  """Means over all target tokens of the global batch: dict of scalars ce, mse, loss."""
  mean = lambda x, weight: jnp.sum(x * weight) / jnp.maximum(jnp.sum(weight), 1.0)
  ce, mse = mean(cross_entropy, batch.text_weight), mean(error, batch.latent_weight)
  return {"ce": ce, "mse": mse, "loss": ce + mse}
