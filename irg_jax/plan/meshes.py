"""Sensible meshes for a slice, the most promising first: `irg plan --mesh auto`.

A cheap rule ranks them, since compiling one takes minutes. `best` compiles the first few.
"""

import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from irg_jax import sharding
from irg_jax.chips import GIB, Slice
from irg_jax.config import LlmConfig
from irg_jax.plan import Estimate
from irg_jax.train.settings import TrainSettings
from irg_jax.weights.names import abstract_params

TRIED = 2  # meshes to compile, and more until one fits
# Bytes a parameter while training: float32 parameters, EMA, two moments and gradients, and the
# short form in bfloat16.
_STATE = 5 * 4 + 2
_SPARE = 1.3  # memory of everything else, as a factor


def training_meshes(settings: TrainSettings, stage: str, slice_: Slice) -> Iterator[dict]:
  """Meshes of data x fsdp x sequence for which a rule of thumb sees enough memory.

  Rows are split only if there are too few of them. Then the fewer chips share the weights, the less
  they have to send.
  """
  model, rows = settings.model, settings.data.rows
  params = abstract_params(model, jnp.float32)["transformer"]
  count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
  sizes = getattr(settings, stage).sizes
  kept = model.llm.num_layers * model.llm.hidden_size * 4  # a layer's input and about as much again
  chips, rows = slice_.chips // slice_.count, rows / slice_.count
  for sequence in _divisors(chips):
    if any(n % sequence for n in (sizes.und, sizes.gen, sizes.vit)):
      continue
    for fsdp in _divisors(chips // sequence):
      data = chips // sequence // fsdp
      tokens = rows / (data * fsdp) * (sizes.und + sizes.gen) / sequence
      need = _SPARE * (count * _STATE / fsdp + tokens * kept)
      if rows % (data * fsdp) == 0 and need < slice_.chip.hbm_gib * GIB:
        yield {"slice": slice_.count, "data": data, "fsdp": fsdp, "sequence": sequence}


def generation_meshes(llm: LlmConfig, rows: int, slice_: Slice) -> Iterator[dict]:
  """Meshes of tensor x data: the fewer weights a chip has to read, the faster it decodes."""
  for tensor in reversed(_divisors(slice_.chips)):
    data = slice_.chips // tensor
    if sharding.splits_heads(llm, tensor) and rows % data == 0:
      yield {"data": data, "tensor": tensor}


def best(meshes, estimates_on: Callable[[dict], list[Estimate]], slice_: Slice,
         headroom: float) -> tuple[list[Estimate], list[tuple[dict, float | None]]]:
  """Compiles for the first meshes; (estimates on the fastest that fits, all that were tried).

  Tries `TRIED` meshes, and more until one fits. If none fits, the estimates are those of the mesh
  that lacks the least.

  Args:
    estimates_on: function (mesh shape) -> estimates of all programs.

  Returns:
    Estimates, and a list of (mesh shape, seconds of all programs together, None if too large).

  Raises:
    ValueError: no meshes.
  """
  tried, found = [], []
  for shape in meshes:
    estimates = estimates_on(shape)
    free = min(e.headroom(slice_) for e in estimates)
    fits = free >= headroom
    seconds = sum(max(e.seconds.values(), default=math.inf) for e in estimates)
    found.append(((not fits, seconds if fits else -free), estimates))
    tried.append((shape, seconds if fits else None))
    if len(tried) >= TRIED and any(seconds is not None for _, seconds in tried):
      break
  if not found:
    raise ValueError(f"no mesh of {slice_.name} suits: give --mesh, more rows or more chips")
  return min(found, key=lambda pair: pair[0])[1], tried


def _divisors(n: int) -> list[int]:
  return [d for d in range(1, n + 1) if n % d == 0]
