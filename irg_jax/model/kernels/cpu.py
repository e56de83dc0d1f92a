"""Forms of the model's operations that XLA's CPU backend runs fast; no-ops on other devices.

They matter for a program on a single CPU device, where a token or a training step otherwise
spends much of its time on copies of weights.
"""

import functools

import jax
import jax.numpy as jnp
from einops import pack, rearrange, unpack
from jax import lax

from irg_jax.sharding import platform


def on_lone_cpu() -> bool:
  """Whether the program is traced for a single CPU device."""
  return jax.sharding.get_abstract_mesh().size <= 1 and platform() == "cpu"


def unroll(length: int) -> int:
  """Number of layers of a stack to unroll: all on a CPU, where `pinned` then applies."""
  return max(1, length) if on_lone_cpu() else 1


def layers(x_L):
  """A stack [L, ...] as a list: of its layers, [1, ...] each, on a CPU, else of itself.

  For keys and values that a loop over tokens writes: the backend copies each layer's slice of a
  stack in every turn. XLA sees through the concatenation that makes the list a stack again.
  """
  return jnp.split(x_L, unroll(len(x_L)))


def after(index, token_B):
  """`index`, on a CPU as a function of the tokens, of which none is negative.

  So what is written there waits for the tokens, and for all that was read to find them. XLA copies
  a whole array that may be written before it is read.
  """
  return index + jnp.minimum(jnp.min(token_B), 0) if on_lone_cpu() else index


def pinned(tree):
  """Slices of stacked weights or caches, computed once.

  In a loop over tokens or flow steps, the backend copies each layer's slice in every turn. XLA
  moves an optimization barrier out of the loop, and the slices that feed it, but not a slice
  that feeds a product.
  """
  return lax.optimization_barrier(tree) if on_lone_cpu() else tree


def dot_general(x, kernel, dimension_numbers, **kwargs):
  """`lax.dot_general` of a linear layer: [..., D] times [D, F]."""
  product = lambda x, kernel: lax.dot_general(x, kernel, dimension_numbers, **kwargs)
  return _product(product, x, pinned(kernel)) if on_lone_cpu() else product(x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(product, x, kernel):
  return product(x, kernel)


def _backward(product, residuals, dy):
  # The kernel's gradient contracts the token axes. Without the barriers, XLA fuses whatever
  # made x and dy into loops that write the transposes, which cost more than the product.
  x, kernel_DF = residuals
  x_TD, shape = pack([x], "* d")
  dy_TF, _ = pack([dy], "* f")
  x_TD, dy_TF = lax.optimization_barrier((x_TD, dy_TF))
  x_DT = lax.optimization_barrier(rearrange(x_TD, "t d -> d t"))
  dx, = unpack(dy_TF @ rearrange(kernel_DF, "d f -> f d"), shape, "* d")
  return dx, x_DT @ dy_TF


_product.defvjp(lambda product, x, kernel: (product(x, kernel), (x, kernel)), _backward)
