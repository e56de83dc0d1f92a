"""Properties of the autoencoder on random weights."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error

from irg_jax.config import VaeConfig
from irg_jax.model import vae as vae_lib
from irg_jax.model.vae import Vae, patchify_latents, sample_latents, to_uint8, unpatchify_latents

TINY = VaeConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4)
F32 = dict(dtype="float32", param_dtype="float32")


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


@functools.cache
def tiny_params():
  """Random in every leaf: zero biases and unit scales would hide one that is never used."""
  shapes = jax.eval_shape(Vae(TINY).init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)))["params"]
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: random_leaf(rng, x.shape), shapes)


def random_leaf(rng, shape):
  noise = rng.standard_normal(shape, np.float32)
  return noise / np.sqrt(np.prod(shape[:-1])) if len(shape) > 1 else 0.5 + 0.1 * noise


@functools.cache
def compiled(method, dtype):
  return jax.jit(functools.partial(Vae(TINY, dtype).apply, method=method))


def tiny(method, x, dtype="float32"):
  return compiled(method, dtype)({"params": tiny_params()}, x)


def test_sizes_of_latents_and_pixels_follow_the_config():
  for mult, blocks in (((1,), 1), ((1, 2), 2), ((1, 1, 2), 1)):
    cfg = VaeConfig(ch=32, ch_mult=mult, num_res_blocks=blocks, z_channels=4)
    x = jax.ShapeDtypeStruct((2, 8, 16, 3), jnp.float32)
    variables = jax.eval_shape(Vae(cfg).init, jax.random.key(0), x)
    apply = functools.partial(Vae(cfg).apply, method="encode")
    mean, logvar = jax.eval_shape(apply, variables, x)
    assert mean.shape == logvar.shape == (2, 8 // cfg.downsample, 16 // cfg.downsample, 4)
    assert jax.eval_shape(Vae(cfg).apply, variables, x).shape == x.shape
    stages = variables["params"]["decoder"]
    assert set(stages) >= {f"up_{i}" for i in range(len(mult))}
    assert {n for n in stages["up_0"]} == {f"block_{j}" for j in range(blocks + 1)}


def test_rows_of_a_batch_do_not_see_each_other():
  pixels, latents = normal(1, 2, 8, 12, 3), normal(2, 2, 4, 6, 4)
  for method, x in (("encode", pixels), ("decode", latents)):
    batched = tiny(method, x)
    singles = [tiny(method, x[i:i + 1]) for i in range(2)]
    together = jax.tree.map(lambda *rows: np.concatenate(rows), *singles)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), batched, together)


def test_bfloat16_compute_stays_near_and_returns_float32():
  latents = normal(2, 1, 4, 4, 4)
  got, want = tiny("decode", latents, "bfloat16"), tiny("decode", latents)
  assert got.dtype == jnp.float32
  assert 0 < relative_error(got, want) < 0.05


def test_upsampling_convolution_is_nearest_then_convolution():
  x = normal(0, 2, 3, 5, 4)
  params = {"params": {"kernel": normal(1, 3, 3, 4, 6), "bias": normal(2, 6)}}
  doubled = x.repeat(2, axis=1).repeat(2, axis=2)
  want = nn.Conv(6, (3, 3), padding=1).apply(params, doubled)
  got = vae_lib.UpsampleConv(6, **F32).apply(params, x)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_point_convolution_is_a_1x1_convolution():
  x = normal(0, 2, 3, 5, 4)
  params = {"params": {"kernel": normal(1, 1, 1, 4, 6), "bias": normal(2, 6)}}
  want = nn.Conv(6, (1, 1)).apply(params, x)
  np.testing.assert_allclose(vae_lib.PointConv(6, **F32).apply(params, x), want, atol=1e-5)


def test_group_norm_is_exact_far_from_zero_and_over_a_large_image():
  x = normal(0, 1, 256, 256, 64) + 10.0
  scale, bias = normal(1, 64), normal(2, 64)
  groups = np.asarray(x, np.float64).reshape(1, -1, 32, 2)
  centred = groups - groups.mean((1, 3), keepdims=True)
  want = centred / np.sqrt((centred**2).mean((1, 3), keepdims=True) + vae_lib.NORM_EPS)
  want = want.reshape(x.shape) * scale + bias
  norm = vae_lib.group_norm("float32")
  got = jax.jit(norm.apply)({"params": {"scale": scale, "bias": bias}}, x)
  assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("chunk", [1, 5, 6, 24, 1000])
def test_chunked_attention_is_attention(chunk):
  q, k, v = (3.0 * normal(i, 2, 24, 8) for i in range(3))
  weights = jax.nn.softmax(jnp.einsum("bqc,bpc->bqp", q, k) / np.sqrt(8))
  want = jnp.einsum("bqp,bpc->bqc", weights, v)
  np.testing.assert_allclose(
      vae_lib.attend_positions(q, k, v, chunk), want, atol=1e-5)


def test_attention_at_1024_pixels_never_holds_all_scores():
  x = jax.ShapeDtypeStruct((1, 128 * 128, 64), jnp.float32)
  memory = jax.jit(vae_lib.attend_positions).lower(x, x, x).compile().memory_analysis()
  all_scores = 4 * (128 * 128) ** 2
  assert memory.temp_size_in_bytes < all_scores / 4


def test_latents_are_the_mean_without_noise_and_a_draw_with_it():
  mean, logvar, noise = (normal(i, 1, 2, 2, 4) for i in range(3))
  scale, shift = TINY.scale_factor, TINY.shift_factor
  np.testing.assert_allclose(
      sample_latents(TINY, mean, logvar), scale * (mean - shift), rtol=1e-6)
  np.testing.assert_allclose(
      sample_latents(TINY, mean, logvar, noise),
      scale * (mean + np.exp(logvar / 2) * noise - shift), rtol=1e-5, atol=1e-6)


def test_decode_undoes_scale_and_shift():
  sample = normal(0, 1, 2, 2, 4)
  decoder = vae_lib.Decoder(TINY, "float32", "float32")
  want = jax.jit(decoder.apply)({"params": tiny_params()["decoder"]}, sample)
  got = tiny("decode", sample_latents(TINY, sample, None))
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_patches_are_flattened_row_column_channel():
  latents = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
  tokens = patchify_latents(latents, 2)
  assert tokens.shape == (2, 6, 12)
  for row in range(2):
    for column in range(3):
      block = latents[:, 2 * row:2 * row + 2, 2 * column:2 * column + 2]
      np.testing.assert_array_equal(tokens[:, row * 3 + column], block.reshape(2, 12))
  np.testing.assert_array_equal(unpatchify_latents(tokens, 4, 6, 2), latents)


def test_eight_bit_pixels_are_clipped_and_truncated():
  pixels = jnp.array([-3.0, -1.0, 0.0, 0.999, 1.0, 7.0])
  assert to_uint8(pixels).tolist() == [0, 0, 127, 254, 255, 255]
  assert to_uint8(pixels).dtype == jnp.uint8


@pytest.mark.parametrize("method, shape, message", [
    ("encode", (1, 8, 9, 3), "multiples of 2"),
    ("encode", (1, 8, 8, 4), r"\[batch, height, width, 3\]"),
    ("encode", (8, 8, 3), r"\[batch, height, width, 3\]"),
    ("decode", (1, 4, 4, 16), r"\[batch, h, w, 4\]"),
    ("decode", (1, 4, 16), "unpatchify"),
])
def test_a_wrong_shape_is_named(method, shape, message):
  with pytest.raises(ValueError, match=message):
    tiny(method, jnp.zeros(shape))


def test_a_width_without_whole_groups_is_named():
  cfg = VaeConfig(ch=48, ch_mult=(1,))
  with pytest.raises(ValueError, match="48 .* multiple of 32"):
    Vae(cfg).init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))


def test_tokens_that_make_no_image_are_refused():
  with pytest.raises(ValueError, match="multiples of 2"):
    patchify_latents(jnp.zeros((1, 3, 4, 2)), 2)
  for h, w in ((4, 6), (3, 4), (2, 8)):
    with pytest.raises(ValueError, match="do not make"):
      unpatchify_latents(jnp.zeros((1, 5, 8)), h, w, 2)
