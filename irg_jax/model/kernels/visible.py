"""The mask as a few integers for each token, and the pairs of blocks in which anything is visible.

A kernel cannot afford `tokens.allowed` on four integers of each side. In any order of the tokens in
memory, the same rule fits into three integers of a query and two of a key:

    rank   place of a token in its row: (sample, index), packed into one int32
    lo     the first rank that a query may see: that of its sample
    reach  the last one: its own if it is causal, else the last of its split
    split  the query's split, counted from 1
    noise  the key's split, counted from 1, if it is NOISE, else 0

    allowed = lo <= rank <= reach and (noise == 0 or noise == split)

Their minima and maxima over blocks say which pairs of blocks a kernel has to visit, and which of
these need no mask. Both follow from the tokens alone, so they are computed once a step and not
once a layer.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange, reduce

from irg_jax.tokens import CAUSAL, NOISE, PADDING, Tokens

_LAST = jnp.iinfo(jnp.int32).max


def query_words(tokens: Tokens):
  """(lo, reach, split) of queries [..., T]: int32 [..., 3, T], -1 for padding."""
  q, k = (jax.tree.map(lambda x: jnp.expand_dims(x, axis), tokens) for axis in (-1, -2))
  together = (q.sample == k.sample) & (q.split == k.split) & (k.kind != CAUSAL)
  # The comparison of all pairs is fused into the maximum, never stored.
  last = jnp.maximum(tokens.index, jnp.max(jnp.where(together, k.index, -1), -1))
  words = jnp.stack([_rank(tokens.sample, -1), _rank(tokens.sample, last), tokens.split + 1], -2)
  return jnp.where(tokens.sample[..., None, :] == PADDING, -1, words)


def key_words(tokens: Tokens):
  """(rank, noise) of keys [..., S]: int32 [..., 2, S], -2 for padding."""
  words = jnp.stack([_rank(tokens.sample, tokens.index),
                     jnp.where(tokens.kind == NOISE, tokens.split + 1, 0)], -2)
  return jnp.where(tokens.sample[..., None, :] == PADDING, -2, words)


def _rank(sample, index):
  """One integer for samples below 32768 and indices from -1 (slots of a cache) to 65534."""
  return (sample << 16) + index + 1


def sees(lo, reach, split, rank, noise):
  """The rule on the words of queries and keys, broadcast against each other: bool."""
  return (lo <= rank) & (rank <= reach) & ((noise == 0) | (noise == split))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
  """The pairs of blocks that a kernel visits, in order; entries past the last mean nothing.

  Attributes:
    start: int32 [O + 1], the entry at which each outer block begins, and the number of entries.
    outer, inner: int32 [Z], numbers of blocks; `outer` counts through all rows.
    flags: int32 [Z], bits FIRST and LAST of its outer block; for view w the bits SEEN << 2 w, that
      it may see something, and WHOLE << 2 w, that it sees everything and needs no mask.
  """

  start: jax.Array
  outer: jax.Array
  inner: jax.Array
  flags: jax.Array


FIRST, LAST, SEEN, WHOLE = 1, 2, 4, 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prepared:
  """The mask of one set of keys in the form that a kernel takes; made once a step.

  Attributes:
    query_words, key_words: int32 [B, W, 3, T] and [B, W, 2, S], padded to whole blocks.
    by_query, by_key: the pairs of blocks in the order of queries and in that of keys.
    query_size, key_size: static sizes of blocks.
    head_dim: static, H without padding.
  """

  query_words: jax.Array
  key_words: jax.Array
  by_query: Blocks
  by_key: Blocks
  query_size: int = dataclasses.field(metadata={"static": True})
  key_size: int = dataclasses.field(metadata={"static": True})
  head_dim: int = dataclasses.field(metadata={"static": True})


def prepare(query_BW3T, key_BW2S, query_size: int, key_size: int, head_dim: int) -> Prepared:
  """Pads the words to whole blocks and lists the pairs of blocks."""
  pad = lambda x, size, fill: jnp.pad(
      x, [(0, 0)] * 3 + [(0, -x.shape[-1] % size)], constant_values=fill)
  query_BW3T, key_BW2S = pad(query_BW3T, query_size, -1), pad(key_BW2S, key_size, -2)
  return Prepared(query_BW3T, key_BW2S,
                  *visible_blocks(query_BW3T, key_BW2S, query_size, key_size),
                  query_size, key_size, head_dim)


def visible_blocks(query_BW3T, key_BW2S, query_size: int, key_size: int):
  """Pairs of blocks by the words of queries and keys, whose lengths the sizes divide.

  A pair is visited if one of the W views may see something in it.

  Returns:
    (Blocks with queries outside, for the output and d_q; with keys outside, for d_k and d_v). Each
    outer block has at least one entry, so that each part of a result is written.
  """
  low = lambda x, size: reduce(x, "b w (z t) -> b w z", "min", t=size)
  high = lambda x, size: reduce(x, "b w (z t) -> b w z", "max", t=size)
  q = lambda bound, x_BWT: bound(x_BWT, query_size)[..., :, None]
  k = lambda bound, x_BWS: bound(x_BWS, key_size)[..., None, :]
  lo, reach, split = (query_BW3T[:, :, i] for i in range(3))
  rank, noise = (key_BW2S[:, :, i] for i in range(2))
  # Padding is left out of the bounds of what may be visible.
  lo_real, rank_real = jnp.where(lo < 0, _LAST, lo), jnp.where(rank < 0, _LAST, rank)
  some_BWQK = (q(low, lo_real) <= k(high, rank)) & (k(low, rank_real) <= q(high, reach)) & (
      (k(low, noise) <= 0)
      | (k(low, noise) <= q(high, split)) & (q(low, split) <= k(high, noise)))
  own = (q(low, split) == k(high, noise)) & (q(high, split) == k(low, noise))
  whole_BWQK = some_BWQK & (q(high, lo) <= k(low, rank)) & (k(high, rank) <= q(low, reach)) & (
      (k(high, noise) <= 0) | own)
  some_BQK = jnp.any(some_BWQK, 1)
  bits_BQK = sum((SEEN * some_BWQK[:, w] + WHOLE * whole_BWQK[:, w]) << 2 * w
                 for w in range(some_BWQK.shape[1]))
  turned = lambda x: rearrange(x, "b q k -> b k q")
  return _listed(some_BQK, bits_BQK), _listed(turned(some_BQK), turned(bits_BQK))


def _listed(some_BOI, bits_BOI) -> Blocks:
  """The pairs [row, outer block, inner block] that are set, in order, with bits of the views."""
  B, O, I = some_BOI.shape
  none_BO1 = ~jnp.any(some_BOI, -1, keepdims=True)
  some_BOI |= none_BO1 & (jnp.arange(I) == 0)
  place = jnp.cumsum(some_BOI.ravel()) - 1
  # A scatter, not a sort: sorting a long list takes minutes to compile for a TPU.
  pick = lambda x: jnp.zeros(B * O * I, jnp.int32).at[
      jnp.where(some_BOI.ravel(), place, B * O * I)].set(x.ravel(), mode="drop")
  outer_BOI = jnp.broadcast_to(jnp.arange(B * O).reshape(B, O, 1), some_BOI.shape)
  inner_BOI = jnp.broadcast_to(jnp.arange(I), some_BOI.shape)
  within_BOI = jnp.cumsum(some_BOI, -1)
  flags_BOI = (FIRST * (within_BOI == 1) + LAST * (within_BOI == within_BOI[..., -1:])
               + bits_BOI)
  start = jnp.concatenate([jnp.zeros(1, jnp.int32), place.reshape(B * O, I)[:, -1] + 1])
  return Blocks(start, *(pick(x.astype(jnp.int32)) for x in (
      outer_BOI, inner_BOI, flags_BOI)))
