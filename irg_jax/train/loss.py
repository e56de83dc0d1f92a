"""Cross-entropy of text and squared error of the velocity (docs/spec.md, section 4)."""

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from irg_jax import flow
from irg_jax.data.records import MODES
from irg_jax.sharding import constrain, pick

TEXT_CHUNK = 2048  # text positions of a row whose logits exist at the same time
TINY = 1e-30  # avoids division by zero; smaller than any sum of weights


def token_losses(model, params, batch, timestep_BG, noise_BGC, text_chunk: int = TEXT_CHUNK):
  """Losses of every token, before any mean.

  Args:
    model, params: of the UnifiedTransformer.
    batch: `data.batch.Batch`.
    timestep_BG: float32, flow time of each latent token; 0 on clean ones.
    noise_BGC: float32, standard normal.

  Returns:
    (cross-entropy float32 [B, E], squared velocity error averaged over the channels float32
    [B, G]), 0 on tokens without a loss.
  """
  noised_BGC = flow.interpolate(batch.latents, noise_BGC, timestep_BG[..., None])
  und_BUD, velocity_BGC = model.apply({"params": params}, batch, noised_BGC, timestep_BG)
  logits = lambda hidden: model.apply({"params": params}, hidden, method="text_logits")
  ce_BE = predictions(logits, cross_entropy, und_BUD, batch.text_place, batch.text_target,
                      text_chunk)
  error_BG = jnp.mean((velocity_BGC - (noise_BGC - batch.latents)) ** 2, -1)
  return (jnp.where(batch.text_weight > 0, ce_BE, 0.0),
          jnp.where(batch.latent_weight > 0, error_BG, 0.0))


def predictions(logits, of, hidden_BUD, place_BE, target_BE, chunk):
  """`of` the logits [B, E, V] and the targets [B, E] at their places in the und buffer.

  Computed chunk by chunk along E and again in the backward pass, so that the logits of a whole
  row never exist at once.

  Args:
    logits: function of hidden states.
    of: function to an array [B, E], or to a tree of such.
  """
  def block(args):
    hidden_BED, target_BE = args
    hidden_BED = constrain(hidden_BED, "batch", "length", "embed")
    return of(constrain(logits(hidden_BED), "batch", "length", "vocab"), target_BE)

  hidden_BED = pick(hidden_BUD, place_BE)
  length = place_BE.shape[1]
  if length <= chunk:
    return block((hidden_BED, target_BE))
  count = -(-length // chunk)
  padding = -length % count

  def blocks(x):
    padded = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    return rearrange(padded, "B (Z E) ... -> Z B E ...", Z=count)

  found = lax.map(jax.checkpoint(block), (blocks(hidden_BED), blocks(target_BE)))
  return jax.tree.map(lambda x_ZBE: rearrange(x_ZBE, "Z B E -> B (Z E)")[:, :length], found)


def cross_entropy(logits_BEV, target_BE):
  """Cross-entropy [B, E] of the targets."""
  # A comparison, not a lookup: it stays local where the vocabulary is split over devices.
  hit_BEV = target_BE[..., None] == lax.broadcasted_iota(jnp.int32, logits_BEV.shape, 2)
  return jax.nn.logsumexp(logits_BEV, -1) - jnp.sum(jnp.where(hit_BEV, logits_BEV, 0.0), -1)


def loss_sums(ce_BE, error_BG, batch) -> dict:
  """Weighted sums of the losses, and sums of the weights, in total and by mode.

  Returns:
    dict of "ce", "mse": float32 scalars; "ce/mode", "mse/mode": float32 [len(MODES)]; and
    the same under "weight/...", the divisors once all batches of an update are summed.
  """
  und = batch.tokens.sample.shape[1] - batch.latents.shape[1]
  sums = {}
  for name, values, weight, sample in (
      ("ce", ce_BE, batch.text_weight, batch.text_sample),
      ("mse", error_BG, batch.latent_weight, batch.tokens.sample[:, und:])):
    mode = jnp.take_along_axis(batch.sample_mode, jnp.maximum(sample, 0), axis=1)
    in_mode = (mode == jnp.arange(len(MODES))[:, None, None]) & (sample >= 0)
    for prefix, x in (("", values * weight), ("weight/", weight)):
      sums[f"{prefix}{name}"] = jnp.sum(x)
      sums[f"{prefix}{name}/mode"] = jnp.sum(jnp.where(in_mode, x, 0.0), axis=(1, 2))
  return sums


def mean_losses(sums) -> dict:
  """Means over all target tokens of the summed batches: float32 scalars by name.

  "ce", "mse", and "ce/<mode>", "mse/<mode>" with their "weight/...". A mean over no target is
  0, and its weight is 0, too.
  """
  means = {}
  for name in ("ce", "mse"):
    weight, by_mode = sums[f"weight/{name}"], sums[f"weight/{name}/mode"]
    means[name] = sums[name] / jnp.maximum(weight, TINY)
    modes = sums[f"{name}/mode"] / jnp.maximum(by_mode, TINY)
    for i, mode in enumerate(MODES):
      means |= {f"{name}/{mode}": modes[i], f"weight/{name}/{mode}": by_mode[i]}
  return means
