"""The mask rule, and the one function that attends.

Which token may look at which is a pure function of four integers that every token carries
(`Tokens`); `allowed` is the only place where the rule is written (spec section 3). Every
way of computing attention calls it on the pieces it has at hand, so no mask of a whole row
needs to exist, and the order of tokens in memory does not matter.

A Pallas kernel goes here, as one more branch of `attend`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from irg_jax.model.kernels.blockwise import (
    MASKED, MAX_INIT, blockwise, cut, grouped, join, product, softmax_state, ungrouped)
from irg_jax.sharding import platform
from irg_jax.tokens import Tokens, allowed

_DENSE_SCORES = 64 * 1024  # scores a head up to which the dense form is taken


def visible_pairs(tokens: Tokens):
  """How many pairs of (query, key) the mask allows in rows [B, T]: float32 scalar."""
  if not tokens.sample.shape[1]:
    return jnp.zeros(())
  count = lambda query: jnp.sum(allowed(query, tokens), (1, 2))  # exact, and apart for each row
  in_blocks = lax.map(count, cut(tokens, 1024))  # the mask of a row is never whole
  return jnp.sum(in_blocks, dtype=jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
  """Keys and values that queries may look at, with the keys' metadata.

  Attributes:
    k, v: [B, K, S, H].
    tokens: Tokens of the keys, [R, S] where R is a multiple of B: the R // B query rows
      that follow each other share one row of keys, each with its own view of them.
  """

  k: jax.Array
  v: jax.Array
  tokens: Tokens


def attend(q_RTNH, query: Tokens, sources, *, implementation: str = "auto",
           query_chunk: int | None = None, key_chunk: int | None = None):
  """Softmax attention of q over all the keys of all sources, with grouped-query heads.

  Args:
    q_RTNH: [R, T, N, H], N a multiple of the sources' K.
    query: Tokens of the queries, [R, T].
    sources: sequence of KeyValues. Where there are several, all but one are caches.
    implementation: "dense" builds all scores of a source at once (the oracle, and the
      fastest for short rows); "chunked" needs memory linear in the length and skips blocks
      of keys that no query of a block sees; "auto" is dense where the scores are few and
      there is no cache, most of which may be hidden. The chunked form is differentiable
      only for a single source with a row of keys for each row of queries.
    query_chunk, key_chunk: largest blocks of the chunked form; None is what `chunks` says.

  Returns:
    [R, T, N, H] in q's dtype; zeros for queries that see nothing. Logits, softmax and
    accumulator are float32.
  """
  T = q_RTNH.shape[1]
  most_queries, most_keys = chunks(T, platform())
  query_chunk, key_chunk = query_chunk or most_queries, key_chunk or most_keys
  if implementation == "auto":
    short = T * sum(s.k.shape[2] for s in sources) <= _DENSE_SCORES
    implementation = "dense" if short and len(sources) == 1 else "chunked"
  if implementation == "dense":
    return _attend_dense(q_RTNH, query, sources)
  if implementation != "chunked":
    raise ValueError(f"unknown attention implementation {implementation!r}")
  source = sources[0]
  if len(sources) == 1 and len(source.k) == len(q_RTNH):
    return blockwise(allowed, query_chunk, key_chunk, q_RTNH, source.k, source.v, query,
                     source.tokens)
  block = lambda args: _attend_block(*args, sources, key_chunk)
  if T <= query_chunk:
    return block((q_RTNH, query))
  return join(lax.map(block, cut((q_RTNH, query), query_chunk)), T)


def chunks(queries: int, on: str) -> tuple[int, int]:
  """Largest blocks of queries and of keys for rows of `queries` on a platform.

  A TPU keeps the scores of a block on the chip, so a few queries take more keys at a time; the
  caches of a CPU are small, and smaller blocks skip more of a long row.
  """
  if on == "cpu":
    return 288 if queries <= 288 else 256, 288
  return 1024, 512 * max(1, 16 // max(1, queries))


def _attend_dense(q_RTNH, query, sources):
  """All scores at once, the sources' keys side by side."""
  R, T, N, H = q_RTNH.shape
  together = lambda parts, axis: jnp.concatenate(
      [jnp.repeat(x, R // x.shape[0], axis=0) for x in parts], axis=axis)
  k, v = together([s.k for s in sources], 2), together([s.v for s in sources], 2)
  keys = jax.tree.map(lambda *parts: together(parts, 1), *(s.tokens for s in sources))
  # The queries of the heads that share keys stand below each other: one product for all of them.
  K, G = k.shape[1], N // k.shape[1]
  q = grouped(q_RTNH, K).reshape(R, K, G * T, H)
  # The barrier keeps the mask's integers out of the loops over scores, forward and backward.
  hide = lax.optimization_barrier(jnp.where(allowed(query, keys), 0.0, MASKED))
  logits = product("rkqh,rksh->rkqs", q, k) * H ** -0.5 + jnp.tile(hide[:, None], (1, 1, G, 1))
  highest = jnp.maximum(lax.stop_gradient(jnp.max(logits, -1, keepdims=True)), MAX_INIT)
  scores = jnp.exp(logits - highest)
  total = jnp.sum(scores, -1, keepdims=True)
  out = product("rkqs,rksh->rkqh", scores.astype(v.dtype), v)
  # Where nothing is seen, total is 0 and so is out.
  out = (out / jnp.where(total > 0, total, 1.0)).astype(q.dtype)
  return ungrouped(out.reshape(R, K, G, T, H))


def _attend_block(q_RTNH, query, sources, key_chunk):
  """Attends with one block of queries: each source apart, then the parts are joined."""
  q = grouped(q_RTNH, sources[0].k.shape[1])
  parts = [_attend_source(q, query, source, key_chunk) for source in sources]
  highest = functools.reduce(jnp.maximum, (part[0] for part in parts))
  scales = [jnp.exp(part[0] - highest) for part in parts]
  total = sum(scale * part[1] for scale, part in zip(scales, parts))
  out = sum(scale[..., None] * part[2] for scale, part in zip(scales, parts))
  # Where nothing is seen, total is 0 and so is out.
  return ungrouped((out / jnp.where(total > 0, total, 1.0)[..., None]).astype(q.dtype))


def _attend_source(q_RKGTH, query, source, key_chunk):
  """`softmax_state` of each query row with one source, view by view."""
  B, R = source.k.shape[0], len(q_RKGTH)
  def one_view(args):
    q, query, tokens = args
    return softmax_state(allowed, key_chunk, q, source.k, source.v, query, tokens)

  if B == R:
    return one_view((q_RKGTH, query, source.tokens))
  by_view = lambda x: jnp.moveaxis(x.reshape(B, R // B, *x.shape[1:]), 1, 0)
  state = lax.map(one_view, jax.tree.map(by_view, (q_RKGTH, query, source.tokens)))
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(R, *x.shape[2:]), state)
