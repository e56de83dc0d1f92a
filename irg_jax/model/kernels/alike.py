"""Attention of rows whose queries all see the same keys, on a lone CPU: no mask, few passes.

While an image is denoised, each of its tokens sees all others and the same part of the cache. So
the mask is one bit a key, which costs a pass over a block of keys instead of one over the scores:
a hidden key is replaced by the row's first own key, which every query sees and which therefore
leaves the highest score as it is, and its value and its part of the sum by zero.

Blocks of keys begin at the first visible key that is left, wherever that lies. Rows run one by
one, each over its own blocks. Letters as in `tokens`; Q = J * T queries share a key-value head.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from irg_jax.model.kernels.blockwise import MAX_INIT, cut, join, product


def attend(q_RTNH, own, caches, query_chunk: int, key_chunk: int):
  """Softmax attention of each row over all its own keys and what it sees of the caches.

  Args:
    q_RTNH: [R, T, N, H].
    own: (k, v), each [R, K, T, H].
    caches: list of (k, v, visible): two [B, K, S, H], of which R // B consecutive rows share a row,
      and bool [R, S].
    query_chunk, key_chunk: largest block sizes.

  Returns:
    [R, T, N, H] in q's dtype; logits, softmax and accumulator are float32.
  """
  R, T = q_RTNH.shape[:2]
  K = own[0].shape[1]
  whole_RT = jnp.ones((R, T), bool)
  sources = [(*own, whole_RT, _following(whole_RT))]
  sources += [(k, v, visible_RS, _following(visible_RS)) for k, v, visible_RS in caches]

  def one_row(args):
    row, q_TNH = args
    rows = [(k, v, row * len(k) // R, seen_RS[row], following_RS[row])
            for k, v, seen_RS, following_RS in sources]
    block = lambda q_1TNH: _one_block(q_1TNH[0], rows, K, key_chunk)
    if T <= query_chunk:
      return block(q_TNH[None])
    return join(lax.map(lambda q: block(q)[None], cut(q_TNH[None], query_chunk)), T)[0]

  return lax.map(one_row, (jnp.arange(R), q_RTNH))


def _one_block(q_TNH, sources, K, key_chunk):
  """Attention of one block of queries, [T, N, H]."""
  T, H = q_TNH.shape[0], q_TNH.shape[-1]
  q_KQH = rearrange(q_TNH, "t (k j) h -> k (j t) h", k=K)
  k_own, v_own, row = sources[0][:3]
  own = tuple(lax.dynamic_index_in_dim(x, row, keepdims=False) for x in (k_own, v_own))
  if own[0].shape[1] <= key_chunk:  # one block, of which nothing is hidden: no loop
    state, sources = _first(q_KQH, *own), sources[1:]
  else:
    zeros_KQH = jnp.zeros(q_KQH.shape, jnp.float32)
    state = zeros_KQH[..., 0] + MAX_INIT, zeros_KQH[..., 0], zeros_KQH
  for source in sources:
    state = _over_blocks(q_KQH, source, own[0][:, :1], key_chunk, state)
  _, total_KQ, out_KQH = state
  out_KQH = (out_KQH / total_KQ[..., None]).astype(q_TNH.dtype)
  return rearrange(out_KQH, "k (j t) h -> t (k j) h", t=T)


def _first(q_KQH, k_KSH, v_KSH):
  """State of the online softmax after one block of keys, see `blockwise.softmax_state`."""
  logits_KQS = product("kqh,ksh->kqs", q_KQH, k_KSH)
  scale = q_KQH.shape[-1] ** -0.5
  highest_KQ = jnp.max(logits_KQS, -1) * scale
  weights_KQS = jnp.exp(logits_KQS * scale - highest_KQ[..., None])
  return (highest_KQ, jnp.sum(weights_KQS, -1),
          product("kqs,ksh->kqh", weights_KQS.astype(v_KSH.dtype), v_KSH))


def _over_blocks(q_KQH, source, shown_K1H, key_chunk, state):
  """The state after the visible keys of a source; `shown` is a key that is in it or will be."""
  k_BKSH, v_BKSH, row, visible_S, following_S = source
  K, S, H = k_BKSH.shape[1:]
  large = min(S, key_chunk)
  small = -(-large // 3)
  # A large block where it has less than a small one to hide, at the ends of texts small ones.
  before_S = jnp.pad(jnp.cumsum(visible_S), (1, 0))
  ahead_S = jnp.pad(before_S[large:], (0, large), mode="edge")
  dense_S = ahead_S - before_S > large - small

  def step(size, carry):
    begin, (highest_KQ, total_KQ, out_KQH) = carry
    start = jnp.minimum(begin, S - size)  # the last block may overlap the one before it
    block = lambda x_BKSH: lax.dynamic_slice(x_BKSH, (row, 0, start, 0), (1, K, size, H))[0]
    seen_S = lax.dynamic_slice_in_dim(visible_S, start, size) & (start + jnp.arange(size) >= begin)
    k_KSH = jnp.where(seen_S[:, None], block(k_BKSH), shown_K1H)
    v_KSH = jnp.where(seen_S[:, None], block(v_BKSH), 0)
    logits_KQS = product("kqh,ksh->kqs", q_KQH, k_KSH)
    scale = H ** -0.5
    new_KQ = jnp.maximum(highest_KQ, jnp.max(logits_KQS, -1) * scale)
    weights_KQS = jnp.exp(logits_KQS * scale - new_KQ[..., None])
    decay_KQ = jnp.exp(highest_KQ - new_KQ)
    sum_KQ = product("kqs,s->kq", weights_KQS, seen_S.astype(jnp.float32))
    values_KQH = product("kqs,ksh->kqh", weights_KQS.astype(v_KSH.dtype), v_KSH)
    state = (new_KQ, total_KQ * decay_KQ + sum_KQ, out_KQH * decay_KQ[..., None] + values_KQH)
    return following_S[jnp.minimum(begin + size, S)], state

  def both(carry):
    carry = lax.while_loop(lambda c: dense_S[c[0]], lambda c: step(large, c), carry)
    few = lambda c: (c[0] < S) & ~dense_S[c[0]]
    return lax.while_loop(few, lambda c: step(small, c), carry)

  return lax.while_loop(lambda c: c[0] < S, both, (following_S[0], state))[1]


def _following(visible_RS):
  """The first visible key from each place on, S if there is none: int32 [R, S + 1]."""
  S = visible_RS.shape[1]
  place_RS = jnp.where(visible_RS, jnp.arange(S), S)
  return jnp.pad(lax.cummin(place_RS, axis=1, reverse=True), ((0, 0), (0, 1)), constant_values=S)
