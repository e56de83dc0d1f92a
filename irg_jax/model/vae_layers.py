"""The pieces of the autoencoder: norm, convolutions, residual block, attention. NHWC."""

import flax.linen as nn
import jax
import jax.numpy as jnp

GROUPS = 32
NORM_EPS = 1e-6
# Queries of the middle attention that are scored at once: 64 MiB an image at 1024 pixels,
# where all 16384 together would take 1 GiB.
QUERY_CHUNK = 1024


class ResBlock(nn.Module):
  """x + conv(swish(norm(conv(swish(norm(x)))))); a 1x1 shortcut where the width changes."""

  features: int
  dtype: str
  param_dtype: str

  @nn.compact
  def __call__(self, x):
    dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    h = nn.swish(GroupNorm(self.param_dtype, name="norm1")(x))
    h = conv3x3(self.features, name="conv1", **dtypes)(h)
    h = nn.swish(GroupNorm(self.param_dtype, name="norm2")(h))
    h = conv3x3(self.features, name="conv2", **dtypes)(h)
    if x.shape[-1] != self.features:
      x = PointConv(self.features, name="shortcut", **dtypes)(x)
    return x + h


class Attention(nn.Module):
  """x + one-head attention over all positions of the image."""

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
  """Group normalisation of [B, h, w, C] over image and group, float32 statistics."""

  param_dtype: str

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
    x32 = x.astype(jnp.float32)
    mean = _group_mean(x32)
    inverse = jax.lax.rsqrt(_group_mean(jnp.square(x32 - mean)) + NORM_EPS)
    return ((x32 - mean) * (inverse * scale) + bias).astype(x.dtype)


class PointConv(nn.Module):
  """A 1x1 convolution, written as the matrix product it is (XLA runs that faster on a CPU)."""

  features: int
  dtype: str
  param_dtype: str

  @nn.compact
  def __call__(self, x):
    shape = (1, 1, x.shape[-1], self.features)
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
    return x.astype(self.dtype) @ kernel[0, 0].astype(self.dtype) + bias.astype(self.dtype)


class UpsampleConv(nn.Module):
  """Nearest-neighbour doubling followed by a 3x3 convolution."""

  features: int
  dtype: str
  param_dtype: str

  @nn.compact
  def __call__(self, x):
    shape = (3, 3, x.shape[-1], self.features)
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
    return upsample_conv(x.astype(self.dtype), kernel) + bias.astype(self.dtype)


@jax.custom_vjp
def upsample_conv(x, kernel):
  """Doubles [B, h, w, C] and convolves with [3, 3, C, F], without the repeated work.

  An output pixel of either parity sees only 2x2 input pixels, so a 2x2 convolution with four
  times the features and summed taps does the same in 4/9 of the operations.

  Returns:
    [B, 2h, 2w, F] in x's dtype.
  """
  b, h, w, _ = x.shape
  y = jax.lax.conv_general_dilated(
      x, parity_kernel(kernel.astype(jnp.float32)).astype(x.dtype), (1, 1), ((1, 1), (1, 1)),
      dimension_numbers=("NHWC", "HWIO", "NHWC"))
  # Position (r, s) of y saw input rows r - 1, r and columns s - 1, s.
  y = y.reshape(b, h + 1, w + 1, 2, 2, -1)
  rows = [jnp.stack([y[:, i:i + h, j:j + w, i, j] for j in (0, 1)], axis=3) for i in (0, 1)]
  return jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, -1)


def _upsample_conv_plainly(x, kernel):
  x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
  return jax.lax.conv_general_dilated(x, kernel.astype(x.dtype), (1, 1), "SAME",
                                      dimension_numbers=("NHWC", "HWIO", "NHWC"))


# The gradient of the plain form is the same, and XLA runs it far faster on a CPU.
upsample_conv.defvjp(
    lambda x, kernel: (upsample_conv(x, kernel), (x, kernel)),
    lambda saved, cotangent: jax.vjp(_upsample_conv_plainly, *saved)[1](cotangent))


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


def conv3x3(features: int, **kwargs):
  """A 3x3 convolution that keeps the resolution."""
  return nn.Conv(features, (3, 3), padding=1, **kwargs)


def _group_mean(x):
  """Mean of [B, h, w, C] over the image and the channels of each group, [B, 1, 1, C]."""
  # Columns, then rows: short sums keep float32 exact enough at a million pixels.
  channel = x.mean(axis=2).mean(axis=1)
  group = channel.reshape(channel.shape[0], GROUPS, -1).mean(axis=-1)
  return jnp.repeat(group, x.shape[-1] // GROUPS, axis=-1)[:, None, None]
