"""Pallas kernels of attention, interpreted: the dense form decides."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error
from einops import rearrange
from test_attention import random_row
from test_samples import DATA, MODEL

from irg_jax import sharding
from irg_jax.data import sample_set
from irg_jax.data.batch import BufferSizes, pack_row
from irg_jax.data.records import MODES, parse_conversation
from irg_jax.data.samples import record_features
from irg_jax.generate.context import seen_before
from irg_jax.model import attention
from irg_jax.model.attention import KeyValues, attend
from irg_jax.model.kernels import fused, gpu, tpu, visible
from irg_jax.model.vit import patch_tokens
from irg_jax.tokenizer import load_tokenizer, write_byte_tokenizer
from irg_jax.tokens import CAUSAL, NOISE, PADDING, Tokens, allowed

SIZES = BufferSizes(und=850, gen=50, vit=70, text=420, samples=4)
KERNELS = pytest.mark.parametrize("kernel", [tpu, gpu], ids=["tpu", "gpu"])


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
  """Rows [3, 900] of the real packer: samples of all modes, padding, no multiple of a block."""
  folder = tmp_path_factory.mktemp("tokenizer")
  write_byte_tokenizer(folder)
  tokenizer = load_tokenizer(folder, MODEL.llm.vocab_size)
  samples = []
  for i, mode in enumerate(MODES):
    record = parse_conversation(json.dumps(sample_set.conversation(mode, i)), mode, i)
    samples.append(record_features(record, tokenizer, MODEL, DATA, np.random.default_rng(i)))
  rows = [pack_row([samples[i], samples[5 - i]], SIZES) for i in range(3)]
  return jax.tree.map(lambda *x: np.stack(x), *rows)


@pytest.fixture
def some(packed, monkeypatch):
  """Every third token of these rows, [3, 300], and small blocks: 3 x 3 of them."""
  for kernel in (tpu, gpu):
    monkeypatch.setattr(kernel, "block_sizes", lambda *_: (128, 128))
  return jax.tree.map(lambda x: x[:, ::3], packed.tokens)


def qkv(rows, T, N, K, H, dtype=jnp.float32, S=None, R=None):
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32), dtype)
  return normal(R or rows, T, N, H), normal(rows, K, S or T, H), normal(rows, K, S or T, H)


def compare(kernel, monkeypatch, tokens, *qkv, out=2e-6, gradients=1e-5):
  """Output and gradients of the kernel against those of the dense form in float32."""
  monkeypatch.setattr(fused, "kernel", lambda: kernel)
  weight = jnp.asarray(np.random.default_rng(1).standard_normal(qkv[0].shape, np.float32))

  def results(form, *qkv):
    def loss(q, k, v):
      attended = attend(q, tokens, [KeyValues(k, v, tokens)], implementation=form)
      return jnp.sum(weight * attended.astype(jnp.float32)), attended

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, attended), d = grad(*qkv)
    return attended, *d

  want = results("dense", *(x.astype(jnp.float32) for x in qkv))
  got = results("kernel", *qkv)
  for name, bound, a, b in zip(("out", "d_q", "d_k", "d_v"), (out, *[gradients] * 3), got, want):
    assert a.dtype == qkv[0].dtype
    assert relative_error(a, b) < bound, name
  return got


@pytest.mark.parametrize("seed", range(8))
def test_the_integers_say_what_the_mask_says(seed):
  """In any order of the tokens in memory."""
  row = random_row(np.random.default_rng(seed), 60)
  query, key = visible.query_words(row)[:, :, None], visible.key_words(row)[:, None]
  np.testing.assert_array_equal(visible.sees(*query, *key), allowed(row, row))


def test_slots_of_a_cache_precede_every_query():
  query = Tokens(*(np.array(x) for x in ([0, 0], [0, 3], [0, 1], [CAUSAL, NOISE])))
  keys = seen_before(np.array([True, False, True]))
  words = visible.query_words(query)[:, :, None], visible.key_words(keys)[:, None]
  np.testing.assert_array_equal(visible.sees(*words[0], *words[1]), [[True, False, True]] * 2)


@pytest.mark.parametrize("term", range(4), ids=["lo", "reach", "clean", "noise"])
def test_each_term_of_the_mask_counts(term):
  """A mutation of any of the four terms gives another mask."""
  rows = [random_row(np.random.default_rng(seed), 60) for seed in range(8)]
  mutants = [
      lambda lo, reach, split, rank, noise: visible.sees(-1, reach, split, rank, noise),
      lambda lo, reach, split, rank, noise: visible.sees(lo, 2**31 - 1, split, rank, noise),
      lambda lo, reach, split, rank, noise: (
          (lo <= rank) & (rank <= reach) & (noise == split)),
      lambda lo, reach, split, rank, noise: visible.sees(lo, reach, split, rank, 0)]
  different = 0
  for row in rows:
    query, key = visible.query_words(row)[:, :, None], visible.key_words(row)[:, None]
    different += np.any(np.asarray(mutants[term](*query, *key)) != np.asarray(allowed(row, row)))
  assert different >= 6


def test_blocks_are_those_in_which_something_is_visible(packed):
  query, key = visible.query_words(packed.tokens), visible.key_words(packed.tokens)
  prepare = jax.jit(visible.prepare, static_argnums=(2, 3, 4))
  prepared = prepare(query[:, None], key[:, None], 128, 256, 64)
  T, S = prepared.query_words.shape[-1] // 128, prepared.key_words.shape[-1] // 256
  mask = np.zeros((3, T * 128, S * 256), bool)
  mask[:, :900, :900] = allowed(packed.tokens, packed.tokens)
  some = rearrange(mask, "b (t i) (s j) -> b t s (i j)", i=128, j=256)
  for blocks, turned in ((prepared.by_query, False), (prepared.by_key, True)):
    count = int(blocks.start[-1])
    outer, inner, flags = (
        np.asarray(x)[:count] for x in (blocks.outer, blocks.inner, blocks.flags))
    visited = np.zeros((3, S, T) if turned else (3, T, S), bool)
    row, block = np.divmod(outer, visited.shape[1])
    visited[row, block, inner] = True
    visited = np.swapaxes(visited, 1, 2) if turned else visited
    assert not (some.any(-1) & ~visited).any()  # nothing visible is left out
    assert count <= some.any(-1).sum() + 8  # and little else is visited
    assert set(outer) == set(range(3 * (S if turned else T)))
    whole = flags & visible.WHOLE > 0
    places = (row[whole], inner[whole], block[whole]) if turned else (
        row[whole], block[whole], inner[whole])
    assert whole.any() and some[places].all()
    assert (flags[whole] & visible.SEEN > 0).all()
    assert (np.diff(outer) >= 0).all()
    assert ((flags & visible.FIRST > 0) == np.diff(outer, prepend=-1).astype(bool)).all()
    assert ((flags & visible.LAST > 0) == np.diff(outer, append=-1).astype(bool)).all()


@KERNELS
@pytest.mark.parametrize("heads", [(28, 4, 128), (8, 8, 64), (2, 2, 72)], ids=str)
def test_packed_rows_of_every_mode(kernel, some, heads, monkeypatch):
  tokens = some if heads[0] == 2 else jax.tree.map(lambda x: x[:1], some)  # more heads take long
  out, *_ = compare(kernel, monkeypatch, tokens, *qkv(*tokens.sample.shape, *heads))
  padding = tokens.sample == PADDING
  assert padding.any() and not np.asarray(out)[padding].any()


@pytest.mark.long
@KERNELS
@pytest.mark.parametrize("heads", [(28, 4, 128), (8, 8, 64), (2, 2, 72)], ids=str)
def test_whole_rows_in_blocks_of_their_real_size(kernel, packed, heads, monkeypatch):
  compare(kernel, monkeypatch, packed.tokens, *qkv(*packed.tokens.sample.shape, *heads))


@KERNELS
def test_patches_see_their_own_image(kernel, packed, monkeypatch):
  tokens = patch_tokens(packed.vit_image)
  compare(kernel, monkeypatch, tokens, *qkv(*tokens.sample.shape, 2, 2, 72))


@KERNELS
def test_a_row_of_padding_alone_gives_zeros(kernel, some, monkeypatch):
  tokens = jax.tree.map(lambda x: x[:2].copy(), some)
  tokens.sample[1] = PADDING
  got = compare(kernel, monkeypatch, tokens, *qkv(*tokens.sample.shape, 2, 1, 64))
  assert not any(np.asarray(x)[1].any() for x in got)


@KERNELS
def test_bfloat16_is_within_its_rounding(kernel, some, monkeypatch):
  tokens = jax.tree.map(lambda x: x[:1], some)
  inputs = qkv(*tokens.sample.shape, 2, 1, 64, jnp.bfloat16)
  compare(kernel, monkeypatch, tokens, *inputs, out=4e-3, gradients=8e-3)


@KERNELS
@pytest.mark.parametrize("seen", ["some", "none"])
def test_three_views_of_one_cache(kernel, seen, monkeypatch):
  """Tokens of a noised image, with their own keys and a cache of which views see other parts."""
  monkeypatch.setattr(fused, "kernel", lambda: kernel)
  monkeypatch.setattr(kernel, "block_sizes", lambda *_: (128, 128))
  B, W, T, S = 2, 3, 70, 300
  zeros = np.zeros((B * W, T), np.int32)
  query = Tokens(zeros, zeros + np.arange(T, dtype=np.int32), zeros, zeros + NOISE)
  shown = np.random.default_rng(0).random((B * W, S)) < 0.5
  shown[:, 128:256] = False
  shown[0], shown[1] = True, False
  q, own_k, own_v = qkv(B * W, T, 4, 2, 64)
  _, k, v = qkv(B, T, 4, 2, 64, S=S)
  sources = [KeyValues(own_k, own_v, query), KeyValues(k, v, seen_before(shown & (seen == "some")))]
  dense, got = (jax.jit(functools.partial(attend, implementation=form))(q, query, sources)
                for form in ("dense", "kernel"))
  assert relative_error(got, dense) < 2e-6


@pytest.mark.parametrize("kernel, mesh", [
    pytest.param(kernel, mesh, marks=[pytest.mark.long] * long, id=f"{name} {mesh}")
    for name, kernel, mesh, long in (
        ("tpu", tpu, {"data": 2, "tensor": 4}, False), ("gpu", gpu, {"data": 2, "tensor": 4}, True),
        ("gpu", gpu, {"fsdp": 2, "sequence": 2, "tensor": 2}, False),
        ("tpu", tpu, {"fsdp": 2, "sequence": 2, "tensor": 2}, True))])
def test_on_a_mesh_each_device_runs_its_part(kernel, mesh, monkeypatch):
  """`tensor` may have more devices than there are key-value heads: then all heads stay together."""
  rng = np.random.default_rng(0)
  tokens = jax.tree.map(lambda *x: np.stack(x), *[random_row(rng, 200) for _ in range(4)])
  with jax.set_mesh(sharding.make_mesh(mesh)):
    compare(kernel, monkeypatch, tokens, *qkv(4, 200, 4, 2, 64))


def test_a_platform_takes_its_kernel_where_it_applies(monkeypatch):
  long, short = [4096], [128]
  assert attention.choose(4096, long) == "chunked" and attention.choose(128, short) == "dense"
  monkeypatch.setattr(attention, "platform", lambda: "tpu")
  assert attention.choose(4096, long) == "kernel" and attention.choose(128, short) == "dense"
  assert attention.choose(1, [1, 16384]) == "chunked"  # decoding is bound by reading the cache
