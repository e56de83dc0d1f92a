"""Attention block by block, with a backward pass of its own.

What autodiff would keep of a loop over blocks of keys is every block's scores: quadratic in
the length. Here the forward pass keeps its result and, for each query, the logarithm of the
softmax's divisor; the backward pass makes the scores anew, block by block (the recurrence of
"FlashAttention", arXiv 2205.14135). Memory is linear in the length both ways.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from irg_jax.sharding import partition_spec

MASKED = -1e30
MAX_INIT = -1e29  # above MASKED: exp(MASKED - max) is exactly 0, also where nothing is seen


def blockwise(mask, query_chunk: int, key_chunk: int, q_BTNH, k_BSKH, v_BSKH, query, keys):
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
    return attend(q_BTNH, k_BSKH, v_BSKH, query, keys)
  spec = lambda x, *axes: partition_spec(x.shape, axes, mesh)
  kv = spec(k_BSKH, "batch", None, "heads", None)
  q = spec(q_BTNH, "batch", "length", "heads", None)
  if kv[2] != q[2]:  # heads that share keys stay together
    q, kv = (type(q)(*s[:2], None, None) for s in (q, kv))
  parts = q[1] or ()  # mesh axes that queries are split over and keys are not

  def local(q, k, v, query, keys):
    # Seen by every part: the transpose of this is the sum of their gradients.
    k, v = (lax.pcast(x, parts, to="varying") for x in (k, v)) if parts else (k, v)
    return attend(q, k, v, query, keys)

  specs = (q, kv, kv, jax.tree.map(lambda x: spec(x, "batch", "length"), query),
           jax.tree.map(lambda x: spec(x, "batch", None), keys))
  return jax.shard_map(local, in_specs=specs, out_specs=q)(q_BTNH, k_BSKH, v_BSKH, query, keys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(mask, query_chunk, key_chunk, q, k, v, query, keys):
  return _forward(mask, query_chunk, key_chunk, q, k, v, query, keys)[0]


def _forward(mask, query_chunk, key_chunk, q, k, v, query, keys):
  T = q.shape[1]
  # Tied to q: a mask that depends on nothing that is trained would be made once, before the
  # scan over layers, and kept whole for all blocks and heads.
  q, query, keys = lax.optimization_barrier((q, query, keys))
  grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])  # B T K group H
  key_blocks = cut((k, v, keys), key_chunk)

  def block(args):
    q, query = args

    def step(state, block):
      k, v, keys = block
      values = lambda weights: product("bkgtc,bckh->bkgth", weights.astype(v.dtype), v)
      return absorb(state, _logits(mask, q, k, query, keys), values), None

    # Made of q, so that on a mesh it varies over devices as q does.
    empty = jnp.moveaxis(q, 1, 3).astype(jnp.float32) * 0
    state = empty[..., 0] + MAX_INIT, empty[..., 0], empty
    (highest, total, out), _ = lax.scan(step, state, key_blocks)
    seen = jnp.where(total > 0, total, 1.0)
    out = jnp.moveaxis(out / seen[..., None], 3, 1).astype(q.dtype)
    return out, jnp.moveaxis(highest + jnp.log(seen), 3, 1)

  out, lse = join(lax.map(block, cut((grouped, query), query_chunk)), T)
  return out.reshape(q.shape), (q, k, v, query, keys, out.reshape(q.shape), lse)


def _backward(mask, query_chunk, key_chunk, residuals, d_out):
  q, k, v, query, keys, out, lse = lax.optimization_barrier(residuals)
  (T, S), scale = (q.shape[1], k.shape[1]), q.shape[-1] ** -0.5
  grouped = lambda x: x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[-1])
  # Sum over keys of weight times its gradient, without the weights.
  inner = jnp.sum(grouped(d_out).astype(jnp.float32) * grouped(out), -1)
  key_blocks = cut((k, v, keys), key_chunk)

  def block(gradients, args):
    q, d_out, query, lse, inner = args
    lse, inner = jnp.moveaxis(lse, 1, 3), jnp.moveaxis(inner, 1, 3)

    def step(d_q, block):
      k, v, keys = block
      weights = jnp.exp(_logits(mask, q, k, query, keys) - lse[..., None])
      d_weights = product("btkgh,bckh->bkgtc", d_out, v)
      d_logits = (weights * (d_weights - inner[..., None]) * scale).astype(q.dtype)
      d_k = product("bkgtc,btkgh->bckh", d_logits, q)
      d_v = product("bkgtc,btkgh->bckh", weights.astype(q.dtype), d_out)
      return d_q + product("bkgtc,bckh->btkgh", d_logits, k), (d_k, d_v)

    d_q, new = lax.scan(step, q.astype(jnp.float32) * 0, key_blocks)
    return jax.tree.map(jnp.add, gradients, new), d_q.astype(q.dtype)

  zeros = jax.tree.map(lambda x: x.astype(jnp.float32) * 0, key_blocks[:2])
  blocks = cut((grouped(q), grouped(d_out), query, lse, inner), query_chunk)
  d_kv, d_q = lax.scan(block, zeros, blocks)
  d_k, d_v = (join(d, S).astype(x.dtype) for d, x in zip(d_kv, (k, v)))
  return join(d_q, T).reshape(q.shape), d_k, d_v, None, None


_attend.defvjp(_forward, _backward)


def _logits(mask, q, k, query, keys):
  logits = product("btkgh,bckh->bkgtc", q, k) * q.shape[-1] ** -0.5
  return jnp.where(mask(query, keys)[:, None, None], logits, MASKED)


def absorb(state, logits, values):
  """One step of the online softmax: takes the scores of further keys into the state.

  Args:
    state: (highest logit, sum of exponentials, weighted sum of values): float32 [...], [...],
      [..., H]; before the first step MAX_INIT, 0 and 0.
    logits: float32 [..., keys], MASKED where the query must not look.
    values: function of float32 weights [..., keys] -> their weighted sum of values [..., H].
  """
  highest, total, out = state
  new = jnp.maximum(highest, jnp.max(logits, -1))
  weights, decay = jnp.exp(logits - new[..., None]), jnp.exp(highest - new)
  return new, total * decay + jnp.sum(weights, -1), out * decay[..., None] + values(weights)


def product(equation, a, b):
  """An einsum whose sums are float32."""
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def equal_size(length: int, most: int) -> int:
  """The size of blocks of at most `most` that pads a length least."""
  return -(-length // -(-length // most))


def pad_to_multiple(x, size: int, axis: int):
  """Pads an axis at its end to a multiple of `size`.

  Integers, which is what the mask looks at, are padded with -1, which sees nothing and is
  seen by nothing.
  """
  widths = [(0, -x.shape[axis] % size if i == axis else 0) for i in range(x.ndim)]
  return jnp.pad(x, widths, constant_values=-1 if jnp.issubdtype(x.dtype, jnp.integer) else 0)


def cut(tree, most: int, axis: int = 1):
  """[..., T, ...] with T at `axis` -> [n, ..., size, ...]: equal blocks, the last one padded."""
  def one(x):
    size = equal_size(x.shape[axis], most)
    x = pad_to_multiple(x, size, axis)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1:]), axis, 0)

  return jax.tree.map(one, tree)


def join(tree, length: int):
  """The inverse of `cut` along axis 1."""
  one = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]
  return jax.tree.map(one, tree)
