"""Small pieces that every part of the model shares.

Shape letters, used as suffixes in the whole of `irg_jax/model`:
  B rows, R rows times guidance views, T tokens of a row, S cache slots, U tokens of the
  understanding buffer, G tokens of the generation buffer, P patches, D width, N heads,
  K key-value heads, H head dim, F MLP width, V vocabulary.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from irg_jax.config import ModelConfig
from irg_jax.sharding import on_lone_cpu


def dense(config: ModelConfig, features: int, bias: bool = True, name: str | None = None):
  """A linear layer over the last axis, in the dtypes of the config."""
  return nn.Dense(features, use_bias=bias, dtype=config.dtype, param_dtype=config.param_dtype,
                  dot_general=_dot_general, name=name)


def _dot_general(x, kernel, dimension_numbers, **kwargs):
  """`lax.dot_general`; on a lone CPU with a backward pass that XLA's CPU backend runs well."""
  product = lambda x, kernel: lax.dot_general(x, kernel, dimension_numbers, **kwargs)
  return _cpu_product(product, x, kernel) if on_lone_cpu() else product(x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cpu_product(product, x, kernel):
  return product(x, kernel)


def _cpu_product_backward(product, residuals, dy):
  # The kernel's gradient contracts the axes of the tokens. Left alone, XLA fuses whatever made
  # x and dy into loops that write their transposes, and those cost more than the product.
  x, kernel = residuals
  rows, dy_rows = lax.optimization_barrier(
      (x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])))
  columns = lax.optimization_barrier(rows.T)
  return (dy_rows @ kernel.T).reshape(x.shape), columns @ dy_rows


_cpu_product.defvjp(lambda product, x, kernel: (product(x, kernel), (x, kernel)),
                    _cpu_product_backward)


class RMSNorm(nn.Module):
  """x / rms(x) * scale over the last axis, computed in float32, returned in x's dtype."""

  eps: float
  param_dtype: str = "float32"

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
    return (x32 * scale.astype(jnp.float32)).astype(x.dtype)


def rope_table(position, head_dim: int, theta: float):
  """Cosines and sines of the rotary embedding, ready for `apply_rope`.

  Args:
    position: int [..., T]; positions may repeat (all tokens of an image share one).
    head_dim: even.

  Returns:
    (cos, sin), float32 [..., T, head_dim]; the first half of sin is negated.
  """
  frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  angle = position[..., None].astype(jnp.float32) * frequency
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  return jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)


def apply_rope(x_TNH, cos, sin):
  """Rotates pairs (i, i + H/2), the rotate-half convention. x [..., T, N, H]."""
  x = x_TNH.astype(jnp.float32)
  other_half = jnp.roll(x, x.shape[-1] // 2, axis=-1)
  return (x * cos[..., None, :] + other_half * sin[..., None, :]).astype(x_TNH.dtype)


def timestep_features(t, dim: int = 256, max_period: float = 10000.0):
  """Sinusoidal features of flow time t in [0, 1], cosines first. float32 [..., dim]."""
  frequency = jnp.exp(-jnp.log(max_period) * jnp.arange(dim // 2, dtype=jnp.float32) / (dim // 2))
  angle = t.astype(jnp.float32)[..., None] * frequency
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


def sincos_2d(index, grid_size: int, width: int):
  """Fixed 2-D position embedding of cell `row * grid_size + column`.

  The first half of the width encodes the column, the second half the row; each half is
  sines, then cosines (spec section 2). Computed from the index, so that no table has to be
  stored, sharded or kept from training.

  Args:
    index: int [...].

  Returns:
    float32 [..., width].
  """
  frequency = 10000.0 ** (-jnp.arange(width // 4, dtype=jnp.float32) / (width // 4))
  column = (index % grid_size)[..., None] * frequency
  row = (index // grid_size)[..., None] * frequency
  return jnp.concatenate([jnp.sin(column), jnp.cos(column), jnp.sin(row), jnp.cos(row)], -1)


def scan_layers(layer_cls, length: int, remat: str, in_axes, **kwargs):
  """A stack of `length` identical layers, compiled once.

  Args:
    layer_cls: Linen module with `__call__(carry, *args) -> (carry, out)`.
    remat: see `ModelConfig.remat`.
    in_axes: for each of `args`, 0 (a slice for each layer) or `nn.broadcast`.
    **kwargs: fields of the layer.
  """
  if remat != "none":
    policy = None if remat == "full" else getattr(jax.checkpoint_policies, remat, None)
    if policy is None and remat != "full":
      raise ValueError(f'unknown remat {remat!r}: not "none", "full" or a name in '
                       "jax.checkpoint_policies")
    layer_cls = nn.remat(layer_cls, prevent_cse=False, policy=policy)
  return nn.scan(
      layer_cls, variable_axes={"params": 0}, split_rngs={"params": True},
      in_axes=in_axes, length=length)(name="layers", **kwargs)
