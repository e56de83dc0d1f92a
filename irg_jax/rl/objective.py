"""Advantages, the clipped loss, and divergences from a reference. Pure functions.

The ratio of a sampled token, or of a sampled step of an image, is its probability now over that
when it was sampled.
"""

import jax.numpy as jnp
import numpy as np

_LEAST_STD = 1e-4


def advantages(rewards, limit: float) -> np.ndarray:
  """Advantage of each trajectory of a group over the others.

  Args:
    rewards: float [..., G]; NaN where there is none, because a round was not drawn or a judge did
      not answer: it counts for nothing and gets 0.
    limit: bound of the result in both directions.

  Returns:
    float32 [..., G]: (reward - mean) / (std + 1e-4), clipped; 0 in a group of equal rewards.
  """
  rewards = np.asarray(rewards, np.float64)
  there = ~np.isnan(rewards)
  count = np.maximum(there.sum(-1, keepdims=True), 1)
  mean = np.where(there, rewards, 0).sum(-1, keepdims=True) / count
  offset = np.where(there, rewards - mean, 0)
  std = np.sqrt((offset**2).sum(-1, keepdims=True) / count)
  return np.clip(offset / (std + _LEAST_STD), -limit, limit).astype(np.float32)


def discounted(rewards, discount: float) -> np.ndarray:
  """The worth of each round, [..., rounds]: its reward, and `discount` times the next one's worth.

  A later round without a reward (NaN) adds nothing.
  """
  worth = np.array(rewards, np.float64)
  for number in reversed(range(worth.shape[-1] - 1)):
    worth[..., number] += discount * np.nan_to_num(worth[..., number + 1])
  return worth


def clipped_loss(log_ratio, advantage, clip: float):
  """max(-A rho, -A clip(rho, 1 - clip, 1 + clip)) of each ratio rho = exp(log_ratio)."""
  ratio = jnp.exp(log_ratio)
  return jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1 - clip, 1 + clip))


def token_divergence(log_prob, reference):
  """Estimate of KL(policy || reference) from a sampled token: r - 1 - log r >= 0.

  r is the token's probability under the reference over that of the policy; its mean is unbiased.
  """
  log_ratio = reference - log_prob
  return jnp.exp(log_ratio) - 1 - log_ratio


def weighted_mean(values, weights, total):
  """Sum of values times weights over `total`, the sum of the weights of a whole update.

  Values where the weight is 0 may be anything.
  """
  return jnp.sum(jnp.where(weights > 0, values * weights, 0.0)) / jnp.maximum(total, 1e-30)
