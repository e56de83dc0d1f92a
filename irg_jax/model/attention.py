"""The mask rule, and the one function that attends.

Which token may look at which is a pure function of four integers that every token carries
(`Tokens`); `allowed` is the only place where the rule is written (spec section 3). Every
way of computing attention calls it on the pieces it has at hand, so no mask of a whole row
needs to exist, and the order of tokens in memory does not matter.

A Pallas kernel goes here, as one more branch of `attend`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from irg_jax.model.blockwise import (
    MASKED, MAX_INIT, absorb, blockwise, cut, equal_size, join, pad_to_multiple, product)
from irg_jax.sharding import platform

# Kinds of split.
CAUSAL, FULL, NOISE = 0, 1, 2

PADDING = -1  # the `sample` of a token that is not there

_DENSE_SCORES = 512 * 1024  # scores a head up to which the dense form is taken


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
  """What the mask needs to know of each token; int32 arrays of one shape [..., T].

  Attributes:
    sample: tokens see each other only within a sample; PADDING sees and is seen by nothing.
    index: order within the sample. "Causal" goes by index, never by rotary position.
    split: number of the split (one text, one picture) within the sample.
    kind: CAUSAL, FULL or NOISE, the same for all tokens of a split.
  """

  sample: jax.Array
  index: jax.Array
  split: jax.Array
  kind: jax.Array


def allowed(query: Tokens, key: Tokens):
  """The mask: bool [..., Tq, Tk], true where the query may look at the key.

  allowed = same sample and (key is not later, or both are in one FULL or NOISE split)
            and not (key is in a NOISE split that is not the query's)

  Worked example, one sample: text `a b` (CAUSAL), a condition picture `p q` (FULL), a noised
  picture `x y` (NOISE), text `c` (CAUSAL). Rows are queries:

        a b p q x y c
      a 1 . . . . . .     text is causal
      b 1 1 . . . . .
      p 1 1 1 1 . . .     a picture sees all of itself and everything before it
      q 1 1 1 1 . . .
      x 1 1 1 1 1 1 .     so does a noised picture
      y 1 1 1 1 1 1 .
      c 1 1 1 1 . . 1     but nobody else sees a noised picture

  Second example, two samples `a b` and `c` and a padding token `_` in one row:

        a b c _
      a 1 . . .
      b 1 1 . .
      c . . 1 .           samples never see each other
      _ . . . .           padding sees nothing and is seen by nothing
  """
  q = jax.tree.map(lambda x: x[..., :, None], query)
  k = jax.tree.map(lambda x: x[..., None, :], key)
  same_sample = (q.sample == k.sample) & (k.sample != PADDING)
  same_split = q.split == k.split
  visible = (k.index <= q.index) | (same_split & (k.kind != CAUSAL))
  return same_sample & visible & (same_split | (k.kind != NOISE))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
  """Keys and values that queries may look at, with the keys' metadata.

  Attributes:
    k, v: [B, S, K, H].
    tokens: Tokens of the keys, [R, S] where R is a multiple of B: the R // B query rows
      that follow each other share one row of keys, each with its own view of them.
    sparse: static. Most slots may be invisible: the chunked form takes the query rows' views
      one after the other and reads only those blocks of keys that hold something visible to
      the view (a loop of dynamic length: not differentiable).
  """

  k: jax.Array
  v: jax.Array
  tokens: Tokens
  sparse: bool = dataclasses.field(default=False, metadata=dict(static=True))


def attend(q_RTNH, query: Tokens, sources, *, implementation: str = "auto",
           query_chunk: int | None = None, key_chunk: int | None = None):
  """Softmax attention of q over all the keys of all sources, with grouped-query heads.

  Args:
    q_RTNH: [R, T, N, H], N a multiple of the sources' K.
    query: Tokens of the queries, [R, T].
    sources: sequence of KeyValues.
    implementation: "dense" builds all scores of a source at once (the oracle, and the
      fastest for short rows); "chunked" needs memory linear in the length and skips what
      a sparse source hides; "auto" is dense where the scores are few and no source is sparse.
    query_chunk, key_chunk: largest blocks of the chunked form; None is 2048 queries and 128
      keys on a CPU, whose caches are small, 1024 and 512 elsewhere (a TPU keeps the scores of
      a block on the chip), where it is up to 16 times as many keys for a few queries.

  Returns:
    [R, T, N, H] in q's dtype; zeros for queries that see nothing. Logits, softmax and
    accumulator are float32.
  """
  T = q_RTNH.shape[1]
  query_chunk = query_chunk or (2048 if platform() == "cpu" else 1024)
  key_chunk = key_chunk or default_key_chunk(T)
  if implementation == "auto":
    short = T * sum(s.k.shape[1] for s in sources) <= _DENSE_SCORES
    implementation = "dense" if short and not any(s.sparse for s in sources) else "chunked"
  if implementation == "dense":
    return _attend_dense(q_RTNH, query, sources)
  if implementation != "chunked":
    raise ValueError(f"unknown attention implementation {implementation!r}")
  if len(sources) == 1 and not sources[0].sparse:
    source, = sources
    return blockwise(allowed, query_chunk, key_chunk, q_RTNH, source.k, source.v, query,
                     source.tokens)
  if T <= query_chunk:
    return _attend_block(q_RTNH, query, sources, key_chunk)
  block = lambda args: _attend_block(*args, sources, key_chunk)
  return join(lax.map(block, cut((q_RTNH, query), query_chunk)), T)


def default_key_chunk(queries: int) -> int:
  """Keys of a block, for rows of `queries`."""
  return 128 if platform() == "cpu" else 512 * max(1, 16 // queries)


def _attend_dense(q_RTNH, query, sources):
  """All scores at once, the sources' keys side by side."""
  R, T, N, H = q_RTNH.shape
  side_by_side = lambda parts: jnp.concatenate(
      [jnp.repeat(x, R // x.shape[0], axis=0) for x in parts], axis=1)
  k, v = side_by_side([s.k for s in sources]), side_by_side([s.v for s in sources])
  keys = jax.tree.map(lambda *parts: side_by_side(parts), *(s.tokens for s in sources))
  # The queries of the heads that share keys stand below each other: one product for all of them.
  K, group = k.shape[2], N // k.shape[2]
  q = q_RTNH.reshape(R, T, K, group, H).transpose(0, 2, 3, 1, 4).reshape(R, K, group * T, H)
  # The barrier keeps the mask's integers out of the loops over scores, forward and backward.
  hide = lax.optimization_barrier(jnp.where(allowed(query, keys), 0.0, MASKED))
  logits = product("rkqh,rskh->rkqs", q, k) * H ** -0.5 + jnp.tile(hide[:, None], (1, 1, group, 1))
  highest = jnp.maximum(lax.stop_gradient(jnp.max(logits, -1, keepdims=True)), MAX_INIT)
  scores = jnp.exp(logits - highest)
  total = jnp.sum(scores, -1, keepdims=True)
  out = product("rkqs,rskh->rkqh", scores.astype(v.dtype), v)
  # Where nothing is seen, total is 0 and so is out.
  out = (out / jnp.where(total > 0, total, 1.0)).astype(q_RTNH.dtype)
  return out.reshape(R, K, group, T, H).transpose(0, 3, 1, 2, 4).reshape(R, T, N, H)


def _attend_block(q_RTNH, query, sources, key_chunk):
  """Attends with one block of queries: each source apart, then the parts are joined."""
  parts = [_attend_source(q_RTNH, query, source, key_chunk) for source in sources]
  highest = parts[0][0]
  for part in parts[1:]:
    highest = jnp.maximum(highest, part[0])
  scales = [jnp.exp(part[0] - highest) for part in parts]
  total = sum(scale * part[1] for scale, part in zip(scales, parts))
  out = sum(scale[..., None] * part[2] for scale, part in zip(scales, parts))
  # Where nothing is seen, total is 0 and so is out.
  return (out / jnp.where(total > 0, total, 1.0)[..., None]).astype(q_RTNH.dtype)


def _attend_source(q_RTNH, query, source, key_chunk):
  """Online softmax over one source.

  Returns:
    (highest logit, sum of exponentials, weighted sum of values): float32 [R, T, N],
    [R, T, N], [R, T, N, H].
  """
  R, T, N, H = q_RTNH.shape
  B, S, K, _ = source.k.shape
  q = q_RTNH.reshape(B, R // B, T, K, N // K, H).transpose(0, 3, 1, 2, 4, 5)  # B K view T group H
  by_view = lambda tokens: jax.tree.map(lambda x: x.reshape(B, R // B, -1), tokens)
  queries, tokens = (q, by_view(query)), by_view(source.tokens)
  if S <= key_chunk:
    state = _reduce_block(_empty_state(q), queries, source.k, source.v, tokens)
  else:
    reduce = _reduce_visible_blocks if source.sparse else _reduce_all_blocks
    state = reduce(queries, source.k, source.v, tokens, key_chunk)
  to_rows = lambda x: jnp.moveaxis(x, 1, 3).reshape(R, T, N, *x.shape[5:])
  return jax.tree.map(to_rows, state)


def _reduce_all_blocks(queries, k, v, tokens, key_chunk):
  step = lambda state, block: (_reduce_block(state, queries, *block), None)
  blocks = *cut((k, v), key_chunk), cut(tokens, key_chunk, axis=2)
  return lax.scan(step, _empty_state(queries[0]), blocks)[0]


def _reduce_visible_blocks(queries, k, v, tokens, key_chunk):
  """View by view, only the blocks of keys in which a row of that view can see something."""
  size = equal_size(k.shape[1], key_chunk)
  k, v = (pad_to_multiple(x, size, axis=1) for x in (k, v))
  tokens = jax.tree.map(lambda x: pad_to_multiple(x, size, axis=2), tokens)
  visible = (tokens.sample != PADDING).reshape(*tokens.sample.shape[:2], -1, size)
  visible = jnp.any(visible, axis=(0, 3))  # view, block
  order = jnp.argsort(~visible, axis=-1, stable=True)

  def reduce_view(args):
    q, (query, tokens), order, count = args
    one = lambda x: jax.tree.map(lambda x: jnp.expand_dims(x, 1), x)
    queries, tokens = (jnp.expand_dims(q, 2), one(query)), one(tokens)

    def step(i, state):
      block = lambda x, axis: lax.dynamic_slice_in_dim(x, order[i] * size, size, axis)
      keys = jax.tree.map(lambda x: block(x, 2), tokens)
      return _reduce_block(state, queries, block(k, 1), block(v, 1), keys)

    state = lax.fori_loop(0, count, step, _empty_state(queries[0]))
    return jax.tree.map(lambda x: jnp.squeeze(x, 2), state)

  q, query = queries
  by_view = lambda x, axis: jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), x)
  args = by_view(q, 2), by_view((query, tokens), 1), order, jnp.sum(visible, -1)
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), lax.map(reduce_view, args))


def _empty_state(q):
  return (jnp.full(q.shape[:-1], MAX_INIT, jnp.float32), jnp.zeros(q.shape[:-1], jnp.float32),
          jnp.zeros(q.shape, jnp.float32))


def _reduce_block(state, queries, k, v, tokens):
  """One step of the online softmax.

  Args:
    state: (highest, total, out) so far, [B, K, views, T, group(, H)].
    queries: (q [B, K, views, T, group, H], Tokens [B, views, T]).
    k, v, tokens: keys and values [B, C, K, H], and Tokens [B, views, C].
  """
  q, query = queries
  mask = allowed(query, tokens)[:, None, :, :, None]
  logits = product("bkvtgh,bckh->bkvtgc", q, k) * q.shape[-1] ** -0.5
  values = lambda weights: product("bkvtgc,bckh->bkvtgh", weights.astype(v.dtype), v)
  return absorb(state, jnp.where(mask, logits, MASKED), values)
