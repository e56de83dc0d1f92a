"""Attention over any number of key-value sources: `attend`, the only entry point of the model.

The dense and blockwise forms call `tokens.allowed` on the tokens that they hold, the kernels take
the same rule as integers (`kernels.visible`). So the mask of a whole row is never needed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax import lax

from irg_jax.model.kernels import alike, cpu, fused
from irg_jax.model.kernels.blockwise import (
    MASKED, MAX_INIT, blockwise, cut, grouped, join, product, softmax_state, ungrouped)
from irg_jax.sharding import platform
from irg_jax.tokens import Tokens, allowed

_DENSE_SCORES = 64 * 1024  # "auto" takes the dense form up to this many scores a head


def visible_pairs(tokens: Tokens):
  """Number of (query, key) pairs that the mask allows in rows [B, T]: float32 scalar."""
  if not tokens.sample.shape[1]:
    return jnp.zeros(())
  # Exact integers in each row and block; the mask of a row never exists as a whole.
  count = lambda query: jnp.sum(allowed(query, tokens), (1, 2))
  counts_ZB = lax.map(count, cut(tokens, 1024))
  return jnp.sum(counts_ZB, dtype=jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
  """Keys and values, [B, K, S, H], with the keys' metadata, [R, S]; keys are rotated.

  R is a multiple of B: R // B consecutive query rows (guidance views) share one row of keys and
  differ in which of them they see.
  """

  k: jax.Array
  v: jax.Array
  tokens: Tokens


def attend(q_RTNH, query: Tokens, sources, *, implementation: str = "auto",
           query_chunk: int | None = None, key_chunk: int | None = None, prepared=None,
           same_keys: bool = False):
  """Softmax attention over the keys of all sources together, with grouped-query heads.

  Args:
    q_RTNH: [R, T, N, H], N a multiple of the sources' K.
    query: Tokens of the queries, [R, T].
    sources: list of KeyValues: the queries' own first, then caches.
    implementation: "dense" computes all scores at once (the test oracle, and fastest for short
      rows). "chunked" needs memory linear in the length and skips blocks of keys that no query
      of a block sees. "kernel" is the Pallas kernel of the platform. "auto" is `choose`'s. All
      but "dense" are differentiable for a single source with B = R.
    query_chunk, key_chunk: largest blocks of the chunked form; None takes those of `chunks`.
    prepared: of `fused.prepare`, for the kernel; None makes it here, once a call.
    same_keys: static, promises that all queries of a row see the same keys, all own ones among
      them. The chunked form of a lone CPU then takes less time.

  Returns:
    [R, T, N, H] in q's dtype; zeros for queries that see nothing. Logits, softmax and
    accumulator are float32.

  Raises:
    ValueError: unknown implementation.
  """
  T = q_RTNH.shape[1]
  most_queries, most_keys = chunks(T, platform())
  query_chunk, key_chunk = query_chunk or most_queries, key_chunk or most_keys
  if implementation == "auto":
    implementation = choose(T, [s.k.shape[2] for s in sources])
  if implementation == "dense":
    return _attend_dense(q_RTNH, query, sources)
  if implementation == "kernel":
    if prepared is None:
      heads = q_RTNH.shape[2] // sources[0].k.shape[1]
      prepared = fused.prepare(query, [s.tokens for s in sources], [len(s.k) for s in sources],
                               heads, q_RTNH.shape[3])
    return fused.attend(q_RTNH, [(s.k, s.v) for s in sources], prepared)
  if implementation != "chunked":
    raise ValueError(f"unknown attention implementation {implementation!r}: not auto, dense, "
                     "chunked or kernel")
  own, *caches = sources
  if not caches and len(own.k) == len(q_RTNH):
    return blockwise(allowed, query_chunk, key_chunk, q_RTNH, own.k, own.v, query, own.tokens)
  # Not the tokens: with barriers of their own, each layer would compute the mask again.
  caches = [dataclasses.replace(s, k=cpu.pinned(s.k), v=cpu.pinned(s.v)) for s in caches]
  if same_keys and cpu.on_lone_cpu():
    first = jax.tree.map(lambda x: x[:, :1], query)
    seen = [(s.k, s.v, allowed(first, s.tokens)[:, 0]) for s in caches]
    return alike.attend(q_RTNH, (own.k, own.v), seen, query_chunk, key_chunk)
  block = lambda args: _attend_block(*args, [own, *caches], key_chunk)
  if T <= query_chunk:
    return block((q_RTNH, query))
  return join(lax.map(block, cut((q_RTNH, query), query_chunk)), T)


def prepare(query: Tokens, keys: list[Tokens], rows: list[int], group: int, head_dim: int,
            implementation: str = "auto"):
  """`fused.prepare` if `attend` will take the kernel, else None: once a step, not once a layer."""
  if implementation == "auto":
    implementation = choose(query.sample.shape[1], [tokens.sample.shape[1] for tokens in keys])
  return fused.prepare(query, keys, rows, group, head_dim) if implementation == "kernel" else None


def choose(queries: int, keys: list[int]) -> str:
  """The implementation "auto" for rows of so many queries, and of keys in each source.

  Dense if there are few scores and no cache, of which most may be hidden. A kernel on a TPU or
  GPU, unless a row has few queries: decoding is bound by reading the cache.
  """
  if queries * sum(keys) <= _DENSE_SCORES and len(keys) == 1:
    return "dense"
  return "kernel" if platform() in ("tpu", "gpu") and queries >= 16 else "chunked"


def chunks(queries: int, on: str) -> tuple[int, int]:
  """Largest blocks of queries and of keys for rows of `queries` on a platform.

  A TPU keeps the scores of a block in on-chip memory, so few queries leave room for more keys; not
  for a whole cache, of which decoding reads only the blocks in use.
  On a CPU, smaller blocks fit its caches and skip more of a long row. A block of keys is copied, at
  a cost that counts next to the products of a single query.
  """
  if on == "cpu":
    if queries == 1:
      return 1, 64
    return 288 if queries <= 288 else 256, 288
  return 1024, 512 * max(1, 10 // max(1, queries))


def _attend_dense(q_RTNH, query, sources):
  """All scores at once, the sources' keys concatenated."""
  R, T, N, H = q_RTNH.shape
  rows = lambda x: repeat(x, "b ... -> (b w) ...", w=R // len(x))
  k_RKSH, v_RKSH = (jnp.concatenate([rows(x) for x in parts], 2)
                    for parts in zip(*((s.k, s.v) for s in sources)))
  keys = jax.tree.map(lambda *parts: jnp.concatenate([rows(x) for x in parts], 1),
                      *(s.tokens for s in sources))
  K = k_RKSH.shape[1]
  J = N // K
  # Heads that share keys are stacked along the queries: one product for all of them.
  q_RKTH = rearrange(q_RTNH, "r t (k j) h -> r k (j t) h", k=K)
  # The barrier keeps the mask's integers out of the loops over scores, forward and backward.
  hide_RTS = lax.optimization_barrier(jnp.where(allowed(query, keys), 0.0, MASKED))
  hide_R1TS = repeat(hide_RTS, "r t s -> r 1 (j t) s", j=J)
  logits_RKTS = product("rkth,rksh->rkts", q_RKTH, k_RKSH) * H ** -0.5 + hide_R1TS
  highest_RKT1 = lax.stop_gradient(jnp.max(logits_RKTS, -1, keepdims=True))
  scores_RKTS = jnp.exp(logits_RKTS - jnp.maximum(highest_RKT1, MAX_INIT))
  total_RKT1 = jnp.sum(scores_RKTS, -1, keepdims=True)
  out_RKTH = product("rkts,rksh->rkth", scores_RKTS.astype(v_RKSH.dtype), v_RKSH)
  # A query that sees nothing has total 0 and out 0.
  out_RKTH = (out_RKTH / jnp.where(total_RKT1 > 0, total_RKT1, 1.0)).astype(q_RTNH.dtype)
  return rearrange(out_RKTH, "r k (j t) h -> r t (k j) h", j=J)


def _attend_block(q_RTNH, query, sources, key_chunk):
  """Attention of one block of queries: each source separately, then merged."""
  q_RKJTH = grouped(q_RTNH, sources[0].k.shape[1])
  parts = [_attend_source(q_RKJTH, query, source, key_chunk) for source in sources]
  highest_RKJT = functools.reduce(jnp.maximum, (part[0] for part in parts))
  scales_RKJT = [jnp.exp(part[0] - highest_RKJT) for part in parts]
  total_RKJT = sum(scale * part[1] for scale, part in zip(scales_RKJT, parts))
  out_RKJTH = sum(scale[..., None] * part[2] for scale, part in zip(scales_RKJT, parts))
  # A query that sees nothing has total 0 and out 0.
  seen_RKJT = jnp.where(total_RKJT > 0, total_RKJT, 1.0)
  return ungrouped((out_RKJTH / seen_RKJT[..., None]).astype(q_RTNH.dtype))


def _attend_source(q_RKJTH, query, source, key_chunk):
  """`softmax_state` of all query rows with one source, one view at a time."""
  B, R = len(source.k), len(q_RKJTH)

  def one_view(args):
    q_BKJTH, query, tokens = args
    return softmax_state(allowed, key_chunk, q_BKJTH, source.k, source.v, query, tokens)

  if B == R:
    return one_view((q_RKJTH, query, source.tokens))
  by_view = lambda x: rearrange(x, "(b w) ... -> w b ...", b=B)
  state = lax.map(one_view, jax.tree.map(by_view, (q_RKJTH, query, source.tokens)))
  return jax.tree.map(lambda x: rearrange(x, "w b ... -> (b w) ..."), state)
