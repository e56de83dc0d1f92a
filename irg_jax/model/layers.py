"""Building blocks of the models: linear layer, norms, position embeddings, layer stack."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import reduce, repeat

from irg_jax.config import ModelConfig
from irg_jax.model.kernels import cpu
from irg_jax.model.kernels.blockwise import ATTENTION_OUTPUTS


SCALE = "kernel_scale"  # name of the scales of an int8 kernel


class Dense(nn.Module):
  """A linear layer over the last axis.

  A kernel that is int8 has a float32 scale for each output beside it, `SCALE` [F]. The product is
  that with the whole numbers, which each dtype holds exactly; scale and bias follow in float32. So
  only one layer's matrix at a time is in the compute dtype.
  """

  features: int
  use_bias: bool
  dtype: str
  param_dtype: str

  @nn.compact
  def __call__(self, x):
    bias_F = None
    kernel_DF = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features),
                           self.param_dtype)
    if self.use_bias:
      bias_F = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
    scale_F = self.get_variable("params", SCALE)
    x, kernel_DF = (y.astype(self.dtype) for y in (x, kernel_DF))
    y = cpu.dot_general(x, kernel_DF, (((x.ndim - 1,), (0,)), ((), ())))
    if scale_F is not None:
      y = y.astype(jnp.float32) * scale_F
    if bias_F is not None:
      y += bias_F.astype(y.dtype)
    return y.astype(self.dtype)


def dense(config: ModelConfig, features: int, bias: bool = True, name: str | None = None):
  """A linear layer in the dtypes of the config."""
  return Dense(features, bias, config.dtype, config.param_dtype, name=name)


def rms_norm(config: ModelConfig, name: str | None = None):
  """RMS norm over the last axis, computed in float32, returned in the compute dtype."""
  return nn.RMSNorm(epsilon=config.llm.norm_eps, dtype=config.dtype,
                    param_dtype=config.param_dtype, name=name)


class GroupNorm(nn.Module):
  """Group norm over the image and each group of channels of [B, Y, X, C]; float32 statistics.

  `nn.GroupNorm` is as exact, but decoding an image with it takes a fifth longer on a CPU.
  """

  groups: int
  eps: float
  param_dtype: str

  @nn.compact
  def __call__(self, x_BYXC):
    scale_C = self.param("scale", nn.initializers.ones, x_BYXC.shape[-1:], self.param_dtype)
    bias_C = self.param("bias", nn.initializers.zeros, x_BYXC.shape[-1:], self.param_dtype)
    x32_BYXC = x_BYXC.astype(jnp.float32)
    centred_BYXC = x32_BYXC - _group_mean(x32_BYXC, self.groups)
    inverse_B11C = jax.lax.rsqrt(_group_mean(jnp.square(centred_BYXC), self.groups) + self.eps)
    return (centred_BYXC * (inverse_B11C * scale_C) + bias_C).astype(x_BYXC.dtype)


def _group_mean(x_BYXC, groups):
  """Mean over the image and the channels of each group, [B, 1, 1, C]."""
  # Columns, then rows: short sums keep float32 exact at a million pixels.
  mean_BC = reduce(reduce(x_BYXC, "b y x c -> b y c", "mean"), "b y c -> b c", "mean")
  mean_BG = reduce(mean_BC, "b (g c) -> b g", "mean", g=groups)
  return repeat(mean_BG, "b g -> b 1 1 (g c)", c=x_BYXC.shape[-1] // groups)


def rope_table(position_T, head_dim: int, theta: float):
  """(cos, sin) of the rotary embedding for `apply_rope`, float32 [..., T, head_dim].

  The first half of sin is negated. Positions, int [..., T], may repeat (all tokens of an image
  share one); head_dim is even.
  """
  frequency_H = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  angle_TH = position_T[..., None].astype(jnp.float32) * frequency_H
  cos_TH, sin_TH = jnp.cos(angle_TH), jnp.sin(angle_TH)
  return jnp.concatenate([cos_TH, cos_TH], -1), jnp.concatenate([-sin_TH, sin_TH], -1)


def apply_rope(x_TNH, cos_TH, sin_TH):
  """Rotates the pairs (i, i + H/2) of x [..., T, N, H] (rotate-half); in x's dtype."""
  x = x_TNH.astype(jnp.float32)
  other_half_TNH = jnp.roll(x, x.shape[-1] // 2, axis=-1)
  rotated_TNH = x * cos_TH[..., None, :] + other_half_TNH * sin_TH[..., None, :]
  return rotated_TNH.astype(x_TNH.dtype)


def timestep_features(t, dim: int = 256, max_period: float = 10000.0):
  """Sinusoidal features of flow time t in [0, 1], cosines first: float32 [..., dim]."""
  frequency_C = jnp.exp(
      -jnp.log(max_period) * jnp.arange(dim // 2, dtype=jnp.float32) / (dim // 2))
  angle_C = t.astype(jnp.float32)[..., None] * frequency_C
  return jnp.concatenate([jnp.cos(angle_C), jnp.sin(angle_C)], -1)


def sincos_2d(cell, grid_size: int, width: int):
  """Fixed 2-D position embedding of the cell `row * grid_size + column` (docs/spec.md, section 2).

  Int [...] -> float32 [..., width]. The first half of the width encodes the column, the second
  half the row; each half is sines, then cosines. Without a table there is none to store or shard.
  """
  frequency_D = 10000.0 ** (-jnp.arange(width // 4, dtype=jnp.float32) / (width // 4))
  column_D = (cell % grid_size)[..., None] * frequency_D
  row_D = (cell // grid_size)[..., None] * frequency_D
  return jnp.concatenate(
      [jnp.sin(column_D), jnp.cos(column_D), jnp.sin(row_D), jnp.cos(row_D)], -1)


def scan_layers(layer_cls, length: int, remat: str, in_axes, loop: bool, **kwargs):
  """A stack of `length` identical layers with stacked parameters [L, ...], compiled once.

  Args:
    layer_cls: Linen module with `__call__(carry, *args) -> (carry, out)`.
    remat: see `ModelConfig.remat`.
    in_axes: for each of `args`, 0 (one slice a layer) or `nn.broadcast`.
    loop: whether the stack runs many times on the same parameters, see `cpu.unroll`.
    **kwargs: fields of the layer.

  ValueError: unknown remat.
  """
  unroll = cpu.unroll(length) if loop else 1
  if remat != "none":
    policies = {"full": None,
                "attention": jax.checkpoint_policies.save_only_these_names(*ATTENTION_OUTPUTS)}
    policy = policies.get(remat, getattr(jax.checkpoint_policies, remat, None))
    if policy is None and remat != "full":
      raise ValueError(f'unknown remat {remat!r}: not "none", "full", "attention" or a name in '
                       "jax.checkpoint_policies")
    # A loop already keeps XLA from merging the recomputation with the forward pass.
    layer_cls = nn.remat(layer_cls, prevent_cse=unroll > 1, policy=policy)
  return nn.scan(layer_cls, variable_axes={"params": 0}, split_rngs={"params": True},
                 in_axes=in_axes, length=length, unroll=unroll,
                 check_constancy_invariants=False)(name="layers", **kwargs)
