"""The two losses of a packed batch (spec section 4)."""

import jax
import jax.numpy as jnp
from jax import lax

from irg_jax import flow
from irg_jax.data.records import MODES
from irg_jax.sharding import constrain, pick

TEXT_CHUNK = 2048  # predicted positions of a row whose logits exist at a time
LEAST = 1e-30  # no division by zero; below any sum of weights


def token_losses(model, params, batch, timestep, noise, text_chunk: int = TEXT_CHUNK):
  """Losses of every token, before any mean.

  Args:
    model: UnifiedTransformer.
    params: its parameters.
    batch: `data.batch.Batch`.
    timestep: float32 [B, G], flow time of each latent token; 0 on clean ones.
    noise: float32 [B, G, latent_dim], the standard normal draw.
    text_chunk: see `TEXT_CHUNK`.

  Returns:
    (cross-entropy float32 [B, L], squared velocity error averaged over the latent's numbers
    float32 [B, G]), 0 on tokens without a loss.
  """
  noised = flow.interpolate(batch.latents, noise, timestep[..., None])
  und, velocity = model.apply({"params": params}, batch, noised, timestep)
  logits = lambda hidden: model.apply({"params": params}, hidden, method="text_logits")
  ce = _cross_entropy(logits, und, batch.text_place, batch.text_target, text_chunk)
  error = jnp.mean((velocity - (noise - batch.latents)) ** 2, -1)
  return jnp.where(batch.text_weight > 0, ce, 0.0), jnp.where(batch.latent_weight > 0, error, 0.0)


def _cross_entropy(logits, hidden, place, target, chunk):
  """Cross-entropy [B, L] of `target` at the places [B, L] of hidden [B, U, D].

  Chunk by chunk along L, recomputed in the backward pass, so that the logits of a row never
  exist at once.
  """
  def block(args):
    hidden, target = args
    hidden = constrain(hidden, "batch", "length", "embed")
    scores = constrain(logits(hidden), "batch", "length", "vocab")
    # A comparison, not a lookup: it stays where the vocabulary is split over devices.
    right = target[..., None] == lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    return jax.nn.logsumexp(scores, -1) - jnp.sum(jnp.where(right, scores, 0.0), -1)

  hidden = pick(hidden, place)
  B, L = place.shape
  if L <= chunk:
    return block((hidden, target))
  count = -(-L // chunk)
  size = -(-L // count)

  def blocks(x):
    x = jnp.pad(x, [(0, 0), (0, count * size - L)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, count, size, *x.shape[2:]), 1, 0)

  out = lax.map(jax.checkpoint(block), (blocks(hidden), blocks(target)))
  return jnp.moveaxis(out, 0, 1).reshape(B, -1)[:, :L]


def loss_sums(cross_entropy, error, batch) -> dict:
  """Weighted sums of the losses and of the weights, also by mode.

  Returns:
    dict of "ce", "mse": float32 scalars; "ce/mode", "mse/mode": float32 [len(MODES)]; and
    the same under "weight/...", to divide by once all batches of an update are summed.
  """
  und = batch.tokens.sample.shape[1] - batch.latents.shape[1]
  sums = {}
  for name, values, weight, sample in (
      ("ce", cross_entropy, batch.text_weight, batch.text_sample),
      ("mse", error, batch.latent_weight, batch.tokens.sample[:, und:])):
    mode = jnp.take_along_axis(batch.sample_mode, jnp.maximum(sample, 0), axis=1)
    in_mode = (mode == jnp.arange(len(MODES))[:, None, None]) & (sample >= 0)
    for prefix, x in (("", values * weight), ("weight/", weight)):
      sums[f"{prefix}{name}"] = jnp.sum(x)
      sums[f"{prefix}{name}/mode"] = jnp.sum(jnp.where(in_mode, x, 0.0), axis=(1, 2))
  return sums


def mean_losses(sums) -> dict:
  """Means over all target tokens of what was summed: float32 scalars by name.

  "ce", "mse", and "ce/<mode>", "mse/<mode>" beside their "weight/...": a mean over no target
  is 0, and its weight tells.
  """
  means = {}
  for name in ("ce", "mse"):
    weight, by_mode = sums[f"weight/{name}"], sums[f"weight/{name}/mode"]
    means[name] = sums[name] / jnp.maximum(weight, LEAST)
    modes = sums[f"{name}/mode"] / jnp.maximum(by_mode, LEAST)
    for i, mode in enumerate(MODES):
      means |= {f"{name}/{mode}": modes[i], f"weight/{name}/{mode}": by_mode[i]}
  return means
