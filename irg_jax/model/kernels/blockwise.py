"""Attention in blocks, with linear memory and its own backward pass.

A block of queries runs over the blocks of keys in which any of its queries sees a key (online
softmax). Memory is linear in the length, and a block that is hidden from all queries costs only
its mask. Autodiff would keep the scores of every block. Instead, the forward pass keeps its
output and each query's log-sum-exp, and the backward pass recomputes the scores
("FlashAttention", arXiv 2205.14135).

Queries are grouped by key-value head, [B, K, J, T, H]: with k and v [B, K, S, H], scores are
plain matrix products. Letters as in `tokens`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from irg_jax.sharding import attention_specs, partition_spec

# Output and log-sum-exp of every form by name: what rematerialisation keeps ("attention").
ATTENTION_OUTPUTS = ("attention_out", "attention_lse")
MASKED = -1e30
MAX_INIT = -1e29  # above MASKED, so that exp(MASKED - max) is 0 even if a query sees nothing


def blockwise(mask, query_chunk: int, key_chunk: int, q_BTNH, k_BKSH, v_BKSH, query, keys):
  """Softmax attention, one row of keys for each row of queries; differentiable in q, k and v.

  On a mesh, each device attends with its own queries: q stays split along `length`. Keys and
  values, few with grouped-query heads, are gathered, and their gradients are summed once.

  Args:
    mask: function (query, keys) -> bool [B, T, S].
    query_chunk, key_chunk: largest block sizes on a device.
    query, keys: the arguments of `mask`, pytrees of [B, T] and [B, S].

  Returns:
    [B, T, N, H] in q's dtype; zeros for queries that see nothing.
  """
  attend = functools.partial(_attend, mask, query_chunk, key_chunk)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size <= 1:
    return attend(q_BTNH, k_BKSH, v_BKSH, query, keys)
  spec = lambda x, *axes: partition_spec(x.shape, axes, mesh)
  q, kv = attention_specs(q_BTNH, k_BKSH, mesh)
  length_axes = q[1] or ()  # mesh axes that split queries but not keys

  def local(q, k, v, query, keys):
    # k and v are replicated over `length_axes`: the transpose of this cast sums their gradients.
    if length_axes:
      k, v = (lax.pcast(x, length_axes, to="varying") for x in (k, v))
    return attend(q, k, v, query, keys)

  specs = (q, kv, kv, jax.tree.map(lambda x: spec(x, "batch", "length"), query),
           jax.tree.map(lambda x: spec(x, "batch", None), keys))
  return jax.shard_map(local, in_specs=specs, out_specs=q)(q_BTNH, k_BKSH, v_BKSH, query, keys)


def softmax_state(mask, key_chunk: int, q_BKJTH, k_BKSH, v_BKSH, query, keys):
  """Online softmax over one set of keys, to be merged with that over other keys.

  Args:
    mask, key_chunk, query, keys: see `blockwise`.

  Returns:
    (highest logit, sum of exponentials, weighted sum of values): float32 [B, K, J, T],
    [B, K, J, T] and [B, K, J, T, H].
  """
  def step(k_BKSH, v_BKSH, visible_BTS, _, state):
    highest_BKJT, total_BKJT, out_BKJTH = state
    logits_BKJTS = _logits(q_BKJTH, k_BKSH, visible_BTS)
    new_BKJT = jnp.maximum(highest_BKJT, jnp.max(logits_BKJTS, -1))
    weights_BKJTS = jnp.exp(logits_BKJTS - new_BKJT[..., None])
    decay_BKJT = jnp.exp(highest_BKJT - new_BKJT)
    values_BKJTH = product("bkjts,bksh->bkjth", weights_BKJTS.astype(v_BKSH.dtype), v_BKSH)
    return (new_BKJT, total_BKJT * decay_BKJT + jnp.sum(weights_BKJTS, -1),
            out_BKJTH * decay_BKJT[..., None] + values_BKJTH)

  # Made from q, so that on a mesh it varies over the same devices as q.
  zeros_BKJTH = q_BKJTH.astype(jnp.float32) * 0
  state = zeros_BKJTH[..., 0] + MAX_INIT, zeros_BKJTH[..., 0], zeros_BKJTH
  return _over_visible_blocks(mask(query, keys), k_BKSH, v_BKSH, key_chunk, step, state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(mask, query_chunk, key_chunk, q_BTNH, k_BKSH, v_BKSH, query, keys):
  return _forward(mask, query_chunk, key_chunk, q_BTNH, k_BKSH, v_BKSH, query, keys)[0]


def _forward(mask, query_chunk, key_chunk, q_BTNH, k_BKSH, v_BKSH, query, keys):
  # The barrier ties the metadata to q. Otherwise XLA computes the mask, which depends on no
  # layer, before the scan over layers and keeps it for all blocks.
  q_BTNH, query, keys = lax.optimization_barrier((q_BTNH, query, keys))

  def block(args):
    q_BTNH, query = args
    q_BKJTH = grouped(q_BTNH, k_BKSH.shape[1])
    highest_BKJT, total_BKJT, out_BKJTH = softmax_state(
        mask, key_chunk, q_BKJTH, k_BKSH, v_BKSH, query, keys)
    seen_BKJT = jnp.where(total_BKJT > 0, total_BKJT, 1.0)
    out_BTNH = ungrouped((out_BKJTH / seen_BKJT[..., None]).astype(q_BTNH.dtype))
    return out_BTNH, highest_BKJT + jnp.log(seen_BKJT)

  out_ZBTNH, lse_ZBKJT = lax.map(block, cut((q_BTNH, query), query_chunk))
  out_BTNH, lse_ZBKJT = named(join(out_ZBTNH, q_BTNH.shape[1]), lse_ZBKJT)
  return out_BTNH, (q_BTNH, k_BKSH, v_BKSH, query, keys, out_BTNH, lse_ZBKJT)


def named(*outputs):
  """Output and log-sum-exp under the names of `ATTENTION_OUTPUTS`."""
  return tuple(map(checkpoint_name, outputs, ATTENTION_OUTPUTS))


def _backward(mask, query_chunk, key_chunk, residuals, d_out_BTNH):
  q_BTNH, k_BKSH, v_BKSH, query, keys, out_BTNH, lse_ZBKJT = lax.optimization_barrier(residuals)
  _, K, _, H = k_BKSH.shape
  scale = H ** -0.5
  transposed = lambda x: rearrange(x, "b k s h -> b k h s")

  def block(d_kv, args):
    *blocks, query, lse_BKJT = args
    q_BKJTH, out_BKJTH, d_out_BKJTH = (grouped(x_BTNH, K) for x_BTNH in blocks)
    # Equals the sum over keys of weight * d_weight, without the weights.
    inner_BKJT = jnp.sum(d_out_BKJTH.astype(jnp.float32) * out_BKJTH, -1)
    # Transposed once for all blocks of keys: the products for d_k and d_v contract the queries.
    q_BKJHT, d_out_BKJHT = lax.optimization_barrier(tuple(
        rearrange(x, "b k j t h -> b k j h t") for x in (q_BKJTH, d_out_BKJTH)))

    def step(k_BKSH, v_BKSH, visible_BTS, start, state):
      d_q_BKJTH, d_k_BKHS, d_v_BKHS = state
      weights_BKJTS = jnp.exp(_logits(q_BKJTH, k_BKSH, visible_BTS) - lse_BKJT[..., None])
      d_weights_BKJTS = product("bkjth,bksh->bkjts", d_out_BKJTH, v_BKSH)
      d_logits_BKJTS = weights_BKJTS * (d_weights_BKJTS - inner_BKJT[..., None])
      weights_BKJTS, d_logits_BKJTS = (
          x.astype(q_BKJTH.dtype) for x in (weights_BKJTS, d_logits_BKJTS))
      d_q_BKJTH += product("bkjts,bksh->bkjth", d_logits_BKJTS, k_BKSH)
      d_k_BKHS = _add_at(start, d_k_BKHS, product("bkjht,bkjts->bkhs", q_BKJHT, d_logits_BKJTS))
      d_v_BKHS = _add_at(start, d_v_BKHS,
                         product("bkjht,bkjts->bkhs", d_out_BKJHT, weights_BKJTS))
      return d_q_BKJTH, d_k_BKHS, d_v_BKHS

    state = q_BKJTH.astype(jnp.float32) * 0, *d_kv
    d_q_BKJTH, *d_kv = _over_visible_blocks(mask(query, keys), k_BKSH, v_BKSH, key_chunk, step,
                                            state)
    return tuple(d_kv), ungrouped((d_q_BKJTH * scale).astype(q_BKJTH.dtype))

  zeros = tuple(transposed(x.astype(jnp.float32)) * 0 for x in (k_BKSH, v_BKSH))
  queries = cut((q_BTNH, out_BTNH, d_out_BTNH, query), query_chunk)
  (d_k_BKHS, d_v_BKHS), d_q_ZBTNH = lax.scan(block, zeros, (*queries, lse_ZBKJT))
  d_k_BKSH, d_v_BKSH = (rearrange(x, "b k h s -> b k s h") for x in (d_k_BKHS * scale, d_v_BKHS))
  return (join(d_q_ZBTNH, q_BTNH.shape[1]), d_k_BKSH.astype(k_BKSH.dtype),
          d_v_BKSH.astype(v_BKSH.dtype), None, None)


_attend.defvjp(_forward, _backward)


def _over_visible_blocks(visible_BTS, k_BKSH, v_BKSH, key_chunk, step, state):
  """`state = step(k, v, visible, start, state)` over the blocks of keys that any row sees.

  The mask is made before the loop. Inside, XLA would fuse it into the loops over scores and
  recompute it for every head.
  """
  visible_BTZS = mask_in_blocks(visible_BTS, key_chunk)
  S, size = k_BKSH.shape[2], visible_BTZS.shape[-1]
  some_Z = jnp.any(visible_BTZS, (0, 1, 3))
  order_Z, count = jnp.argsort(~some_Z, stable=True), jnp.sum(some_Z)

  def body(carry):
    i, state = carry
    start = jnp.minimum(order_Z[i] * size, S - size)
    part = lambda x_BKSH: lax.dynamic_slice_in_dim(x_BKSH, start, size, 2)
    seen_BTS = lax.dynamic_index_in_dim(visible_BTZS, order_Z[i], 2, keepdims=False)
    return i + 1, step(part(k_BKSH), part(v_BKSH), seen_BTS, start, state)

  # The static bound changes nothing: `plan` reads it as the most turns that the loop can take.
  more = lambda carry: (carry[0] < len(some_Z)) & (carry[0] < count)
  return lax.while_loop(more, body, (count * 0, state))[1]


def mask_in_blocks(visible_BTS, most: int):
  """Cuts a mask along its keys: [B, T, S] -> [B, T, Z, `key_size(S, most)`].

  The last block ends where the keys end, so it may overlap the block before it; the overlap is
  masked in the last block. Padding instead would copy all keys.
  """
  B, T, S = visible_BTS.shape
  size = key_size(S, most)
  whole = -(-S // size) * size - size  # keys of all blocks but the last
  hidden_BTS = jnp.zeros((B, T, whole + size - S), bool)
  parts = visible_BTS[..., :whole], hidden_BTS, visible_BTS[..., whole:]
  return rearrange(jnp.concatenate(parts, -1), "b t (z s) -> b t z s", s=size)


def _logits(q_BKJTH, k_BKSH, visible_BTS):
  """Scaled scores, float32 [B, K, J, T, S]; MASKED where the query must not see the key."""
  scores_BKJTS = product("bkjth,bksh->bkjts", q_BKJTH, k_BKSH) * q_BKJTH.shape[-1] ** -0.5
  return jnp.where(visible_BTS[:, None, None], scores_BKJTS, MASKED)


def _add_at(start, total, new):
  """`total` with `new` added from `start` on along the last axis."""
  new += lax.dynamic_slice_in_dim(total, start, new.shape[-1], -1)
  return lax.dynamic_update_slice_in_dim(total, new, start, -1)


def grouped(q_RTNH, K: int):
  """Groups query heads by the key-value head that they share: [R, K, J, T, H]."""
  return rearrange(q_RTNH, "r t (k j) h -> r k j t h", k=K)


def ungrouped(x_RKJTH):
  """The inverse of `grouped`: [R, T, N, H]."""
  return rearrange(x_RKJTH, "r k j t h -> r t (k j) h")


def product(equation, a, b):
  """An einsum that accumulates in float32."""
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def key_size(length: int, most: int) -> int:
  """The size, at most `most`, of blocks of keys that overlap least, in whole TPU lanes (128)."""
  if length <= most:
    return length
  return min(range(most, most // 2, -math.gcd(most, 128)), key=lambda size: -length % size)


def cut(tree, most: int):
  """Cuts rows [B, T, ...] into equal blocks [Z, B, T / Z, ...] that pad the last one least.

  Floats are padded with 0, integers (the mask's metadata) with -1, `tokens.PADDING`.
  """
  def one(x):
    T = x.shape[1]
    size = -(-T // -(-T // most))
    widths = [(0, -T % size if axis == 1 else 0) for axis in range(x.ndim)]
    fill = -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0
    return rearrange(jnp.pad(x, widths, constant_values=fill), "b (z t) ... -> z b t ...", t=size)

  return jax.tree.map(one, tree)


def join(tree, length: int):
  """The inverse of `cut`, for rows of `length` tokens."""
  return jax.tree.map(lambda x: rearrange(x, "z b t ... -> b (z t) ...")[:, :length], tree)
