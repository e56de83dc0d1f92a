"""The FLUX.1 autoencoder, frozen in training (docs/spec.md, section 2).

All arrays are NHWC: pixels [B, Y, X, 3] in [-1, 1], latents [B, Y, X, z] of a resolution that is
lower by the factor `config.downsample`. Group norms and the middle attention cover the whole image,
so images of different sizes must not be padded into one batch: group them by size.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from irg_jax.config import ModelConfig, VaeConfig
from irg_jax.model.layers import GroupNorm

GROUPS, NORM_EPS = 32, 1e-6
group_norm = functools.partial(GroupNorm, GROUPS, NORM_EPS)
conv3x3 = functools.partial(nn.Conv, kernel_size=(3, 3), padding=1)
QUERY_CHUNK = 1024  # of the middle attention: 64 MiB of scores, not 1 GiB, at 1024 pixels a side


class Vae(nn.Module):
  """Encoder and decoder; use as `Vae(config).apply({"params": p}, x, method="encode")`.

  Attributes:
    config: sizes, scale and shift of the latents.
    dtype: dtype of convolutions and activations. Norm statistics, softmax and outputs are float32.
    param_dtype: dtype of freshly initialised parameters.
  """

  config: VaeConfig
  dtype: str = "float32"
  param_dtype: str = "float32"

  def setup(self):
    for mult in self.config.ch_mult:
      if self.config.ch * mult % GROUPS:
        raise ValueError(f"VAE width ch {self.config.ch} * ch_mult {mult} is not a multiple of "
                         f"{GROUPS}, the number of its norm groups")
    self.encoder, self.decoder = (
        part(self.config, self.dtype, self.param_dtype) for part in (Encoder, Decoder))

  def encode(self, pixels_BYXC):
    """Moments (mean, logvar) of pixels' posterior for `sample_latents`, unscaled, float32.

    Float [B, height, width, 3] in [-1, 1] -> [B, Y, X, z] each. ValueError: another shape, or
    sides that are no multiples of `config.downsample`.
    """
    stride = self.config.downsample
    if pixels_BYXC.ndim != 4 or pixels_BYXC.shape[-1] != 3:
      raise ValueError(f"pixels {pixels_BYXC.shape}: want [batch, height, width, 3]")
    if pixels_BYXC.shape[1] % stride or pixels_BYXC.shape[2] % stride:
      raise ValueError(f"pixels {pixels_BYXC.shape}: height and width must be multiples of "
                       f"{stride}; resize first")
    return tuple(jnp.split(self.encoder(pixels_BYXC), 2, axis=-1))

  def decode(self, latents_BYXC):
    """Pixels of scaled latents [B, Y, X, z], float32 [B, height, width, 3], not clipped.

    ValueError: another shape.
    """
    z = self.config.z_channels
    if latents_BYXC.ndim != 4 or latents_BYXC.shape[-1] != z:
      raise ValueError(f"latents {latents_BYXC.shape}: want [batch, h, w, {z}]; unpatchify first")
    latents_BYXC = latents_BYXC.astype(jnp.float32)
    return self.decoder(latents_BYXC / self.config.scale_factor + self.config.shift_factor)

  def __call__(self, pixels_BYXC):
    """Reconstruction through the mean; `init` with it creates all parameters."""
    return self.decode(sample_latents(self.config, *self.encode(pixels_BYXC)))


class Encoder(nn.Module):
  """Pixels [B, height, width, 3] -> moments, float32 [B, Y, X, 2 * z]."""

  config: VaeConfig
  dtype: str
  param_dtype: str

  @nn.compact
  def __call__(self, x_BYXC):
    c, dtypes = self.config, dict(dtype=self.dtype, param_dtype=self.param_dtype)
    x_BYXC = conv3x3(c.ch, name="conv_in", **dtypes)(x_BYXC)
    for i, mult in enumerate(c.ch_mult):
      resample = "downsample" if i + 1 < len(c.ch_mult) else ""
      x_BYXC = Stage(c.ch * mult, c.num_res_blocks, resample, name=f"down_{i}", **dtypes)(x_BYXC)
    x_BYXC = Middle(name="mid", **dtypes)(x_BYXC)
    x_BYXC = nn.swish(group_norm(self.param_dtype, name="norm_out")(x_BYXC))
    return conv3x3(2 * c.z_channels, name="conv_out", **dtypes)(x_BYXC).astype(jnp.float32)


class Decoder(nn.Module):
  """Unscaled latents [B, Y, X, z] -> pixels, float32 [B, height, width, 3]."""

  config: VaeConfig
  dtype: str
  param_dtype: str

  @nn.compact
  def __call__(self, x_BYXC):
    c, dtypes = self.config, dict(dtype=self.dtype, param_dtype=self.param_dtype)
    x_BYXC = conv3x3(c.ch * c.ch_mult[-1], name="conv_in", **dtypes)(x_BYXC)
    x_BYXC = Middle(name="mid", **dtypes)(x_BYXC)
    # The published names count stages from the highest resolution, so the last one runs first.
    for i, mult in reversed(list(enumerate(c.ch_mult))):
      resample = "upsample" if i else ""
      x_BYXC = Stage(c.ch * mult, c.num_res_blocks + 1, resample, name=f"up_{i}", **dtypes)(x_BYXC)
    x_BYXC = nn.swish(group_norm(self.param_dtype, name="norm_out")(x_BYXC))
    return conv3x3(3, name="conv_out", **dtypes)(x_BYXC).astype(jnp.float32)


class Typed(nn.Module, kw_only=True):
  """A part of the encoder and decoder: hands its dtypes on as `**self.dtypes`."""

  dtype: str
  param_dtype: str

  @property
  def dtypes(self):
    return {"dtype": self.dtype, "param_dtype": self.param_dtype}

  def kernel_and_bias(self, *shape):
    """Parameters of a convolution, with a kernel of the given shape [Y, X, in, out]."""
    return (self.param("kernel", nn.initializers.lecun_normal(), shape, self.param_dtype),
            self.param("bias", nn.initializers.zeros, shape[-1:], self.param_dtype))


class Stage(Typed):
  """Residual blocks at one resolution, then half or twice the resolution."""

  features: int
  blocks: int
  resample: str  # "downsample", "upsample", or "" for a stage that keeps its resolution

  @nn.compact
  def __call__(self, x_BYXC):
    for j in range(self.blocks):
      x_BYXC = ResBlock(self.features, name=f"block_{j}", **self.dtypes)(x_BYXC)
    if self.resample == "upsample":
      x_BYXC = UpsampleConv(self.features, name="upsample", **self.dtypes)(x_BYXC)
    if self.resample == "downsample":
      x_BYXC = nn.Conv(self.features, (3, 3), strides=2, padding=((0, 1), (0, 1)),
                       name="downsample", **self.dtypes)(x_BYXC)
    return x_BYXC


class Middle(Typed):
  """Residual block, attention over all positions, residual block, at the lowest resolution."""

  @nn.compact
  def __call__(self, x_BYXC):
    features, dtypes = x_BYXC.shape[-1], self.dtypes
    x_BYXC = ResBlock(features, name="block_1", **dtypes)(x_BYXC)
    x_BYXC = Attention(name="attn_1", **dtypes)(x_BYXC)
    return ResBlock(features, name="block_2", **dtypes)(x_BYXC)


class ResBlock(Typed):
  """x + conv(swish(norm(conv(swish(norm(x)))))); a 1x1 shortcut where the width changes."""

  features: int

  @nn.compact
  def __call__(self, x_BYXC):
    h_BYXC = nn.swish(group_norm(self.param_dtype, name="norm1")(x_BYXC))
    h_BYXC = conv3x3(self.features, name="conv1", **self.dtypes)(h_BYXC)
    h_BYXC = nn.swish(group_norm(self.param_dtype, name="norm2")(h_BYXC))
    h_BYXC = conv3x3(self.features, name="conv2", **self.dtypes)(h_BYXC)
    if x_BYXC.shape[-1] != self.features:
      x_BYXC = PointConv(self.features, name="shortcut", **self.dtypes)(x_BYXC)
    return x_BYXC + h_BYXC


class Attention(Typed):
  """x + single-head attention over all positions of the image."""

  @nn.compact
  def __call__(self, x_BYXC):
    _, Y, X, C = x_BYXC.shape
    h_BYXC = group_norm(self.param_dtype, name="norm")(x_BYXC)
    q_BPC, k_BPC, v_BPC = (rearrange(PointConv(C, name=name, **self.dtypes)(h_BYXC),
                                     "b y x c -> b (y x) c") for name in "qkv")
    h_BPC = attend_positions(q_BPC, k_BPC, v_BPC)
    h_BYXC = rearrange(h_BPC, "b (y x) c -> b y x c", y=Y, x=X)
    return x_BYXC + PointConv(C, name="out", **self.dtypes)(h_BYXC)


class PointConv(Typed):
  """A 1x1 convolution, written as a matrix product (faster on a CPU)."""

  features: int

  @nn.compact
  def __call__(self, x_BYXC):
    kernel, bias = self.kernel_and_bias(1, 1, x_BYXC.shape[-1], self.features)
    return x_BYXC.astype(self.dtype) @ kernel[0, 0].astype(self.dtype) + bias.astype(self.dtype)


class UpsampleConv(Typed):
  """Nearest-neighbour doubling followed by a 3x3 convolution."""

  features: int

  @nn.compact
  def __call__(self, x_BYXC):
    kernel, bias = self.kernel_and_bias(3, 3, x_BYXC.shape[-1], self.features)
    return upsample_conv(x_BYXC.astype(self.dtype), kernel) + bias.astype(self.dtype)


@jax.custom_vjp
def upsample_conv(x_BYXC, kernel):
  """Doubles [B, Y, X, C] and convolves with [3, 3, C, F]: [B, 2Y, 2X, F] in x's dtype.

  In 4/9 of the operations: an output pixel of either parity sees only 2x2 input pixels, so a 2x2
  convolution with summed taps and four times the features computes all four parities.
  """
  _, Y, X, _ = x_BYXC.shape
  y_BYXF = _conv(x_BYXC, parity_kernel(kernel.astype(jnp.float32)), ((1, 1), (1, 1)))
  y_BYX22F = rearrange(y_BYXF, "b y x (i j f) -> b y x i j f", i=2, j=2)
  # The windows of y start one pixel early: at (y, x) they cover rows y - 1 and y of the input.
  rows = [jnp.stack([y_BYX22F[:, i:i + Y, j:j + X, i, j] for j in (0, 1)], axis=3) for i in (0, 1)]
  return rearrange(jnp.stack(rows, axis=2), "b y i x j f -> b (y i) (x j) f")


def _plain_upsample_conv(x_BYXC, kernel):
  return _conv(repeat(x_BYXC, "b y x c -> b (y i) (x j) c", i=2, j=2), kernel, "SAME")


def _conv(x_BYXC, kernel, padding):
  return jax.lax.conv_general_dilated(x_BYXC, kernel.astype(x_BYXC.dtype), (1, 1), padding,
                                      dimension_numbers=("NHWC", "HWIO", "NHWC"))


# The gradient of the plain form is the same, and XLA runs it far faster on a CPU.
upsample_conv.defvjp(
    lambda x_BYXC, kernel: (upsample_conv(x_BYXC, kernel), (x_BYXC, kernel)),
    lambda saved, cotangent: jax.vjp(_plain_upsample_conv, *saved)[1](cotangent))


def parity_kernel(kernel):
  """2x2 kernels for the four output parities of doubling and convolving.

  Along an axis with taps (a, b, c), even outputs see (before, here) with taps (a, b + c), odd
  outputs (here, after) with taps (a + b, c).

  [3, 3, in, out] -> [2, 2, in, 4 * out], features ordered (row parity, column parity, out).
  """
  def split(k, axis):
    a, b, c = jnp.split(k, 3, axis)
    return jnp.concatenate([a, b + c], axis), jnp.concatenate([a + b, c], axis)

  return jnp.concatenate([k for row in split(kernel, 0) for k in split(row, 1)], axis=-1)


def attend_positions(q_BPC, k_BPC, v_BPC, chunk: int = QUERY_CHUNK):
  """softmax(q k^T / sqrt(C)) v, [B, P, C] in v's dtype, with float32 softmax.

  It takes `chunk` queries at a time: at most B * chunk * P scores exist at once.
  """
  def one_query(q_BC):
    logits_BP = jnp.einsum("bc,bpc->bp", q_BC, k_BPC, preferred_element_type=jnp.float32)
    weights_BP = jax.nn.softmax(logits_BP * q_BC.shape[-1] ** -0.5)
    return jnp.einsum("bp,bpc->bc", weights_BP.astype(v_BPC.dtype), v_BPC)

  q_PBC = rearrange(q_BPC, "b p c -> p b c")
  out_PBC = jax.lax.map(one_query, q_PBC, batch_size=min(chunk, len(q_PBC)))
  return rearrange(out_PBC, "p b c -> b p c")


def sample_latents(config: VaeConfig, mean_BYXC, logvar_BYXC, noise_BYXC=None):
  """Scaled latents of a posterior from `Vae.encode`: `scale * (mean + std * noise - shift)`.

  Without `noise_BYXC`, standard normal, it takes the mean.
  """
  if noise_BYXC is not None:
    mean_BYXC = mean_BYXC + jnp.exp(0.5 * logvar_BYXC) * noise_BYXC
  return config.scale_factor * (mean_BYXC - config.shift_factor)


def patchify_latents(latents_BYXC, patch: int):
  """Latents [B, Y, X, z] -> tokens [B, Y/p * X/p, p * p * z], flattened (row, column, channel).

  ValueError: a side that is no multiple of `patch`.
  """
  _, Y, X, _ = latents_BYXC.shape
  if Y % patch or X % patch:
    raise ValueError(
        f"latents {latents_BYXC.shape}: height and width must be multiples of {patch}")
  return rearrange(latents_BYXC, "b (y i) (x j) c -> b (y x) (i j c)", i=patch, j=patch)


def unpatchify_latents(tokens_BPC, h: int, w: int, patch: int):
  """The inverse of `patchify_latents`; h and w count latents. ValueError: tokens do not fit."""
  _, P, C = tokens_BPC.shape
  if h % patch or w % patch or P * patch * patch != h * w or C % (patch * patch):
    raise ValueError(
        f"tokens {tokens_BPC.shape} do not make {h} x {w} latents in patches of {patch}")
  return rearrange(tokens_BPC, "b (y x) (i j c) -> b (y i) (x j) c", y=h // patch, i=patch, j=patch)


@functools.partial(jax.jit, static_argnums=0)
def encode_levels(model: ModelConfig, params, levels_BYXC):
  """Posterior moments of 8-bit images, uint8 [B, height, width, 3] -> float32 [B, 2, Y, X, z]."""
  pixels_BYXC = (levels_BYXC.astype(jnp.float32) / 255 - 0.5) / 0.5  # as `images.to_pixels`
  vae = Vae(model.vae, model.dtype)
  return jnp.stack(vae.apply({"params": params}, pixels_BYXC, method="encode"), 1)


def to_uint8(pixels):
  """[-1, 1] to 0..255, clipped, then truncated like the reference (docs/spec.md, section 8)."""
  return ((jnp.clip(pixels, -1.0, 1.0) * 0.5 + 0.5) * 255.0).astype(jnp.uint8)
