"""Low-rank adapters (LoRA) of matrices of the parameter table, beside weights that stay frozen.

A kernel W [in, out] becomes W + scale * A @ B with A [in, rank] and B [rank, out], stacked over
layers as W is. Adapters are a tree by the table's paths: "decoder/layers/gen/q/lora_a". Training
adds two narrow products to the one with W (`applied`), so neither a second W nor a gradient of its
size ever exists. All else reads merged weights (`merge_one`).
"""

import contextlib
import dataclasses
import functools
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from irg_jax.config import ModelConfig, setting
from irg_jax.messages import guess
from irg_jax.model.layers import Dense
from irg_jax.weights import names

A, B = "lora_a", "lora_b"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraSettings:
  """Adapters that are trained in place of the weights."""

  rank: int = setting(0, "rank of the adapters; 0: none, all weights are trained", low=0)
  alpha: float = setting(16.0, "an adapter counts alpha / rank times", above=0)
  targets: tuple[str, ...] = setting(
      ("und", "gen"), "matrices with an adapter, by a part of their path: und, gen, vit, "
      "gen/q, connector, heads/velocity, ...")

  @property
  def scale(self) -> float:
    return self.alpha / max(self.rank, 1)


def kernel_rows(config: ModelConfig) -> list[names.Row]:
  """The table's matrices that can have an adapter."""
  return [row for row in names.rows(config)
          if row.path.startswith("transformer/") and row.path.endswith("/kernel")]


def target_rows(config: ModelConfig, settings: LoraSettings) -> list[names.Row]:
  """The rows of the matrices that have an adapter."""
  return [row for row in kernel_rows(config)
          if any(f"/{target.strip('/')}/" in row.path for target in settings.targets)]


def stem(row: names.Row) -> str:
  """Common start of the paths of a row's adapter: "decoder/layers/gen/q/"."""
  return row.path.removeprefix("transformer/").removesuffix("kernel")


def faults(config: ModelConfig, settings: LoraSettings):
  """Yields (name of a setting, what is wrong with it) for targets or a rank that cannot be."""
  known = {part for row in kernel_rows(config) for part in row.path.split("/")[1:-1]}
  for target in settings.targets if settings.rank else ():
    if not target_rows(config, dataclasses.replace(settings, targets=(target,))):
      yield "targets", (f"has {target!r}, which is part of no matrix's path"
                        f"{guess(target, known)}; known: {', '.join(sorted(known))}")
  for row in target_rows(config, settings):
    if settings.rank > min(row.layer_shape):
      yield "rank", (f"is {settings.rank}, more than the shorter side of "
                     f"{stem(row)}kernel {row.layer_shape}")
      return
  if settings.rank and not settings.targets:
    yield "targets", "is empty, so there would be nothing to train"


def abstract_adapters(config: ModelConfig, settings: LoraSettings) -> dict:
  """Shapes of the adapters, `jax.ShapeDtypeStruct` of float32."""
  shapes = {}
  for row in target_rows(config, settings):
    *lead, size_in, size_out = row.shape
    shapes[stem(row) + A] = (*lead, size_in, settings.rank)
    shapes[stem(row) + B] = (*lead, settings.rank, size_out)
  return names.unflatten({path: jax.ShapeDtypeStruct(shape, jnp.float32)
                          for path, shape in shapes.items()})


def new_adapters(config: ModelConfig, settings: LoraSettings, seed: int) -> dict:
  """Adapters that change nothing yet, numpy: B is zero, A has orthonormal columns.

  So a first update moves W by its gradient, projected onto A's columns.
  """
  def make(path, shape):
    if path.endswith(B):
      return np.zeros(shape.shape, np.float32)
    rng = np.random.default_rng([seed, zlib.crc32(path.encode())])  # not by the table's order
    return np.linalg.qr(rng.standard_normal(shape.shape, np.float32))[0]

  shapes = names.flatten(abstract_adapters(config, settings))
  return names.unflatten({path: make(path, shape) for path, shape in shapes.items()})


def beside(params: dict, adapters: dict) -> dict:
  """The parameters with each adapter next to its kernel, as `applied` expects them."""
  return names.unflatten(names.flatten(params) | names.flatten(adapters))


@contextlib.contextmanager
def applied(scale: float):
  """Context in which each linear layer with an adapter beside its kernel adds that adapter."""
  def intercept(call, args, kwargs, context):
    y, layer = call(*args, **kwargs), context.module
    if not (isinstance(layer, Dense) and context.method_name == "__call__"
            and layer.has_variable("params", A)):
      return y
    a, b = (layer.get_variable("params", name).astype(y.dtype) for name in (A, B))
    return y + scale * (args[0].astype(y.dtype) @ a @ b)

  with nn.intercept_methods(intercept):
    yield


def has(adapters: dict, path: str) -> bool:
  """Whether the parameter at `path`, "transformer/...", has an adapter."""
  return _sides(adapters, path) is not None


def merge_one(path: str, kernel, adapters: dict, scale: float):
  """W + scale * A @ B of the parameter at `path`, in W's dtype, W donated; W without an adapter."""
  if (sides := _sides(adapters, path)) is None:
    return kernel
  return _merge_on(getattr(kernel, "sharding", None))(kernel, *sides, scale)


def _sides(adapters, path):
  """(A, B) of a parameter, or None."""
  for part in path.split("/")[1:-1]:
    adapters = adapters.get(part, {})
  return (adapters[A], adapters[B]) if path.endswith("/kernel") and A in adapters else None


@functools.cache
def _merge_on(sharding):
  def merged(kernel, a, b, scale):
    change = jnp.matmul(a, b, precision="highest", preferred_element_type=jnp.float32)
    return (kernel.astype(jnp.float32) + scale * change).astype(kernel.dtype)

  return jax.jit(merged, out_shardings=sharding, donate_argnums=0)
