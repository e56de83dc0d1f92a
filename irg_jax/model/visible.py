"""Attention that computes only the blocks in which something is visible, for a lone CPU.

The recurrence is that of `blockwise`. Queries and keys are brought into the order of their
samples, where what is visible lies close together; each block of queries then loops over the
blocks of keys that it can see at all. Scores are kept transposed, [N, keys, queries]: so no
product, forward or backward, has a large operand to turn around.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

_MASKED = -1e30
_MAX_INIT = -1e29  # above _MASKED: exp(_MASKED - max) is exactly 0, also where nothing is seen
BLOCK = 128  # queries, and keys; the scores of all heads of a block stay in the cache


def attend_visible(mask, q_BTNH, k_BSKH, v_BSKH, query, keys):
  """Softmax attention over one row of keys for each row of queries.

  Args:
    mask: function (query, keys) -> bool [..., Tq, Tk].
    query, keys: `attention.Tokens`, [B, T] and [B, S].

  Returns:
    [B, T, N, H] in q's dtype; zeros for queries that see nothing.
  """
  return _attend(mask, q_BTNH, k_BSKH, v_BSKH, query, keys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(mask, q, k, v, query, keys):
  return _forward(mask, q, k, v, query, keys)[0]


def _forward(mask, q, k, v, query, keys):
  blocks = _Blocks(mask, q, k, query, keys)
  q_blocks, k_blocks = blocks.queries(q * q.shape[-1] ** -0.5), blocks.keys(k)
  v_turned = jnp.swapaxes(blocks.keys(v), -1, -2)

  def block(i):
    q = q_blocks[i]

    def step(j, state):
      highest, total, out = state
      at, hidden = blocks.visible(i, j)
      scores = _product("nch,nth->nct", k_blocks[at], q) + hidden
      new = jnp.maximum(highest, jnp.max(scores, 1))
      weights, decay = jnp.exp(scores - new[:, None]), jnp.exp(highest - new)
      values = _product("nhc,nct->nht", v_turned[at], weights.astype(v.dtype))
      return new, total * decay + jnp.sum(weights, 1), out * decay[:, None] + values

    zeros = jnp.zeros((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)  # N H queries
    state = jnp.full_like(zeros[:, 0], _MAX_INIT), zeros[:, 0], zeros
    highest, total, out = lax.fori_loop(0, blocks.count[i], step, state)
    seen = jnp.where(total > 0, total, 1.0)
    return jnp.swapaxes(out / seen[:, None], 1, 2), highest + jnp.log(seen)

  out, lse = lax.map(block, jnp.arange(len(blocks.count)))
  return blocks.from_queries(out).astype(q.dtype), (q, k, v, query, keys, out, lse)


def _backward(mask, residuals, d_out):
  q, k, v, query, keys, out, lse = residuals
  scale = q.shape[-1] ** -0.5
  blocks = _Blocks(mask, q, k, query, keys)
  q_blocks, k_blocks, v_blocks = blocks.queries(q * scale), blocks.keys(k), blocks.keys(v)
  k_turned, d_out = jnp.swapaxes(k_blocks, -1, -2), blocks.queries(d_out)
  # Sum over keys of weight times its gradient, without the weights.
  inner = jnp.sum(d_out.astype(jnp.float32) * out, -1)

  def block(gradients, i):
    q, d_out_i = q_blocks[i], d_out[i]

    def step(j, state):
      d_q, d_k, d_v = state
      at, hidden = blocks.visible(i, j)
      scores = _product("nch,nth->nct", k_blocks[at], q) + hidden
      weights = jnp.exp(scores - lse[i][:, None])
      d_weights = _product("nch,nth->nct", v_blocks[at], d_out_i)
      d_scores = (weights * (d_weights - inner[i][:, None])).astype(q.dtype)
      d_v = d_v.at[at].add(_product("nct,nth->nch", weights.astype(q.dtype), d_out_i))
      d_k = d_k.at[at].add(_product("nct,nth->nch", d_scores, q))
      return d_q + _product("nhc,nct->nht", k_turned[at], d_scores), d_k, d_v

    d_q = jnp.zeros((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
    d_q, *gradients = lax.fori_loop(0, blocks.count[i], step, (d_q, *gradients))
    return tuple(gradients), jnp.swapaxes(d_q, 1, 2)

  zeros = jnp.zeros(k_blocks.shape, jnp.float32)
  (d_k, d_v), d_q = lax.scan(block, (zeros, zeros), jnp.arange(len(blocks.count)))
  return ((blocks.from_queries(d_q) * scale).astype(q.dtype),
          blocks.from_keys(d_k).astype(k.dtype), blocks.from_keys(d_v).astype(v.dtype), None, None)


_attend.defvjp(_forward, _backward)


class _Blocks:
  """Rows cut into blocks, and which blocks see which.

  Attributes:
    count: int32 [B * query blocks], how many blocks of keys each block of queries sees.
  """

  def __init__(self, mask, q, k, query, keys):
    self._mask, self._group = mask, q.shape[2] // k.shape[2]
    self._q_order, self._k_order = _order(query), _order(keys)
    self._query, self._keys = (
        jax.tree.map(lambda x: _cut(x, order, -1), tokens)
        for tokens, order in ((query, self._q_order), (keys, self._k_order)))
    rows, self._n_keys = len(q), self._keys.sample.shape[1]
    each = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), self._query)
    some, all_ = lax.map(lambda one: _some_and_all(mask, one, self._keys), each)
    flat = lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, self._n_keys)
    some, self._all = flat(some), flat(all_)
    self.count = jnp.sum(some, -1, dtype=jnp.int32)
    self._visible = jnp.argsort(~some, axis=-1, stable=True).astype(jnp.int32)
    self._row = jnp.repeat(jnp.arange(rows), some.shape[0] // rows)
    self._query, self._keys = (
        jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), x) for x in (self._query, self._keys))

  def visible(self, i, j):
    """The j-th visible block of keys of query block i: (its number, what to add to scores)."""
    number = self._visible[i, j]
    at = self._row[i] * self._n_keys + number
    query, keys = (jax.tree.map(lambda x: x[n], t) for t, n in ((self._query, i), (self._keys, at)))
    hide = lambda: jnp.where(self._mask(query, keys).T, 0.0, _MASKED)
    # A branch, so that XLA does not fuse the mask into the loops of every head.
    return at, lax.cond(self._all[i, number], lambda: jnp.zeros((BLOCK, BLOCK)), hide)

  def queries(self, x):
    """[B, T, N, H] -> [B * blocks, N, BLOCK, H]."""
    return _cut_heads(x, self._q_order)

  def from_queries(self, x):
    return _join_heads(x, self._q_order)

  def keys(self, x):
    """[B, S, K, H] -> [B * blocks, N, BLOCK, H]: every head has keys of its own."""
    return jnp.repeat(_cut_heads(x, self._k_order), self._group, axis=1)

  def from_keys(self, x):
    x = x.reshape(len(x), -1, self._group, *x.shape[2:])
    return _join_heads(jnp.sum(x, 2), self._k_order)


def _order(tokens):
  """Tokens of each row by sample, and in it by index: int [B, T]."""
  return jnp.lexsort((tokens.index, tokens.sample), axis=-1)


def _some_and_all(mask, query, keys):
  """Does a query block [B, BLOCK] see some, or all, of each block of keys? bool [B, blocks]."""
  seen = mask(jax.tree.map(lambda x: x[:, None], query), keys)
  return jnp.any(seen, (2, 3)), jnp.all(seen, (2, 3))


def _cut(x, order, fill):
  """[B, T, ...] in a new order -> [B, blocks, BLOCK, ...]; the last block is padded."""
  x = jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)
  widths = [(0, -x.shape[1] % BLOCK if i == 1 else 0) for i in range(x.ndim)]
  return jnp.pad(x, widths, constant_values=fill).reshape(len(x), -1, BLOCK, *x.shape[2:])


def _cut_heads(x, order):
  x = jnp.swapaxes(_cut(x, order, 0), 2, 3)
  return x.reshape(-1, *x.shape[2:])


def _join_heads(x, order):
  """The inverse of `_cut_heads`."""
  x = jnp.swapaxes(x.reshape(len(order), -1, *x.shape[1:]), 2, 3)
  x = x.reshape(len(x), -1, *x.shape[3:])[:, :order.shape[1]]
  return jnp.take_along_axis(x, jnp.argsort(order, axis=1)[..., None, None], axis=1)


def _product(equation, a, b):
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
