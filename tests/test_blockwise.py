"""Blockwise attention equals dense attention, forward and backward, in linear memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error

from irg_jax import sharding
from irg_jax.model import attention
from irg_jax.model.kernels.blockwise import blockwise
from irg_jax.tokens import CAUSAL, PADDING, Tokens, allowed

B, T, N, K, H = 4, 72, 4, 2, 16


def inputs():
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
  # Samples, padding among them, and splits of all kinds, in the order of the row.
  ordered = lambda low, high: jnp.asarray(np.sort(rng.integers(low, high, (B, T)), 1), jnp.int32)
  split = ordered(0, 6)
  tokens = Tokens(
      sample=ordered(PADDING, 3), split=split, kind=split % 3,
      index=jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T)))
  return (normal(B, T, N, H), normal(B, K, T, H), normal(B, K, T, H)), tokens, normal(B, T, N, H)


def value_and_gradients(attend):
  qkv, tokens, weight = inputs()
  loss = lambda q, k, v: jnp.sum(weight * attend(q, k, v, tokens))
  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*qkv)


def in_blocks(q, k, v, tokens, queries=20, keys=16):
  return blockwise(allowed, queries, keys, q, k, v, tokens, tokens)


def dense(q, k, v, tokens):
  sources = [attention.KeyValues(k, v, tokens)]
  return attention.attend(q, tokens, sources, implementation="dense")


@functools.cache
def of_dense():
  return value_and_gradients(dense)


@pytest.mark.parametrize("mesh", [
    None, {"fsdp": 2, "sequence": 2, "tensor": 2}, {"fsdp": 2, "tensor": 4}],
    ids=str)
def test_blocks_give_the_result_and_the_gradients_of_dense_attention(mesh):
  want = of_dense()
  if mesh is None:
    got = value_and_gradients(in_blocks)
  else:
    with jax.set_mesh(sharding.make_mesh(mesh)):
      got = value_and_gradients(in_blocks)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, want)


def test_one_block_gives_the_result_and_the_gradients_of_dense_attention():
  got = value_and_gradients(functools.partial(in_blocks, queries=T, keys=T))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, of_dense())


def test_gradients_of_bfloat16_are_those_of_float32_but_for_rounding():
  qkv, tokens, weight = inputs()
  short = [x.astype(jnp.bfloat16) for x in qkv]
  loss = lambda q, k, v: jnp.sum(weight * in_blocks(q, k, v, tokens).astype(jnp.float32))
  got = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*short)
  want = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*[x.astype(jnp.float32) for x in short])
  for name, a, b in zip("qkv", got, want):
    assert a.dtype == jnp.bfloat16
    assert relative_error(a, b) < 0.01, name


def test_blocks_of_another_sample_are_never_read():
  """Forward and backward: NaN keys of another sample change nothing."""
  tokens = Tokens(
      sample=jnp.repeat(jnp.arange(2), 32)[None], index=jnp.tile(jnp.arange(32), 2)[None],
      split=jnp.zeros((1, 64), jnp.int32), kind=jnp.full((1, 64), CAUSAL))
  q, k, v = (x[:1, ..., :64, :] if x.shape[1] == K else x[:1, :64] for x in inputs()[0])
  second = jnp.arange(64) >= 32

  @jax.jit
  def of_second(q, k, v):
    loss = lambda q, k, v: jnp.sum(jnp.where(
        second[:, None, None], jnp.sin(in_blocks(q, k, v, tokens, queries=16)), 0.0))
    value, (d_q, d_k, d_v) = jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)
    return value, d_q[:, 32:], d_k[:, :, 32:], d_v[:, :, 32:]

  hidden = [jnp.where(second[:, None], x, jnp.nan) for x in (k, v)]
  jax.tree.map(np.testing.assert_array_equal, of_second(q, *hidden), of_second(q, k, v))


def test_no_array_of_all_scores_exists_in_training():
  length, layers = 1024, 2
  tokens = Tokens(*(jnp.zeros((1, length), jnp.int32) for _ in range(4)))
  w = jnp.ones((layers, 8, 8))

  def loss(w, x, tokens):
    def layer(x, w):
      h = (x @ w)[:, :, None]
      kv = h.swapaxes(1, 2)
      return x + blockwise(allowed, 64, 64, h, kv, kv, tokens, tokens)[:, :, 0], None
    return jnp.sum(jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, w)[0])

  compiled = jax.jit(jax.grad(loss)).lower(w, jnp.ones((1, length, 8)), tokens).compile()
  # Not even the mask, at a byte a pair: it depends on no layer, and must not be kept for all.
  assert compiled.memory_analysis().temp_size_in_bytes < length**2
