"""Attention mask, and attention against a float64 oracle: dense, chunked, cached, bfloat16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error

from irg_jax.model.attention import KeyValues, attend, chunks, visible_pairs
from irg_jax.tokens import CAUSAL, FULL, NOISE, PADDING, Tokens, allowed
from irg_jax.model.kernels.blockwise import key_size, mask_in_blocks

B, VIEWS, T, S, N, K, H = 2, 3, 50, 70, 4, 2, 8
R = B * VIEWS
CHUNK = 16  # divides neither T nor S


def tokens(sample, index, split, kind):
  return Tokens(*(np.asarray(x, np.int32) for x in (sample, index, split, kind)))


def matrix(*rows):
  return np.array([[cell == "1" for cell in row.split()] for row in rows])


def test_mask_of_text_images_and_noise_is_the_documented_one():
  C, F, X = CAUSAL, FULL, NOISE
  row = tokens([0] * 7, range(7), [0, 0, 1, 1, 2, 2, 3], [C, C, F, F, X, X, C])
  np.testing.assert_array_equal(allowed(row, row), matrix(
      "1 . . . . . .",
      "1 1 . . . . .",
      "1 1 1 1 . . .",
      "1 1 1 1 . . .",
      "1 1 1 1 1 1 .",
      "1 1 1 1 1 1 .",
      "1 1 1 1 . . 1"))


def test_mask_of_two_samples_and_padding_is_the_documented_one():
  row = tokens([0, 0, 1, PADDING], [0, 1, 0, 0], [0] * 4, [CAUSAL] * 4)
  np.testing.assert_array_equal(allowed(row, row), matrix(
      "1 . . .",
      "1 1 . .",
      ". . 1 .",
      ". . . ."))


def test_mask_does_not_depend_on_the_order_in_memory():
  row = random_row(np.random.default_rng(0), 40)
  mask = np.asarray(allowed(row, row))
  order = np.random.default_rng(1).permutation(40)
  moved = jax.tree.map(lambda x: x[order], row)
  np.testing.assert_array_equal(allowed(moved, moved), mask[np.ix_(order, order)])


def random_row(rng, length):
  """Several samples of random splits, some padding, shuffled: Tokens of shape [length]."""
  columns = []
  for sample in range(3):
    index = 0
    for split in range(rng.integers(2, 6)):
      n, kind = rng.integers(1, 7), rng.choice([CAUSAL, FULL, NOISE])
      columns += [(sample, index + i, split, kind) for i in range(n)]
      index += n
  columns = (columns + [(PADDING, 0, 0, CAUSAL)] * length)[:length - 3]
  columns += [(PADDING, 0, 0, CAUSAL)] * 3
  return tokens(*np.array(columns)[rng.permutation(length)].T)


def random_case(seed):
  """(q, query tokens, own k and v, cache k and v, cache tokens) of R query rows.

  A random row is cut in two: its first S tokens are in the cache, the other T are queries.
  The cache holds B rows of keys, which R // B query rows share, each with its own metadata.
  """
  rng = np.random.default_rng(seed)
  rows = jax.tree.map(lambda *x: np.stack(x), *[random_row(rng, S + T) for _ in range(R)])
  normal = lambda *shape: rng.standard_normal(shape, np.float32)
  own, cache = (normal(2, R, K, T, H), normal(2, B, K, S, H))
  take = lambda places: jax.tree.map(lambda x: x[:, places], rows)
  return 2 * normal(R, T, N, H), take(slice(S, None)), own, cache, take(slice(S))


@functools.partial(jax.jit, static_argnames="implementation")
def attended(q, query, own, cache=None, cache_tokens=None, *, implementation):
  """Attention of queries over their own keys and, if given, a cache."""
  sources = [KeyValues(*own, query)]
  if cache is not None:
    sources.append(KeyValues(*cache, cache_tokens))
  return attend(q, query, sources, implementation=implementation, query_chunk=CHUNK,
                key_chunk=CHUNK)


def oracle(q, query, sources):
  """Attention in float64, one query row and head at a time; zeros where nothing is seen."""
  out = np.zeros(q.shape)
  for row, head in np.ndindex(q.shape[0], q.shape[2]):
    part = lambda s, x: np.asarray(x[row * len(x) // len(q), head * K // N], np.float64)
    k, v = (np.concatenate([part(s, getattr(s, name)) for s in sources]) for name in "kv")
    mask = np.concatenate([allowed(*(jax.tree.map(lambda x: x[row], t) for t in (query, s.tokens)))
                           for s in sources], axis=1)
    logits = np.where(mask, np.asarray(q[row, :, head], np.float64) @ k.T / np.sqrt(H), -np.inf)
    seen = mask.any(1)
    weights = np.exp(logits[seen] - logits[seen].max(1, keepdims=True))
    out[row, seen, head] = weights @ v / weights.sum(1, keepdims=True)
  return out


@pytest.mark.parametrize("seed", range(3))
def test_dense_and_chunked_equal_the_oracle(seed):
  q, query, own, cache, cache_tokens = case = random_case(seed)
  want = oracle(q, query, [KeyValues(*own, query), KeyValues(*cache, cache_tokens)])
  for implementation in ("dense", "chunked"):
    got = attended(*case, implementation=implementation)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=2e-6, err_msg=implementation)


def test_queries_that_see_nothing_give_zeros():
  case = random_case(0)
  for implementation in ("dense", "chunked"):
    got = np.asarray(attended(*case, implementation=implementation))
    padding = case[1].sample == PADDING
    assert padding.any() and not got[padding].any()
    assert got[~padding].any(axis=(-1, -2)).all()


@pytest.mark.parametrize("length", [1, 40, 1500])
def test_visible_pairs_are_those_of_the_mask(length):
  """1500 tokens are counted in two blocks, the second of them padded."""
  rng = np.random.default_rng(0)
  rows = jax.tree.map(lambda *x: np.stack(x), *[random_row(rng, length + 3) for _ in range(2)])
  rows = jax.tree.map(lambda x: x[:, :length], rows)
  assert float(visible_pairs(rows)) == np.asarray(allowed(rows, rows)).sum()


@pytest.mark.parametrize("queries, on", [(1, "cpu"), (1, "tpu"), (258, "cpu"), (4098, "tpu")])
def test_blocks_of_keys_divide_every_cache(queries, on):
  """Otherwise blocks overlap, and part of the cache is read twice in every layer."""
  for slots in range(512, 20480, 512):
    assert slots % key_size(slots, chunks(queries, on)[1]) == 0


@pytest.mark.parametrize("length, most", [
    (5, 8), (8, 8), (9, 8), (1730, 288), (4098, 512), (36600, 512)])
def test_blocks_have_every_key_once_and_no_more_than_may_be(length, most):
  """The last block overlaps the one before if the size does not divide the length."""
  size = key_size(length, most)
  blocks = np.asarray(mask_in_blocks(np.ones((1, 1, length), bool), most))[0, 0]
  assert min(length, most // 2) <= size <= min(length, most)
  assert len(blocks) == -(-length // size)
  starts = np.minimum(np.arange(len(blocks)) * size, length - size)
  read = (starts[:, None] + np.arange(size))[blocks]
  np.testing.assert_array_equal(np.sort(read), np.arange(length))


@pytest.mark.parametrize("seen", [[], [0], [-1], [1, 2], [0, -1]])
def test_blocks_that_no_view_sees_are_never_read(seen):
  q, query, own, cache, cache_tokens = random_case(0)
  block, blocks = 14, 5  # which divide S: else the last one begins within the one before
  number = np.arange(S) // block
  read = np.isin(number, [i % blocks for i in seen])
  cache_tokens.sample[:, ~read] = PADDING
  cache_tokens.sample[::2] = PADDING  # every other view sees nothing at all
  want = oracle(q, query, [KeyValues(*own, query), KeyValues(*cache, cache_tokens)])
  cache[:, :, :, ~read] = np.nan  # 0 * NaN would show
  sources = [KeyValues(*own, query), KeyValues(*cache, cache_tokens)]
  got = attend(q, query, sources, implementation="chunked", key_chunk=block)
  np.testing.assert_allclose(got, want, atol=2e-6)


def test_an_empty_cache_alone_gives_zeros():
  q, query, _, cache, cache_tokens = random_case(0)
  cache_tokens.sample[:] = PADDING
  source = KeyValues(*np.full_like(cache, np.nan), cache_tokens)
  got = jax.jit(functools.partial(attend, implementation="chunked", key_chunk=CHUNK))(
      q, query, [source])
  assert got.shape == q.shape and not np.asarray(got).any()


def test_gradients_of_chunked_equal_those_of_dense():
  """Includes padding queries and keys that nobody sees, which must not give NaN."""
  q, query, own, *_ = random_case(0)

  @functools.partial(jax.jit, static_argnums=0)
  def gradients(implementation, q, own):
    loss = lambda q, own: jnp.sum(
        jnp.sin(3 * attended(q, query, own, implementation=implementation)))
    return jax.grad(loss, argnums=(0, 1))(q, own)

  dense, chunked = (gradients(name, q, own) for name in ("dense", "chunked"))
  for name, got, want in zip(("q", "k and v"), chunked, dense):
    assert np.linalg.norm(want) > 1
    np.testing.assert_allclose(got, want, atol=2e-5, err_msg=name)


def temporary_bytes(length, implementation, backward):
  """Temporary memory of attention within one row of `length` tokens, in bytes."""
  x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
  kv = jax.ShapeDtypeStruct((1, 1, length, 8), jnp.float32)
  row = Tokens(*[jax.ShapeDtypeStruct((1, length), jnp.int32)] * 4)
  def f(q, k, v, row):
    return jnp.sum(attend(q, row, [KeyValues(k, v, row)], implementation=implementation))
  f = jax.grad(f, argnums=(0, 1, 2)) if backward else f
  return jax.jit(f).lower(x, kv, kv, row).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_of_long_rows_is_linear_by_default(backward):
  short, long = (temporary_bytes(length, "auto", backward) for length in (8192, 16384))
  assert 0 < long < 2.5 * short


def test_memory_of_the_dense_form_is_quadratic():
  """Shows that `temporary_bytes` can tell the forms apart."""
  short, long = (temporary_bytes(length, "dense", False) for length in (1024, 2048))
  assert long > 3.5 * short


def test_softmax_of_bfloat16_inputs_is_float32():
  q, query, own, *_ = random_case(0)
  # Logits in the tens, where bfloat16 has steps of 1/8 and more.
  q, own = jnp.asarray(8 * q, jnp.bfloat16), jnp.asarray(own, jnp.bfloat16)
  want = oracle(q, query, [KeyValues(*own, query)])
  for implementation in ("dense", "chunked"):
    got = attended(q, query, own, implementation=implementation)
    assert got.dtype == jnp.bfloat16
    assert relative_error(got, want) < 4e-3, implementation


def test_unknown_implementation_is_refused():
  q, query, own, *_ = random_case(0)
  with pytest.raises(ValueError, match="unknown attention implementation 'fast'"):
    attend(q, query, [KeyValues(*own, query)], implementation="fast")
