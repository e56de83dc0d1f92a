"""Attention block by block, with a backward pass of its own.

A block of queries goes through those blocks of keys in which one of them sees something (the
online softmax), so memory is linear in the length, and a block that is hidden from all of them
costs no more than its mask. What autodiff would keep of such a loop is every block's scores.
Here the forward pass keeps its result and, for each query, the logarithm of the softmax's
divisor; the backward pass makes the scores anew (the recurrence of "FlashAttention", arXiv
2205.14135).

Inside, queries are [B, K, G, T, H], grouped by the keys that their G = N // K heads share: with
k and v [B, K, S, H] that makes plain products of matrices.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from irg_jax.sharding import partition_spec

MASKED = -1e30
MAX_INIT = -1e29  # above MASKED: exp(MASKED - max) is exactly 0, also where nothing is seen


def blockwise(mask, query_chunk: int, key_chunk: int, q_BTNH, k_BKSH, v_BKSH, query, keys):
  """Softmax attention over one row of keys for each row of queries.

  On a mesh every device takes its own queries: `length` stays split, while the keys, which
  are few with grouped queries, are gathered, and their gradients are added up once.

  Args:
    mask: function (query, keys) -> bool [B, Tq, Tk].
    query_chunk, key_chunk: largest blocks on a device.
    query, keys: what `mask` wants to know, pytrees of [B, T] and [B, S].

  Returns:
    [B, T, N, H] in q's dtype; zeros for queries that see nothing.
  """
  attend = functools.partial(_attend, mask, query_chunk, key_chunk)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size <= 1:
    return attend(q_BTNH, k_BKSH, v_BKSH, query, keys)
  spec = lambda x, *axes: partition_spec(x.shape, axes, mesh)
  kv = spec(k_BKSH, "batch", "heads", None, None)
  q = spec(q_BTNH, "batch", "length", "heads", None)
  if kv[1] != q[2]:  # heads that share keys stay together
    q, kv = PartitionSpec(*q[:2], None, None), PartitionSpec(kv[0], None, None, None)
  parts = q[1] or ()  # mesh axes that queries are split over and keys are not

  def local(q, k, v, query, keys):
    # Seen by every part: the transpose of this is the sum of their gradients.
    k, v = (lax.pcast(x, parts, to="varying") for x in (k, v)) if parts else (k, v)
    return attend(q, k, v, query, keys)

  specs = (q, kv, kv, jax.tree.map(lambda x: spec(x, "batch", "length"), query),
           jax.tree.map(lambda x: spec(x, "batch", None), keys))
  return jax.shard_map(local, in_specs=specs, out_specs=q)(q_BTNH, k_BKSH, v_BKSH, query, keys)


def softmax_state(mask, key_chunk: int, q, k, v, query, keys):
  """What the online softmax knows of some keys, to be joined with what it knows of others.

  Args:
    q, k, v: [B, K, G, T, H], [B, K, S, H] and [B, K, S, H].
    mask, key_chunk, query, keys: see `blockwise`.

  Returns:
    (highest logit, sum of exponentials, weighted sum of values): float32 [B, K, G, T],
    [B, K, G, T] and [B, K, G, T, H].
  """
  def step(k, v, visible, _, state):
    logits, (highest, total, out) = _logits(q, k, visible), state
    new = jnp.maximum(highest, jnp.max(logits, -1))
    weights, decay = jnp.exp(logits - new[..., None]), jnp.exp(highest - new)
    values = product("bkgtc,bkch->bkgth", weights.astype(v.dtype), v)
    return new, total * decay + jnp.sum(weights, -1), out * decay[..., None] + values

  empty = q.astype(jnp.float32) * 0  # made of q: on a mesh it varies over devices as q does
  state = empty[..., 0] + MAX_INIT, empty[..., 0], empty
  return _over_visible_blocks(mask(query, keys), k, v, key_chunk, step, state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(mask, query_chunk, key_chunk, q, k, v, query, keys):
  return _forward(mask, query_chunk, key_chunk, q, k, v, query, keys)[0]


def _forward(mask, query_chunk, key_chunk, q, k, v, query, keys):
  # Tied to q: a mask that depends on nothing that is trained would be made once, before the
  # scan over layers, and kept whole for all blocks and heads.
  q, query, keys = lax.optimization_barrier((q, query, keys))

  def block(args):
    q, query = args
    highest, total, out = softmax_state(
        mask, key_chunk, grouped(q, k.shape[1]), k, v, query, keys)
    seen = jnp.where(total > 0, total, 1.0)
    return ungrouped((out / seen[..., None]).astype(q.dtype)), highest + jnp.log(seen)

  out, lse = lax.map(block, cut((q, query), query_chunk))
  out = join(out, q.shape[1])
  return out, (q, k, v, query, keys, out, lse)


def _backward(mask, query_chunk, key_chunk, residuals, d_out):
  q, k, v, query, keys, out, lse = lax.optimization_barrier(residuals)
  T, (_, K, _, H) = q.shape[1], k.shape
  scale = H ** -0.5

  def block(d_kv, args):
    q, out, d_out, query, lse = args
    q, out, d_out = (grouped(x, K) for x in (q, out, d_out))
    # Sum over keys of weight times its gradient, without the weights.
    inner = jnp.sum(d_out.astype(jnp.float32) * out, -1)
    # Transposed once, not block by block: the products below contract the queries.
    q_columns, d_out_columns = lax.optimization_barrier(
        (q.swapaxes(-1, -2), d_out.swapaxes(-1, -2)))

    def step(k, v, visible, start, state):
      d_q, d_k, d_v = state
      weights = jnp.exp(_logits(q, k, visible) - lse[..., None])
      d_logits = weights * (product("bkgth,bkch->bkgtc", d_out, v) - inner[..., None])
      weights, d_logits = weights.astype(q.dtype), d_logits.astype(q.dtype)
      d_q += product("bkgtc,bkch->bkgth", d_logits, k)
      d_k = _add_at(start, d_k, product("bkght,bkgtc->bkhc", q_columns, d_logits))
      d_v = _add_at(start, d_v, product("bkght,bkgtc->bkhc", d_out_columns, weights))
      return d_q, d_k, d_v

    d_q = q.astype(jnp.float32) * 0
    d_q, *d_kv = _over_visible_blocks(mask(query, keys), k, v, key_chunk, step, (d_q, *d_kv))
    return tuple(d_kv), ungrouped((d_q * scale).astype(q.dtype))

  # Gradients of keys and values are gathered as [B, K, H, S].
  zeros = tuple(x.astype(jnp.float32).swapaxes(2, 3) * 0 for x in (k, v))
  queries = cut((q, out, d_out, query), query_chunk)
  (d_k, d_v), d_q = lax.scan(block, zeros, (*queries, lse))
  d_k, d_v = (d.swapaxes(2, 3) for d in (d_k * scale, d_v))
  return join(d_q, T), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


_attend.defvjp(_forward, _backward)


def _over_visible_blocks(visible, k, v, key_chunk, step, state):
  """`state = step(k, v, visible, start, state)` for the blocks in which any row sees something.

  Args:
    visible: the mask, bool [B, T, S]. It is made in front of the loop: within it, it would
      become part of the loops over scores, and so be made anew for each head.
  """
  visible = mask_in_blocks(visible, key_chunk)
  S, size = k.shape[2], visible.shape[-1]
  some = jnp.any(visible, (0, 1, 3))
  order, count = jnp.argsort(~some, stable=True), jnp.sum(some)

  def body(carry):
    i, state = carry
    start = jnp.minimum(order[i] * size, S - size)
    part = lambda x: lax.dynamic_slice_in_dim(x, start, size, 2)
    seen = lax.dynamic_index_in_dim(visible, order[i], 2, keepdims=False)
    return i + 1, step(part(k), part(v), seen, start, state)

  # The bound that does not depend on data stands there for those who read the program.
  more = lambda carry: (carry[0] < len(some)) & (carry[0] < count)
  return lax.while_loop(more, body, (count * 0, state))[1]


def mask_in_blocks(visible, most: int):
  """[B, T, S] -> [B, T, blocks, `key_size(S, most)`]. The last block ends with the keys.

  So it may begin within the one before, and keys need no padding, which would copy them; what
  both have is hidden in the last one.
  """
  B, T, S = visible.shape
  size = key_size(S, most)
  own = -(-S // size) * size - size  # keys in front of the last block's own
  hidden = jnp.zeros((B, T, own + size - S), bool)
  parts = visible[..., :own], hidden, visible[..., own:]
  return jnp.concatenate(parts, -1).reshape(B, T, -1, size)


def _logits(q, k, visible):
  """Scores [B, K, G, T, C] of a block, MASKED where the query must not look."""
  scores = product("bkgth,bkch->bkgtc", q, k) * q.shape[-1] ** -0.5
  return jnp.where(visible[:, None, None], scores, MASKED)


def _add_at(start, total, new):
  """Adds `new` to `total` from `start` of the last axis on."""
  new += lax.dynamic_slice_in_dim(total, start, new.shape[-1], -1)
  return lax.dynamic_update_slice_in_dim(total, new, start, -1)


def grouped(q_RTNH, K: int):
  """[R, T, N, H] -> [R, K, N // K, T, H]."""
  R, T, N, H = q_RTNH.shape
  return q_RTNH.reshape(R, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


def ungrouped(x_RKGTH):
  """The inverse of `grouped`."""
  R, K, G, T, H = x_RKGTH.shape
  return x_RKGTH.transpose(0, 3, 1, 2, 4).reshape(R, T, K * G, H)


def product(equation, a, b):
  """An einsum whose sums are float32."""
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def equal_size(length: int, most: int) -> int:
  """The size of blocks of at most `most` that pads a length least."""
  return -(-length // -(-length // most))


def key_size(length: int, most: int) -> int:
  """The size of blocks of at most `most` keys that share least, in whole lanes of a TPU."""
  if length <= most:
    return length
  return min(range(most, most // 2, -math.gcd(most, 128)), key=lambda size: -length % size)


def pad_to_multiple(x, size: int, axis: int):
  """Pads an axis at its end to a multiple of `size`.

  Integers, which is what the mask looks at, are padded with -1, which sees nothing and is
  seen by nothing.
  """
  widths = [(0, -x.shape[axis] % size if i == axis else 0) for i in range(x.ndim)]
  return jnp.pad(x, widths, constant_values=-1 if jnp.issubdtype(x.dtype, jnp.integer) else 0)


def cut(tree, most: int):
  """[B, T, ...] -> [n, B, size, ...]: equal blocks, the last one padded."""
  def one(x):
    size = equal_size(x.shape[1], most)
    x = pad_to_multiple(x, size, 1)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

  return jax.tree.map(one, tree)


def join(tree, length: int):
  """The inverse of `cut`."""
  one = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]
  return jax.tree.map(one, tree)
