"""Flash attention for TPUs (Pallas): online softmax over visible blocks, with its backward pass.

The forward pass, d_q, and d_k with d_v are three kernels. Each walks a list of pairs of blocks
(`visible.Blocks`) that scalar prefetch hands to it, so a hidden pair costs not even a grid step.
Within a pair, the mask comes from the tokens' words (`visible`). A block of queries holds all heads
and all guidance views that share its keys, so keys are read once for all of them. A view that sees
nothing of a pair skips it; one that sees all of it skips the mask.

Arrays are q [B, W, K, J, T, H] and k, v [B, K, S, H]; letters as in `tokens`. Products take the
dtype of q; sums are float32. On other platforms than a TPU the kernels are interpreted.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from irg_jax.model.kernels.blockwise import MASKED, MAX_INIT, key_size
from irg_jax.model.kernels.visible import FIRST, LAST, SEEN, WHOLE, sees
from irg_jax.sharding import platform

_LANES = 128
_VMEM = 48 * 2**20  # bytes of on-chip memory that a kernel may use
_PRODUCT = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)


def head_size(head_dim: int) -> int:
  """H as the kernels take it: whole lanes."""
  return -(-head_dim // _LANES) * _LANES


def block_sizes(queries: int, keys: int, stacked: int) -> tuple[int, int]:
  """Sizes of blocks of queries and of keys; a block holds `stacked` heads and views of a query."""
  whole = lambda length: -(-length // _LANES) * _LANES
  # Lanes of a block at most: queries of all heads and views, and keys. A row of one image, all of
  # it visible, takes the larger ones: fewer steps and less padding.
  rows, most = (21, 11) if keys <= 44 * _LANES else (16, 8)
  rows = max(1, min(8, rows // stacked))
  return key_size(whole(queries), rows * _LANES), key_size(whole(keys), most * _LANES)


def forward(q_BWKJTH, k_BKSH, v_BKSH, prepared):
  """Output in q's dtype and log-sum-exp, see `fused.attention`; H is a multiple of 128."""
  rows = jax.ShapeDtypeStruct(q_BWKJTH.shape[:-1], jnp.float32)
  return _call(
      _forward_kernel, prepared, prepared.by_query, q_BWKJTH, k_BKSH,
      [("q_columns", prepared.query_words), ("k_lanes", prepared.key_words), ("q", q_BWKJTH),
       ("kv", k_BKSH), ("kv", v_BKSH)],
      [("q", q_BWKJTH), ("rows", rows)], _states(q_BWKJTH, prepared))


def backward(q_BWKJTH, k_BKSH, v_BKSH, prepared, d_out, lse, inner):
  """Gradients of q, k and v, see `fused.attention`; `inner` is the sum over H of d_out * out."""
  inputs = [("q", q_BWKJTH), ("kv", k_BKSH), ("kv", v_BKSH), ("q", d_out), ("rows", lse),
            ("rows", inner)]
  d_q, = _call(
      _d_q_kernel, prepared, prepared.by_query, q_BWKJTH, k_BKSH,
      [("q_columns", prepared.query_words), ("k_lanes", prepared.key_words), *inputs],
      [("q", q_BWKJTH)], _states(q_BWKJTH, prepared))
  d_k, d_v = _call(
      _d_kv_kernel, prepared, prepared.by_key, q_BWKJTH, k_BKSH,
      [("q_lanes", prepared.query_words), ("k_columns", prepared.key_words), *inputs],
      [("kv", k_BKSH), ("kv", v_BKSH)],
      [pltpu.VMEM((prepared.key_size, q_BWKJTH.shape[-1]), jnp.float32)] * 2)
  return d_q, d_k, d_v


def _states(q_BWKJTH, prepared):
  """On-chip memory of a block of queries: two numbers of each, along lanes, and a vector."""
  _, W, _, J, _, H = q_BWKJTH.shape
  return [pltpu.VMEM((W * J, prepared.query_size, width), jnp.float32)
          for width in (_LANES, _LANES, H)]


def _call(kernel, prepared, blocks, q_BWKJTH, k_BKSH, inputs, outputs, scratch):
  """Runs a kernel over a list of pairs of blocks, for each key-value head.

  `inputs` and `outputs` are pairs (kind, array or shape); the kind says how blocks are cut:
  "q" and "rows" by queries, "kv" by keys; words of queries or keys along "lanes" or "columns".
  """
  _, W, K, J, T, H = q_BWKJTH.shape
  t, s, S = prepared.query_size, prepared.key_size, k_BKSH.shape[2]

  def spec(kind):
    shape, index = {
        "q": ((None, W, None, J, t, H), lambda b, k, q, s: (b, 0, k, 0, q, 0)),
        "rows": ((None, W, None, J, t), lambda b, k, q, s: (b, 0, k, 0, q)),
        "kv": ((None, None, s, H), lambda b, k, q, s: (b, k, s, 0)),
        "q_lanes": ((None, W, 3, t), lambda b, k, q, s: (b, 0, 0, q)),
        "q_columns": ((None, W, t, 3), lambda b, k, q, s: (b, 0, q, 0)),
        "k_lanes": ((None, W, 2, s), lambda b, k, q, s: (b, 0, 0, s)),
        "k_columns": ((None, W, s, 2), lambda b, k, q, s: (b, 0, s, 0))}[kind]

    def place(head, step, outer, inner, _):
      if blocks is prepared.by_query:
        return index(outer[step] // (T // t), head, outer[step] % (T // t), inner[step])
      return index(outer[step] // (S // s), head, inner[step], outer[step] % (S // s))

    return pl.BlockSpec(shape, place)

  turned = lambda kind, x: jnp.swapaxes(x, -1, -2) if kind.endswith("columns") else x
  return pl.pallas_call(
      functools.partial(kernel, scale=prepared.head_dim ** -0.5),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=3, grid=(K, blocks.start[-1]),
          in_specs=[spec(kind) for kind, _ in inputs],
          out_specs=[spec(kind) for kind, _ in outputs], scratch_shapes=scratch),
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for _, x in outputs],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM),
      interpret=platform() != "tpu", name=kernel.__name__.strip("_"),
  )(blocks.outer, blocks.inner, blocks.flags, *(turned(kind, x) for kind, x in inputs))


def _forward_kernel(outer, inner, flags, q_words, k_words, q, k, v, out, lse, highest, total,
                    weighted, *, scale):
  flag = flags[pl.program_id(1)]

  @pl.when(flag & FIRST != 0)
  def _():
    highest[...] = jnp.full_like(highest, MAX_INIT)
    total[...] = jnp.zeros_like(total)
    weighted[...] = jnp.zeros_like(weighted)

  def step(n, q_TH, visible_TS):
    logits_TS = _masked(_times_transposed(q_TH, k[...]) * scale, visible_TS)
    new_TX = jnp.maximum(highest[n], jnp.max(logits_TS, -1, keepdims=True))
    weights_TS = jnp.exp(logits_TS - new_TX[:, :1])
    decay_TX = jnp.exp(highest[n] - new_TX)
    highest[n] = new_TX
    total[n] = total[n] * decay_TX + jnp.sum(weights_TS, -1, keepdims=True)
    weighted[n] = weighted[n] * decay_TX[:, :1] + _times(weights_TS.astype(v.dtype), v[...])

  _for_each_head(flag, step, q, lambda w: _visible(q_words, k_words, w))

  @pl.when(flag & LAST != 0)
  def _():
    for n, (w, j) in enumerate(_heads(q)):
      seen_TX = jnp.where(total[n] > 0, total[n], 1.0)
      out[w, j] = (weighted[n] / seen_TX[:, :1]).astype(out.dtype)
      lse[w, j:j + 1] = (highest[n] + jnp.log(seen_TX)).T[:1]


def _d_q_kernel(outer, inner, flags, q_words, k_words, q, k, v, d_out, lse, product, d_q,
                lse_columns, product_columns, total, *, scale):
  flag = flags[pl.program_id(1)]

  @pl.when(flag & FIRST != 0)
  def _():
    total[...] = jnp.zeros_like(total)
    for n, (w, j) in enumerate(_heads(q)):
      for rows, columns in ((lse, lse_columns), (product, product_columns)):
        columns[n] = jnp.broadcast_to(rows[w, j:j + 1], (_LANES, rows.shape[-1])).T

  def step(n, q_TH, visible_TS):
    logits_TS = _masked(_times_transposed(q_TH, k[...]) * scale, visible_TS)
    weights_TS = jnp.exp(logits_TS - lse_columns[n][:, :1])
    d_weights_TS = _times_transposed(d_out[divmod(n, q.shape[1])], v[...])
    d_logits_TS = weights_TS * (d_weights_TS - product_columns[n][:, :1])
    total[n] += _times(d_logits_TS.astype(k.dtype), k[...])

  _for_each_head(flag, step, q, lambda w: _visible(q_words, k_words, w))

  @pl.when(flag & LAST != 0)
  def _():
    for n, (w, j) in enumerate(_heads(q)):
      d_q[w, j] = (total[n] * scale).astype(d_q.dtype)


def _d_kv_kernel(outer, inner, flags, q_words, k_words, q, k, v, d_out, lse, product, d_k, d_v,
                 total_k, total_v, *, scale):
  """Scores are transposed, [S, T]: what belongs to a query lies along the lanes."""
  flag = flags[pl.program_id(1)]

  @pl.when(flag & FIRST != 0)
  def _():
    total_k[...] = jnp.zeros_like(total_k)
    total_v[...] = jnp.zeros_like(total_v)

  def step(n, q_TH, visible_ST):
    w, j = divmod(n, q.shape[1])
    logits_ST = _masked(_times_transposed(k[...], q_TH) * scale, visible_ST)
    weights_ST = jnp.exp(logits_ST - lse[w, j:j + 1])
    total_v[...] += _times(weights_ST.astype(q.dtype), d_out[w, j])
    d_weights_ST = _times_transposed(v[...], d_out[w, j])
    d_logits_ST = weights_ST * (d_weights_ST - product[w, j:j + 1])
    total_k[...] += _times(d_logits_ST.astype(q.dtype), q_TH)

  _for_each_head(flag, step, q, lambda w: _visible_transposed(q_words, k_words, w))

  @pl.when(flag & LAST != 0)
  def _():
    d_k[...] = (total_k[...] * scale).astype(d_k.dtype)
    d_v[...] = total_v[...].astype(d_v.dtype)


def _for_each_head(flag, step, q, mask):
  """`step(number, its queries, visible)` for each head of the views that see something.

  No mask for a view that sees the whole block.
  """
  W, J = q.shape[:2]
  for w in range(W):
    bits = flag >> 2 * w
    heads = functools.partial(_for_heads, step, q, w, J)
    pl.when(bits & WHOLE != 0)(functools.partial(heads, lambda w: None))
    pl.when(bits & (SEEN | WHOLE) == SEEN)(functools.partial(heads, mask))


def _for_heads(step, q, w, J, mask):
  visible = mask(w)
  for j in range(J):
    step(w * J + j, q[w, j], visible)


def _heads(q):
  return [(w, j) for w in range(q.shape[0]) for j in range(q.shape[1])]


def _visible(q_words, k_words, w):
  """The mask [T, S] of a view, by words of queries in columns and of keys along the lanes."""
  return sees(*(q_words[w, :, i:i + 1] for i in range(3)), *(k_words[w, i:i + 1] for i in range(2)))


def _visible_transposed(q_words, k_words, w):
  """The mask [S, T] of a view, by words of queries along the lanes and of keys in columns."""
  return sees(*(q_words[w, i:i + 1] for i in range(3)), *(k_words[w, :, i:i + 1] for i in range(2)))


def _masked(logits, visible):
  return logits if visible is None else jnp.where(visible, logits, MASKED)


def _times(a_TS, b_SH):
  return _PRODUCT(a_TS, b_SH, (((1,), (0,)), ((), ())), precision=_precision(a_TS))


def _times_transposed(a_TH, b_SH):
  return _PRODUCT(a_TH, b_SH, (((1,), (1,)), ((), ())), precision=_precision(a_TH))


def _precision(x):
  return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
