"""Forecasts of the decoder's hidden states between updates (TaylorSeer, arXiv 2503.06923).

The hidden state after the last layer changes slowly from one update to the next. After `first`
complete passes, only every `interval`-th update runs the decoder. Its hidden state h and finite
differences give the others: f_0 = h, f_{i+1} = (f_i - f_i of the pass before) / updates between,
and x updates later h is about sum_i f_i x^i / i!, up to `order`. Every guidance view counts the
updates in which it takes part. All this is known before anything runs (`schedule`).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from irg_jax.config import ModelConfig
from irg_jax.sharding import constrain


@functools.partial(
    jax.tree_util.register_dataclass, meta_fields=[],
    data_fields=["passes", "order", "distance", "since"])
@dataclasses.dataclass(frozen=True)
class Schedule:
  """The passes and forecasts of one view in M updates; arrays [M]."""

  passes: np.ndarray  # bool, the decoder runs
  order: np.ndarray  # int32, of the differences that a pass may use
  distance: np.ndarray  # float32, updates from the pass before to this one
  since: np.ndarray  # float32, updates from the last pass to this one

  def padded(self, length: int) -> "Schedule":
    """The same with zeros up to `length` updates."""
    return jax.tree.map(lambda x_M: np.pad(x_M, (0, max(0, length - len(x_M)))), self)


def schedule(active_M, settings) -> Schedule:
  """The schedule of a view that takes part in the updates `active_M`, bool [M], which are in a row.

  `settings` is a `settings.Forecast`; with an interval of 1 every update is a pass.
  """
  own_M = np.cumsum(active_M) - 1  # the view's own count of updates
  first, interval = settings.first, settings.interval
  passes_M = active_M & ((own_M < first) | ((own_M - first + 1) % interval == 0))
  last_M = np.maximum.accumulate(np.where(passes_M, own_M, -1))
  before_M = np.concatenate([[-1], last_M[:-1]])
  number_M = np.cumsum(passes_M) - 1
  # Differences begin with the last of the first passes.
  order_M = np.clip(number_M - (first - 2), 0, np.minimum(number_M, settings.order))
  return Schedule(passes_M, order_M.astype(np.int32),
                  np.maximum(own_M - before_M, 1).astype(np.float32),
                  np.maximum(own_M - last_M, 0).astype(np.float32))


@functools.partial(jax.jit, static_argnames=("config", "order", "rows", "tokens"))
def blank(config: ModelConfig, order: int, rows: int, tokens: int):
  """Zeros for `learn`, [order + 1, B, P, D] in the compute dtype."""
  return constrain(jnp.zeros((order + 1, rows, tokens, config.llm.hidden_size), config.dtype),
                   None, "batch", "length", "embed")


def learn(f_OBPD, h_BPD, order, distance):
  """Hidden state and differences of a pass, [order + 1, B, P, D], from those of the pass before."""
  new = [h_BPD.astype(jnp.float32)]
  for i, old_BPD in enumerate(f_OBPD[:-1]):
    difference_BPD = (new[i] - old_BPD.astype(jnp.float32)) / distance
    new.append(jnp.where(i < order, difference_BPD, 0.0))
  return jnp.stack(new).astype(f_OBPD.dtype)


def extrapolate(f_OBPD, since):
  """The hidden state `since` updates after a pass, [B, P, D]."""
  total_BPD, factor = f_OBPD[0].astype(jnp.float32), jnp.float32(1.0)
  for i, f_BPD in enumerate(f_OBPD[1:], 1):
    factor = factor * since / i
    total_BPD += factor * f_BPD.astype(jnp.float32)
  return total_BPD.astype(f_OBPD.dtype)
