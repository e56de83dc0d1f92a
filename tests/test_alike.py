"""Attention of rows whose queries all see the same keys: the form of a lone CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error

from irg_jax import sharding
from irg_jax.config import LlmConfig, ModelConfig, SpecialTokens, VaeConfig, VitConfig
from irg_jax.generate import steps
from irg_jax.generate.context import FULL, NO_IMAGE, NO_TEXT, new_context, seen_before
from irg_jax.generate.settings import Guidance, Sampling
from irg_jax.model import attention
from irg_jax.model.attention import KeyValues, attend
from irg_jax.model.unified import UnifiedTransformer
from irg_jax.tokens import NOISE, Tokens
from irg_jax.weights.names import abstract_params

B, VIEWS, T, N, K, H = 2, 3, 21, 4, 2, 8
R = B * VIEWS


def case(slots, spans, dtype=np.float32):
  """Queries of noise tokens and the arguments of `attend`; view w sees the slots `spans[w]`."""
  rng = np.random.default_rng(slots)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
  zeros = np.zeros((R, T), np.int32)
  query = Tokens(zeros, zeros + rng.permutation(T).astype(np.int32), zeros, zeros + NOISE)
  visible = np.zeros((R, slots), bool)
  for view, parts in enumerate(spans):
    for start, stop in parts:
      visible[view::VIEWS, start:stop] = True
  own = KeyValues(normal(R, K, T, H), normal(R, K, T, H), query)
  cache = KeyValues(normal(B, K, slots, H), normal(B, K, slots, H), seen_before(visible))
  return 2 * normal(R, T, N, H), query, own, cache


@functools.partial(jax.jit, static_argnames=("dense", "blocks"))
def attended(q, query, own, *caches, dense=False, blocks=(None, None)):
  return attend(q, query, [own, *caches], implementation="dense" if dense else "chunked",
                query_chunk=blocks[0], key_chunk=blocks[1], same_keys=not dense)


# The default blocks; several of queries and of the rows' own keys; one key a block and less.
BLOCKS = (None, None), (8, 12), (T, 1), (T, 2)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("slots, spans", [
    (40, [[(0, 40)], [(0, 31)], [(0, 9), (31, 36)]]),  # as the views of a second round
    (40, [[(39, 40)], [(13, 14)], [(0, 1), (12, 13), (24, 25), (39, 40)]]),
    (40, [[], [(3, 27)], []]),  # views that see nothing of the cache beside one that does
    (5, [[(0, 5)], [(4, 5)], []])], ids=("round", "single", "empty", "short"))
def test_it_equals_the_dense_form(slots, spans, blocks):
  q, query, own, cache = case(slots, spans)
  want = attended(q, query, own, cache, dense=True)
  assert relative_error(attended(q, query, own, cache, blocks=blocks), want) < 1e-6


def test_several_caches_count_together():
  q, query, own, cache = case(40, [[(0, 40)], [(0, 31)], []])
  other = case(17, [[(2, 5)], [], [(0, 17)]])[3]
  want = attended(q, query, own, cache, other, dense=True)
  assert relative_error(attended(q, query, own, cache, other, blocks=(8, 12)), want) < 1e-6


@pytest.mark.parametrize("size", [np.nan, np.inf, 1e20])
def test_slots_that_are_hidden_may_hold_anything(size):
  q, query, own, cache = case(40, [[(0, 30)], [(0, 7)], [(20, 23)]])
  hidden = np.asarray(cache.tokens.sample).reshape(B, VIEWS, -1).max(1) < 0  # from all views
  fill = lambda x, value: jnp.where(hidden[:, None, :, None], value, x)
  filled = lambda value: KeyValues(fill(cache.k, value), fill(cache.v, value), cache.tokens)
  want = attended(q, query, own, filled(0))
  np.testing.assert_array_equal(attended(q, query, own, filled(size)), want)


def test_scores_may_be_far_apart():
  """The best visible key is far below zero, or far below a hidden one."""
  q, query, own, cache = case(40, [[(0, 30)], [(0, 7)], [(20, 23)]])
  direction = jnp.ones((1, 1, 1, H))
  q = jnp.abs(q) * 30
  own = KeyValues(own.k - 20 * direction, own.v, query)
  place = jnp.arange(40)[:, None]
  cache = KeyValues(cache.k + jnp.where(place < 30, -20, 20) * direction, cache.v, cache.tokens)
  want = attended(q, query, own, cache, dense=True)
  assert relative_error(attended(q, query, own, cache, blocks=(8, 12)), want) < 1e-3  # logits of 1e4


def test_bfloat16_is_within_its_rounding():
  args = case(40, [[(0, 40)], [(0, 31)], [(0, 9), (31, 36)]], jnp.bfloat16)
  exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, args)
  got = attended(*args)
  assert got.dtype == jnp.bfloat16
  assert relative_error(got.astype(jnp.float32), attended(*exact, dense=True)) < 1e-2


def program(same_keys, mesh=None):
  q, query, own, cache = case(40, [[(0, 40)], [(0, 31)], []])
  run = jax.jit(lambda *args: attend(*args, implementation="chunked", same_keys=same_keys))
  args = q, query, [own, cache]
  if mesh is None:
    return run.lower(*args).as_text()
  with jax.set_mesh(sharding.make_mesh(mesh)):
    return run.lower(*args).as_text()


def test_only_a_lone_cpu_takes_it():
  assert program(True) != program(False)
  mesh = {"data": 2, "tensor": 2, "fsdp": 2}
  assert program(True, mesh) == program(False, mesh)


def test_denoising_takes_it_and_thinking_does_not(monkeypatch):
  taken = []
  monkeypatch.setattr(attention.alike, "attend", lambda q, *_: taken.append(q.shape) or q)
  config = ModelConfig(
      llm=LlmConfig(vocab_size=260, hidden_size=32, mlp_size=32, num_layers=1, num_heads=4,
                    num_kv_heads=2),
      vit=VitConfig(grid_size=8), vae=VaeConfig(), max_latent_size=8)
  model, special = UnifiedTransformer(config), SpecialTokens()
  params = abstract_params(config, jnp.float32)["transformer"]
  ctx, keys = jax.eval_shape(lambda: (new_context(config, B, 512),
                                      jax.random.split(jax.random.key(0), B)))
  draft = jax.eval_shape(lambda: steps.new_draft(config, B, 8, special))
  jax.eval_shape(functools.partial(steps.think, model, sampling=Sampling(), special=special),
                 params, ctx, draft, keys, 8)
  assert not taken
  x = jax.ShapeDtypeStruct((B, 4, config.latent_dim), jnp.float32)
  run = functools.partial(steps.denoise, model, grid=(2, 2), special=special,
                          views=(FULL, NO_TEXT, NO_IMAGE))
  jax.eval_shape(run, params, ctx, x, jnp.ones(3), Guidance(), 0, 2)
  assert set(taken) == {(R, 6, 4, 8)}
