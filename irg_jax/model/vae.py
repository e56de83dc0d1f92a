"""The FLUX.1 autoencoder: pixels to latents and back (spec section 2). Frozen in training.

Everything is NHWC: pixels [B, height, width, 3] in [-1, 1], latents [B, h, w, z] with
h = height / config.downsample. GroupNorm and the middle attention see the whole picture, so
pictures of different sizes must never be padded into one batch: group them by size.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from irg_jax.config import VaeConfig

GROUPS = 32
NORM_EPS = 1e-6
# Queries of the middle attention that are scored at once: 64 MiB a picture at 1024 pixels,
# where all 16384 together would take 1 GiB.
QUERY_CHUNK = 1024


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
    x = _conv(cfg.ch, name="conv_in", **dtypes)(x)
    for i, mult in enumerate(cfg.ch_mult):
      x = DownStage(cfg.ch * mult, cfg.num_res_blocks, i + 1 < len(cfg.ch_mult),
                    name=f"down_{i}", **dtypes)(x)
    x = Middle(name="mid", **dtypes)(x)
    x = nn.swish(GroupNorm(self.param_dtype, name="norm_out")(x))
    return _conv(2 * cfg.z_channels, name="conv_out", **dtypes)(x).astype(jnp.float32)


class Decoder(nn.Module):
  """Unscaled latents [B, h, w, z] -> float32 [B, height, width, 3]."""

  config: VaeConfig
  dtype: str
  param_dtype: str

  @nn.compact
  def __call__(self, x):
    cfg, dtypes = self.config, dict(dtype=self.dtype, param_dtype=self.param_dtype)
    x = _conv(cfg.ch * cfg.ch_mult[-1], name="conv_in", **dtypes)(x)
    x = Middle(name="mid", **dtypes)(x)
    # The published names count stages by resolution, so the last one runs first.
    for i, mult in reversed(list(enumerate(cfg.ch_mult))):
      x = UpStage(cfg.ch * mult, cfg.num_res_blocks + 1, i > 0, name=f"up_{i}", **dtypes)(x)
    x = nn.swish(GroupNorm(self.param_dtype, name="norm_out")(x))
    return _conv(3, name="conv_out", **dtypes)(x).astype(jnp.float32)


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


class ResBlock(nn.Module):
  """x + conv(swish(norm(conv(swish(norm(x)))))); a 1x1 shortcut where the width changes."""

  features: int
  dtype: str
  param_dtype: str

  @nn.compact
  def __call__(self, x):
    dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    h = nn.swish(GroupNorm(self.param_dtype, name="norm1")(x))
    h = _conv(self.features, name="conv1", **dtypes)(h)
    h = nn.swish(GroupNorm(self.param_dtype, name="norm2")(h))
    h = _conv(self.features, name="conv2", **dtypes)(h)
    if x.shape[-1] != self.features:
      x = PointConv(self.features, name="shortcut", **dtypes)(x)
    return x + h


class Attention(nn.Module):
  """x + one-head attention over all positions of the picture."""

  dtype: str
  param_dtype: str

  @nn.compact
  def __call__(self, x):
    dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    b, h, w, c = x.shape
    y = GroupNorm(self.param_dtype, name="norm")(x)
    q, k, v = (PointConv(c, name=n, **dtypes)(y).reshape(b, h * w, c) for n in "qkv")
    y = attend_positions(q, k, v).reshape(b, h, w, c)
    return x + PointConv(c, name="out", **dtypes)(y)


class GroupNorm(nn.Module):
  """Group normalisation of [B, h, w, C] over picture and group, float32 statistics."""

  param_dtype: str

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
    x32 = x.astype(jnp.float32)
    mean = _group_mean(x32)
    scale = jax.lax.rsqrt(_group_mean(jnp.square(x32 - mean)) + NORM_EPS) * scale
    return (x32 * scale + (bias - mean * scale)).astype(x.dtype)


class PointConv(nn.Module):
  """A 1x1 convolution, written as the matrix product it is (XLA runs that faster on a CPU)."""

  features: int
  dtype: str
  param_dtype: str

  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (1, 1, x.shape[-1], self.features),
                        self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
    return x.astype(self.dtype) @ kernel[0, 0].astype(self.dtype) + bias.astype(self.dtype)


class UpsampleConv(nn.Module):
  """Nearest-neighbour doubling followed by a 3x3 convolution, without the repeated work.

  An output pixel of either parity sees only 2x2 input pixels, so a 2x2 convolution with four
  times the features and summed taps does the same in 4/9 of the operations.
  """

  features: int
  dtype: str
  param_dtype: str

  @nn.compact
  def __call__(self, x):
    b, h, w, c = x.shape
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, c, self.features),
                        self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
    kernel = parity_kernel(kernel.astype(jnp.float32)).astype(self.dtype)
    y = jax.lax.conv_general_dilated(
        x.astype(self.dtype), kernel, (1, 1), ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"))
    # Position (r, s) of y saw input rows r - 1, r and columns s - 1, s.
    y = y.reshape(b, h + 1, w + 1, 2, 2, self.features)
    rows = [jnp.stack([y[:, i:i + h, j:j + w, i, j] for j in (0, 1)], axis=3) for i in (0, 1)]
    return jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, -1) + bias.astype(self.dtype)


def parity_kernel(kernel):
  """The 2x2 kernels of the four output parities of doubling and convolving.

  Along an axis with taps (a, b, c), even outputs see (before, here) with taps (a, b + c) and
  odd outputs (here, after) with (a + b, c).

  Args:
    kernel: [3, 3, in, out].

  Returns:
    [2, 2, in, 4 * out], output features ordered (row parity, column parity, out).
  """
  def split(k, axis):
    a, b, c = jnp.split(k, 3, axis)
    return jnp.concatenate([a, b + c], axis), jnp.concatenate([a + b, c], axis)

  return jnp.concatenate([k for row in split(kernel, 0) for k in split(row, 1)], axis=-1)


def attend_positions(q, k, v, chunk: int = QUERY_CHUNK):
  """softmax(q k^T / sqrt(C)) v, softmax in float32, `chunk` queries at a time.

  Args:
    q, k, v: [B, P, C].

  Returns:
    [B, P, C] in v's dtype. At most B * chunk * P scores exist at once.
  """
  def attend_one(q):
    logits = jnp.einsum("bc,bpc->bp", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5)
    return jnp.einsum("bp,bpc->bc", weights.astype(v.dtype), v)

  out = jax.lax.map(attend_one, jnp.moveaxis(q, 1, 0), batch_size=min(chunk, q.shape[1]))
  return jnp.moveaxis(out, 0, 1)


def sample_latents(config: VaeConfig, mean, logvar, noise=None):
  """Scaled latents of a posterior: `scale * (mean + std * noise - shift)`.

  Args:
    mean, logvar: [B, h, w, z] from `Vae.encode`.
    noise: standard normal [B, h, w, z]; None takes the mean.
  """
  if noise is not None:
    # Untrained or damaged weights give wild variances; the published posterior clamps them.
    mean = mean + jnp.exp(0.5 * jnp.clip(logvar, -30.0, 20.0)) * noise
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
    ValueError: the tokens do not make an h x w picture.
  """
  b, length, dim = tokens.shape
  if h % patch or w % patch or length * patch * patch != h * w or dim % (patch * patch):
    raise ValueError(f"tokens {tokens.shape} do not make {h} x {w} latents in patches of {patch}")
  x = tokens.reshape(b, h // patch, w // patch, patch, patch, -1)
  return jnp.transpose(x, (0, 1, 3, 2, 4, 5)).reshape(b, h, w, -1)


def to_uint8(pixels):
  """[-1, 1] -> 0..255, clipped, and truncated as the reference does (spec section 8)."""
  return ((jnp.clip(pixels, -1.0, 1.0) * 0.5 + 0.5) * 255.0).astype(jnp.uint8)


def _conv(features: int, **kwargs):
  """A 3x3 convolution that keeps the resolution."""
  return nn.Conv(features, (3, 3), padding=1, **kwargs)


def _group_mean(x):
  """Mean of [B, h, w, C] over the picture and the channels of each group, [B, 1, 1, C]."""
  # Columns, then rows: short sums keep float32 exact enough at a million pixels.
  channel = x.mean(axis=2).mean(axis=1)
  group = channel.reshape(channel.shape[0], GROUPS, -1).mean(axis=-1)
  return jnp.repeat(group, x.shape[-1] // GROUPS, axis=-1)[:, None, None]


def _check_config(config: VaeConfig):
  for mult in config.ch_mult:
    if config.ch * mult % GROUPS:
      raise ValueError(
          f"VAE width ch {config.ch} * ch_mult {mult} is not a multiple of {GROUPS} (its norm groups)")
