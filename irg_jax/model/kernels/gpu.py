"""Flash attention for NVIDIA GPUs (Pallas through Triton: Ampere and later), both passes.

As in `tpu`, the forward pass, d_q, and d_k with d_v are kernels of their own. Each program takes
one block of queries of one head, or a part of it (for d_k and d_v: one block of keys), and loops
over the blocks that it may see (`visible.Blocks`). The mask comes from the tokens' words. Blocks
that are visible as a whole skip it.

Arrays are q [B, W, K, J, T, H] and k, v [B, K, S, H]; letters as in `tokens`. Products take the
dtype of q; sums are float32. Triton counts elements with 32 bits, so that q on one device has fewer
than 2^31. On other platforms than a GPU the kernels are interpreted.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from irg_jax.model.kernels.blockwise import MASKED, MAX_INIT
from irg_jax.model.kernels.visible import WHOLE, sees
from irg_jax.sharding import platform


def head_size(head_dim: int) -> int:
  """H as the kernels take it: a power of 2."""
  return max(16, pl.next_power_of_2(head_dim))


def block_sizes(queries: int, keys: int, stacked: int) -> tuple[int, int]:
  """Sizes of blocks of queries and of keys."""
  del stacked  # each program has one head
  size = lambda length, most: min(most, max(16, pl.next_power_of_2(length)))
  return size(queries, 128), size(keys, 64)


def _tuning(kernel, dtype) -> tuple[int, int]:
  """Queries that a program takes at once, and its warps.

  With these, no kernel in bfloat16 spills registers, as compiled for H100 and A100 with H = 128,
  and those in float32, whose products take no tensor cores, fit into shared memory.
  """
  if dtype == jnp.float32:
    return 32, 8
  return {_forward_kernel: (128, 8), _d_q_kernel: (64, 4), _d_kv_kernel: (64, 8)}[kernel]


def forward(q_BWKJTH, k_BKSH, v_BKSH, prepared):
  """See `tpu.forward`; H is as `head_size` gives it."""
  rows = jax.ShapeDtypeStruct(q_BWKJTH.shape[:-1], jnp.float32)
  return _call(_forward_kernel, prepared, prepared.by_query, q_BWKJTH, k_BKSH,
               [("q", q_BWKJTH), ("kv", k_BKSH), ("kv", v_BKSH)],
               [("q", q_BWKJTH), ("rows", rows)])


def backward(q_BWKJTH, k_BKSH, v_BKSH, prepared, d_out, lse, inner):
  """See `tpu.backward`."""
  inputs = [("q", q_BWKJTH), ("kv", k_BKSH), ("kv", v_BKSH), ("q", d_out), ("rows", lse),
            ("rows", inner)]
  d_q, = _call(_d_q_kernel, prepared, prepared.by_query, q_BWKJTH, k_BKSH, inputs,
               [("q", q_BWKJTH)])
  d_k, d_v = _call(_d_kv_kernel, prepared, prepared.by_key, q_BWKJTH, k_BKSH, inputs,
                   [("kv", k_BKSH), ("kv", v_BKSH)])
  return d_q, d_k, d_v


def _call(kernel, prepared, blocks, q_BWKJTH, k_BKSH, inputs, outputs):
  """Runs a kernel for each part of a block of queries and head, or block of keys and kv head.

  `inputs` and `outputs` are pairs (kind, array or shape); the kind says what a program sees: its
  own block, or all of the head where it loops.
  """
  B, W, K, J, T, H = q_BWKJTH.shape
  t, s, S = prepared.query_size, prepared.key_size, k_BKSH.shape[2]
  most, warps = _tuning(kernel, q_BWKJTH.dtype)
  part = min(most, t)
  if blocks is prepared.by_query:
    grid = T // part, W * K * J, B
    view = lambda n: (n // (K * J), n // J % K, n % J)
    specs = {
        "q": pl.BlockSpec((None, None, None, None, part, H), lambda i, n, b: (b, *view(n), i, 0)),
        "rows": pl.BlockSpec((None, None, None, None, part), lambda i, n, b: (b, *view(n), i)),
        "kv": pl.BlockSpec((None, None, S, H), lambda i, n, b: (b, view(n)[1], 0, 0)),
        "q_words": pl.BlockSpec((None, None, 3, part), lambda i, n, b: (b, view(n)[0], 0, i)),
        "k_words": pl.BlockSpec((None, None, 2, S), lambda i, n, b: (b, view(n)[0], 0, 0))}
  else:
    grid = S // s, K, B
    specs = {
        "q": pl.BlockSpec((None, W, None, J, T, H), lambda i, k, b: (b, 0, k, 0, 0, 0)),
        "rows": pl.BlockSpec((None, W, None, J, T), lambda i, k, b: (b, 0, k, 0, 0)),
        "kv": pl.BlockSpec((None, None, s, H), lambda i, k, b: (b, k, i, 0)),
        "q_words": pl.BlockSpec((None, W, 3, T), lambda i, k, b: (b, 0, 0, 0)),
        "k_words": pl.BlockSpec((None, W, 2, s), lambda i, k, b: (b, 0, 0, i))}
  lists = [blocks.start, blocks.inner, blocks.flags]
  inputs = [("q_words", prepared.query_words), ("k_words", prepared.key_words), *inputs]
  return pl.pallas_call(
      functools.partial(kernel, scale=prepared.head_dim ** -0.5, sizes=(t, s),
                        parts=t // part, heads=K * J), grid=grid,
      in_specs=[pl.BlockSpec(x.shape, lambda *_: (0,)) for x in lists]
      + [specs[kind] for kind, _ in inputs],
      out_specs=[specs[kind] for kind, _ in outputs],
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for _, x in outputs],
      compiler_params=triton.CompilerParams(num_warps=warps, num_stages=2),
      interpret=platform() != "gpu", name=kernel.__name__.strip("_"),
  )(*lists, *(x for _, x in inputs))


def _forward_kernel(start, inner, flags, q_words, k_words, q, k, v, out, lse, *, heads, scale,
                    sizes, parts):
  q_TH, (lo, reach, split) = q[...], (q_words[i] for i in range(3))
  view = lax.div(pl.program_id(1), heads)

  def step(i, state):
    highest_T, total_T, weighted_TH = state
    place = pl.ds(inner[i] * sizes[1], sizes[1])
    visible = lambda: sees(lo[:, None], reach[:, None], split[:, None],
                           k_words[0, place][None], k_words[1, place][None])
    logits_TS = _masked(_times(q_TH, k[place].T) * scale, flags[i], view, visible)
    new_T = jnp.maximum(highest_T, jnp.max(logits_TS, -1))
    weights_TS = jnp.exp(logits_TS - new_T[:, None])
    decay_T = jnp.exp(highest_T - new_T)
    return (new_T, total_T * decay_T + jnp.sum(weights_TS, -1),
            weighted_TH * decay_T[:, None] + _times(weights_TS.astype(v.dtype), v[place]))

  highest_T, total_T, weighted_TH = lax.fori_loop(*_span(start, parts), step, (
      jnp.full(q_TH.shape[:1], MAX_INIT), jnp.zeros(q_TH.shape[:1]), jnp.zeros(q_TH.shape)))
  seen_T = jnp.where(total_T > 0, total_T, 1.0)
  out[...] = (weighted_TH / seen_T[:, None]).astype(out.dtype)
  lse[...] = highest_T + jnp.log(seen_T)


def _d_q_kernel(start, inner, flags, q_words, k_words, q, k, v, d_out, lse, product, d_q, *, heads,
                scale, sizes, parts):
  q_TH, d_out_TH, (lo, reach, split) = q[...], d_out[...], (q_words[i] for i in range(3))
  lse_T1, product_T1 = lse[...][:, None], product[...][:, None]
  view = lax.div(pl.program_id(1), heads)

  def step(i, total_TH):
    place = pl.ds(inner[i] * sizes[1], sizes[1])
    visible = lambda: sees(lo[:, None], reach[:, None], split[:, None],
                           k_words[0, place][None], k_words[1, place][None])
    logits_TS = _masked(_times(q_TH, k[place].T) * scale, flags[i], view, visible)
    d_logits_TS = jnp.exp(logits_TS - lse_T1) * (_times(d_out_TH, v[place].T) - product_T1)
    return total_TH + _times(d_logits_TS.astype(k.dtype), k[place])

  total_TH = lax.fori_loop(*_span(start, parts), step, jnp.zeros(q_TH.shape))
  d_q[...] = (total_TH * scale).astype(d_q.dtype)


def _d_kv_kernel(start, inner, flags, q_words, k_words, q, k, v, d_out, lse, product, d_k, d_v, *,
                 heads, scale, sizes, parts):
  """Scores are transposed, [S, T]."""
  k_SH, v_SH = k[...], v[...]
  W, J = q.shape[:2]
  size = sizes[0] // parts

  def step(i, state):
    def part(n, state):
      total_k_SH, total_v_SH = state
      view, part = lax.div(n, parts), lax.rem(n, parts)
      w, j = lax.div(view, J), lax.rem(view, J)
      place = pl.ds(inner[i] * sizes[0] + part * size, size)
      visible = lambda: sees(*(q_words[w, word, place][None] for word in range(3)),
                             *(k_words[w, word, :][:, None] for word in range(2)))
      q_TH, d_out_TH = q[w, j, place], d_out[w, j, place]
      logits_ST = _masked(_times(k_SH, q_TH.T) * scale, flags[i], w, visible)
      weights_ST = jnp.exp(logits_ST - lse[w, j, place][None])
      d_logits_ST = weights_ST * (_times(v_SH, d_out_TH.T) - product[w, j, place][None])
      return (total_k_SH + _times(d_logits_ST.astype(q.dtype), q_TH),
              total_v_SH + _times(weights_ST.astype(q.dtype), d_out_TH))

    return lax.fori_loop(0, W * J * parts, part, state)

  total_k_SH, total_v_SH = lax.fori_loop(*_span(start, 1), step, (
      jnp.zeros(k_SH.shape), jnp.zeros(k_SH.shape)))
  d_k[...] = (total_k_SH * scale).astype(d_k.dtype)
  d_v[...] = total_v_SH.astype(d_v.dtype)


def _masked(logits, flag, view, visible):
  """The logits, MASKED where `visible()` says so unless the view sees the WHOLE block."""
  return lax.cond((flag >> 2 * view) & WHOLE > 0, lambda: logits,
                  lambda: jnp.where(visible(), logits, MASKED))


def _span(start, parts):
  """The entries of the list that belong to this program's block, of which it may be one part."""
  block = lax.div(pl.program_id(2) * pl.num_programs(0) + pl.program_id(0), parts)
  return start[block], start[block + 1]


def _times(a, b):
  return lax.dot_general(
      a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32,
      precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None)
