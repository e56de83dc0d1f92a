"""int8 weights for generation: matrices of layers as whole numbers with a scale for each output.

A kernel W [L, in, out] is stored as Q in int8, -127 to 127, and float32 scales s [L, out], with
W = Q * s and s = max |W| / 127 over the inputs. Norms, embeddings, heads, biases and the VAE stay
as they are. `model.layers.Dense` computes with them. Parameters are quantized one by one as they
are read, so that the whole model never exists in both forms.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from irg_jax.weights import lora, names
from irg_jax.weights.names import CheckpointError
from irg_jax.weights.safetensors import Tensor

LARGEST = 127
_TINY = 1e-30  # a column of smaller numbers becomes zero


@dataclasses.dataclass(frozen=True)
class Form:
  """The form that each parameter takes as it is read.

  Attributes:
    weights: "int8": matrices of layers are quantized; "float": int8 ones are multiplied by their
      scales; None: as they are stored.
    merges: (adapters, their scale), merged in this order, in float.
  """

  weights: str | None = None
  merges: tuple[tuple[dict, float], ...] = ()

  def __post_init__(self):
    if self.weights not in (None, "int8", "float"):
      raise ValueError(f"weights {self.weights!r}: must be int8, float or None")

  def merging(self, adapters: dict, scale: float) -> "Form":
    """The same with one merge more, the last one."""
    return dataclasses.replace(self, merges=(*self.merges, (adapters, scale)))

  def quantizes(self, path: str, was_int8: bool) -> bool:
    """Whether a parameter becomes int8."""
    return names.may_be_int8(path) and (
        self.weights == "int8" or was_int8 and self.weights is None)

  def keeps(self, path: str, was_int8: bool) -> bool:
    """Whether a parameter is int8 already and stays as it is."""
    return (self.quantizes(path, was_int8) and was_int8
            and not any(lora.has(adapters, path) for adapters, _ in self.merges))

  def finish(self, path: str, x, was_int8: bool = False) -> dict:
    """{path: array} of a parameter that was read as a float array."""
    for adapters, scale in self.merges:
      x = lora.merge_one(path, x, adapters, scale)
    return dict(zip(paths(path), quantize(x))) if self.quantizes(path, was_int8) else {path: x}


def paths(path: str) -> tuple[str, str]:
  """Paths of an int8 matrix and of its scales."""
  return path, f"{path}_scale"


def quantize(kernel_LDF) -> tuple[jax.Array, jax.Array]:
  """(int8 [L, D, F], float32 scales [L, F]) of a kernel, on its devices."""
  return _quantize_on(kernel_LDF.sharding)(kernel_LDF)


def dequantize(kernel_LDF, scale_LF, dtype) -> jax.Array:
  """The kernel in a float dtype, on the devices of the int8 one."""
  return _dequantize_on(kernel_LDF.sharding, np.dtype(dtype))(kernel_LDF, scale_LF)


def scale_sharding(sharding):
  """The sharding of the scales [L, F] of a kernel [L, D, F] with the given one."""
  if not isinstance(sharding, NamedSharding):
    return sharding
  layers, _, outputs = (*sharding.spec, None, None, None)[:3]
  return NamedSharding(sharding.mesh, PartitionSpec(layers, outputs))


def read_scales(tensors: list[Tensor], sharding) -> jax.Array:
  """The scales of a stack of int8 tensors of safetensors files, float32 [L, F].

  `sharding` is the kernel's, None: the default device. CheckpointError as of `check_scales`.
  """
  for t in tensors:
    check_scales(t.scale.map().astype(np.float32), f"{t.scale.path}: {t.scale.key}")
  scale_LF = np.stack([np.broadcast_to(t.scale.map().astype(np.float32).reshape(-1), t.shape[:1])
                       for t in tensors])
  if sharding is None:
    return jax.device_put(scale_LF)
  return jax.make_array_from_callback(scale_LF.shape, scale_sharding(sharding),
                                      lambda index: scale_LF[index])


def check_scales(scales, where: str) -> None:
  """Raises CheckpointError, which begins with `where`, unless all scales are above zero."""
  good = np.isfinite(scales) & (scales > 0)
  if not good.all():
    raise CheckpointError(f"{where} has a scale of {scales[~good].reshape(-1)[0]}; scales of int8 "
                          "weights are above 0: the file is damaged, convert the weights again")


@functools.cache
def _quantize_on(sharding):
  def layer(kernel_DF):
    x = kernel_DF.astype(jnp.float32)
    most_F = jnp.max(jnp.abs(x), axis=0)
    scale_F = jnp.where(most_F > _TINY, most_F / LARGEST, 1.0)
    return jnp.clip(jnp.round(x / scale_F), -LARGEST, LARGEST).astype(jnp.int8), scale_F

  # One layer after the other, so that only one is there in float32.
  return jax.jit(lambda kernel_LDF: lax.map(layer, kernel_LDF),
                 out_shardings=(sharding, scale_sharding(sharding)))


@functools.cache
def _dequantize_on(sharding, dtype):
  def kernel(kernel_LDF, scale_LF):
    return lax.map(lambda x: (x[0].astype(jnp.float32) * x[1]).astype(dtype),
                   (kernel_LDF, scale_LF))

  return jax.jit(kernel, out_shardings=sharding)
