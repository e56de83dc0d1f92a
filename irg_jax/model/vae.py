"""The FLUX.1 autoencoder: pixels to latents and back (spec section 2). Frozen in training.

Everything is NHWC: pixels [B, height, width, 3] in [-1, 1], latents [B, h, w, z] with
h = height / config.downsample. GroupNorm and the middle attention see the whole image, so
images of different sizes must never be padded into one batch: group them by size.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from irg_jax.config import ModelConfig, VaeConfig
from irg_jax.model.vae_layers import GROUPS, Attention, GroupNorm, ResBlock, UpsampleConv, conv3x3


class Vae(nn.Module):
  """Encoder and decoder; use as `Vae(cfg).apply({"params": p}, x, method="encode")`.

  Attributes:
    config: sizes, latent scale and shift.
    dtype: dtype of convolutions and activations. Norm statistics, softmax and the pixels and
      moments that come out are float32.
    param_dtype: dtype of freshly initialised parameters.
  """

  config: VaeConfig
  dtype: str = "float32"
  param_dtype: str = "float32"

  def setup(self):
    _check_config(self.config)
    self.encoder = Encoder(self.config, self.dtype, self.param_dtype)
    self.decoder = Decoder(self.config, self.dtype, self.param_dtype)

  def encode(self, pixels):
    """Moments of the posterior.

    Args:
      pixels: float [B, height, width, 3] in [-1, 1].

    Returns:
      (mean, logvar), unscaled, float32 [B, h, w, z]; see `sample_latents`.

    Raises:
      ValueError: a shape the encoder cannot halve.
    """
    stride = self.config.downsample
    if pixels.ndim != 4 or pixels.shape[-1] != 3:
      raise ValueError(f"pixels {pixels.shape}: want [batch, height, width, 3]")
    if pixels.shape[1] % stride or pixels.shape[2] % stride:
      raise ValueError(
          f"pixels {pixels.shape}: height and width must be multiples of {stride}; resize first")
    return tuple(jnp.split(self.encoder(pixels), 2, axis=-1))

  def decode(self, latents):
    """Pixels of scaled latents: float [B, h, w, z] -> float32 [B, height, width, 3], not clipped.

    Raises:
      ValueError: the channels are not those of the config.
    """
    z = self.config.z_channels
    if latents.ndim != 4 or latents.shape[-1] != z:
      raise ValueError(f"latents {latents.shape}: want [batch, h, w, {z}]; unpatchify first")
    latents = latents.astype(jnp.float32)
    return self.decoder(latents / self.config.scale_factor + self.config.shift_factor)

  def __call__(self, pixels):
    """Reconstruction through the mean; one `init` with it makes every parameter."""
    return self.decode(sample_latents(self.config, *self.encode(pixels)))


class Encoder(nn.Module):
  """[B, height, width, 3] -> moments, float32 [B, h, w, 2 * z]."""

  config: VaeConfig
  dtype: str
  param_dtype: str

  @nn.compact
  def __call__(self, x):
    cfg, dtypes = self.config, dict(dtype=self.dtype, param_dtype=self.param_dtype)
    x = conv3x3(cfg.ch, name="conv_in", **dtypes)(x)
    for i, mult in enumerate(cfg.ch_mult):
      x = DownStage(cfg.ch * mult, cfg.num_res_blocks, i + 1 < len(cfg.ch_mult),
                    name=f"down_{i}", **dtypes)(x)
    x = Middle(name="mid", **dtypes)(x)
    x = nn.swish(GroupNorm(self.param_dtype, name="norm_out")(x))
    return conv3x3(2 * cfg.z_channels, name="conv_out", **dtypes)(x).astype(jnp.float32)


class Decoder(nn.Module):
  """Unscaled latents [B, h, w, z] -> float32 [B, height, width, 3]."""

  config: VaeConfig
  dtype: str
  param_dtype: str

  @nn.compact
  def __call__(self, x):
    cfg, dtypes = self.config, dict(dtype=self.dtype, param_dtype=self.param_dtype)
    x = conv3x3(cfg.ch * cfg.ch_mult[-1], name="conv_in", **dtypes)(x)
    x = Middle(name="mid", **dtypes)(x)
    # The published names count stages by resolution, so the last one runs first.
    for i, mult in reversed(list(enumerate(cfg.ch_mult))):
      x = UpStage(cfg.ch * mult, cfg.num_res_blocks + 1, i > 0, name=f"up_{i}", **dtypes)(x)
    x = nn.swish(GroupNorm(self.param_dtype, name="norm_out")(x))
    return conv3x3(3, name="conv_out", **dtypes)(x).astype(jnp.float32)


class DownStage(nn.Module):
  """Residual blocks at one resolution, then (but for the last stage) half the resolution."""

  features: int
  blocks: int
  halve: bool
  dtype: str
  param_dtype: str

  @nn.compact
  def __call__(self, x):
    dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    for j in range(self.blocks):
      x = ResBlock(self.features, name=f"block_{j}", **dtypes)(x)
    if self.halve:
      x = nn.Conv(self.features, (3, 3), strides=2, padding=((0, 1), (0, 1)),
                  name="downsample", **dtypes)(x)
    return x


class UpStage(nn.Module):
  """Residual blocks at one resolution, then (but for the last stage) twice the resolution."""

  features: int
  blocks: int
  double: bool
  dtype: str
  param_dtype: str

  @nn.compact
  def __call__(self, x):
    dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    for j in range(self.blocks):
      x = ResBlock(self.features, name=f"block_{j}", **dtypes)(x)
    return UpsampleConv(self.features, name="upsample", **dtypes)(x) if self.double else x


class Middle(nn.Module):
  """Block, attention over all positions, block, at the lowest resolution."""

  dtype: str
  param_dtype: str

  @nn.compact
  def __call__(self, x):
    dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    x = ResBlock(x.shape[-1], name="block_1", **dtypes)(x)
    x = Attention(name="attn_1", **dtypes)(x)
    return ResBlock(x.shape[-1], name="block_2", **dtypes)(x)


def sample_latents(config: VaeConfig, mean, logvar, noise=None):
  """Scaled latents of a posterior: `scale * (mean + std * noise - shift)`.

  Args:
    mean, logvar: [B, h, w, z] from `Vae.encode`.
    noise: standard normal [B, h, w, z]; None takes the mean.
  """
  if noise is not None:
    mean = mean + jnp.exp(0.5 * logvar) * noise
  return config.scale_factor * (mean - config.shift_factor)


def patchify_latents(latents, patch: int):
  """[B, h, w, z] -> tokens [B, h/p * w/p, p * p * z], each flattened (row, column, channel).

  Raises:
    ValueError: h or w is not a multiple of `patch`.
  """
  b, h, w, z = latents.shape
  if h % patch or w % patch:
    raise ValueError(f"latents {latents.shape}: height and width must be multiples of {patch}")
  x = latents.reshape(b, h // patch, patch, w // patch, patch, z)
  return jnp.transpose(x, (0, 1, 3, 2, 4, 5)).reshape(b, -1, patch * patch * z)


def unpatchify_latents(tokens, h: int, w: int, patch: int):
  """The inverse of `patchify_latents`; h and w count latents, not tokens.

  Raises:
    ValueError: the tokens do not make an h x w image.
  """
  b, length, dim = tokens.shape
  if h % patch or w % patch or length * patch * patch != h * w or dim % (patch * patch):
    raise ValueError(f"tokens {tokens.shape} do not make {h} x {w} latents in patches of {patch}")
  x = tokens.reshape(b, h // patch, w // patch, patch, patch, -1)
  return jnp.transpose(x, (0, 1, 3, 2, 4, 5)).reshape(b, h, w, -1)


@functools.partial(jax.jit, static_argnums=0)
def encode_levels(model: ModelConfig, params, levels):
  """Posterior moments of 8-bit images, uint8 [B, H, W, 3] -> float32 [B, 2, h, w, z]."""
  pixels = (levels.astype(jnp.float32) / 255 - 0.5) / 0.5  # as images.to_pixels
  vae = Vae(model.vae, model.dtype)
  return jnp.stack(vae.apply({"params": params}, pixels, method="encode"), 1)


def to_uint8(pixels):
  """[-1, 1] -> 0..255, clipped, and truncated as the reference does (spec section 8)."""
  return ((jnp.clip(pixels, -1.0, 1.0) * 0.5 + 0.5) * 255.0).astype(jnp.uint8)


def _check_config(config: VaeConfig):
  for mult in config.ch_mult:
    if config.ch * mult % GROUPS:
      raise ValueError(
          f"VAE width ch {config.ch} * ch_mult {mult} is not a multiple of {GROUPS}, "
          "the number of its norm groups")
