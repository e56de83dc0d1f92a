"""The autoencoder against the reference: moments, posterior draw, latents, pixels, 8-bit."""

import jax
import numpy as np
from conftest import relative_error

from irg_jax.model.vae import Vae, patchify_latents, sample_latents, to_uint8, unpatchify_latents

TOLERANCE = 1e-5


def nhwc(x):
  """Reference images and latents are [B, C, height, width]."""
  return np.moveaxis(x, 1, -1)


def run(checkpoint, method, x):
  vae = Vae(checkpoint.config.vae)
  return jax.jit(lambda p, x: vae.apply({"params": p}, x, method=method))(
      checkpoint.params["vae"], x)


def assert_moments(checkpoint, pixels, want):
  mean, logvar = run(checkpoint, "encode", nhwc(pixels))
  want_mean, want_logvar = np.split(nhwc(want), 2, axis=-1)
  assert relative_error(mean, want_mean) < TOLERANCE
  assert relative_error(logvar, want_logvar) < TOLERANCE
  return mean, logvar


def decode_tokens(checkpoint, tokens, height, width):
  config = checkpoint.config
  stride = config.vae.downsample
  latents = unpatchify_latents(
      tokens[None], height // stride, width // stride, config.latent_patch_size)
  return run(checkpoint, "decode", latents)


def test_every_parameter_has_its_published_shape(checkpoint):
  vae = Vae(checkpoint.config.vae)
  stride = checkpoint.config.vae.downsample
  shapes = jax.eval_shape(vae.init, jax.random.key(0), np.zeros((1, stride, stride, 3)))["params"]
  got = jax.tree.map(np.shape, checkpoint.params["vae"])
  assert got == jax.tree.map(lambda x: x.shape, shapes)


def test_moments_of_a_image(reference, checkpoint):
  mean, logvar = assert_moments(checkpoint, reference["vae/pixels"], reference["vae/moments"])
  latents = sample_latents(checkpoint.config.vae, mean, logvar)
  assert relative_error(latents, nhwc(reference["vae/latent_mean"])) < TOLERANCE


def test_decoded_image(reference, checkpoint):
  pixels = run(checkpoint, "decode", nhwc(reference["vae/latent_mean"]))
  assert relative_error(pixels, nhwc(reference["vae/decoded"])) < TOLERANCE


def test_posterior_draw_of_the_training_images(reference, checkpoint):
  mean, logvar = assert_moments(
      checkpoint, reference["train/padded_images"], reference["train/vae_moments"])
  latents = sample_latents(
      checkpoint.config.vae, mean, logvar, nhwc(reference["train/vae_encode_noise"]))
  assert relative_error(latents, nhwc(reference["train/padded_latent"])) < TOLERANCE


def test_generated_latents_decode_to_the_generated_images(reference, checkpoint):
  height, width = (int(n) for n in reference["irg/image_hw"])
  rounds = len([n for n in reference.names("irg/latent") if n.removeprefix("irg/latent").isdigit()])
  assert rounds
  for i in range(1, rounds + 1):
    pixels = decode_tokens(checkpoint, reference[f"irg/latent{i}"], height, width)
    want = nhwc(reference[f"irg/image{i}_float"])
    assert relative_error(pixels, want) < TOLERANCE
    gap = np.abs(np.asarray(to_uint8(pixels)[0], int) - reference[f"irg/image{i}"])
    assert gap.max() <= 1 and (gap == 0).mean() >= 0.99
    # From the reference's own floats the truncation must not be off by one anywhere.
    np.testing.assert_array_equal(to_uint8(want)[0], reference[f"irg/image{i}"])


def test_tokens_of_generated_latents_come_back(reference, checkpoint):
  height, width = (int(n) for n in reference["irg/image_hw"])
  patch, stride = checkpoint.config.latent_patch_size, checkpoint.config.vae.downsample
  tokens = reference["irg/latent1"][None]
  latents = unpatchify_latents(tokens, height // stride, width // stride, patch)
  np.testing.assert_array_equal(patchify_latents(latents, patch), tokens)
