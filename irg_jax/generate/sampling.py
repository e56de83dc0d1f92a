"""Drawing the next token."""

import jax
import jax.numpy as jnp

from irg_jax.generate.settings import Sampling


def next_token(logits, keys, sampling: Sampling):
  """One token for each row; what one row draws does not depend on the others.

  Args:
    logits: float32 [B, V].
    keys: PRNG keys [B].

  Returns:
    int32 [B].
  """
  if sampling.temperature == 0:
    return jnp.argmax(logits, -1).astype(jnp.int32)
  logits = logits / sampling.temperature
  if sampling.top_k:
    kept = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0]
    logits = jnp.where(logits < kept[:, -1:], -jnp.inf, logits)
  if sampling.top_p < 1:
    logits = jnp.where(logits < _nucleus_bound(logits, sampling.top_p), -jnp.inf, logits)
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _nucleus_bound(logits, top_p):
  """The lowest logit among the likeliest tokens that together reach `top_p`. [B, 1]."""
  descending = -jnp.sort(-logits, -1)
  probability = jax.nn.softmax(descending, -1)
  before = jnp.cumsum(probability, -1) - probability
  return jnp.min(jnp.where(before < top_p, descending, jnp.inf), -1, keepdims=True)
