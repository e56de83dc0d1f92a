"""What a compiled program costs one chip: FLOPs, bytes of memory, bytes on the wire.

XLA's own cost analysis counts the body of a loop once, however often it runs, and our
programs are loops over layers in loops over steps. Here a body counts as often as it runs.
"""

import dataclasses
import math
import re

import numpy as np

from irg_jax.plan import hlo
from irg_jax.plan.loops import trip_count

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
               "collective-broadcast", "ragged-all-to-all")

# They move nothing: names for what is there, ends of what was counted when it started, or
# control flow whose parts are counted by themselves.
_FREE = frozenset((
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "custom-call", "opt-barrier", "iota",
    "async-start", "async-update", "async-done", "optimization-barrier"))


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one chip.

  Attributes:
    flops: of matrix products and convolutions, and of the reductions that small products
      are compiled into; other arithmetic is left out.
    memory: bytes read from and written to HBM.
    wire: bytes that the chip sends, by (kind of collective, group of devices), as a ring
      would: (n - 1) / n of the array for n devices, twice that for an all-reduce.
    calls: how many collectives run, by the same keys.
    guessed: loops whose length the program does not say, counted as one turn.
  """

  flops: float = 0.0
  memory: float = 0.0
  wire: dict = dataclasses.field(default_factory=dict)
  calls: dict = dataclasses.field(default_factory=dict)
  guessed: int = 0

  def __add__(self, other):
    join = lambda a, b: {k: a.get(k, 0) + b.get(k, 0) for k in {**a, **b}}
    return Cost(self.flops + other.flops, self.memory + other.memory,
                join(self.wire, other.wire), join(self.calls, other.calls),
                self.guessed + other.guessed)

  def times(self, n):
    scale = lambda d: {k: v * n for k, v in d.items()}
    return Cost(self.flops * n, self.memory * n, scale(self.wire), scale(self.calls), self.guessed)


def program_cost(text: str) -> Cost:
  """Counts a compiled program, `compiled.as_text()`.

  Of a conditional the dearer branch counts, and of a loop that data may end early the most
  turns that its condition allows, so the result is an upper bound there; a loop that only
  data end counts once (`guessed`).
  """
  module = hlo.parse(text)
  return _Counter(module).computation(module.entry, set())


class _Counter:
  """One walk over a module, into loops, branches and fusions.

  A collective that overlaps with computation is spread over several fusions, some of them
  in an inner loop, and stands in each of them under one channel: `begun` holds the channels
  that are on their way, so that it counts once, where it begins.
  """

  def __init__(self, module):
    self._module = module

  def computation(self, name, begun, fused=False) -> Cost:
    """Cost of one run; the traffic of what is `fused` is that of the fusion as a whole."""
    total, computation = Cost(), self._module.computations[name]
    for instruction in computation.instructions.values():
      total += self._instruction(computation, instruction, begun, fused)
      if not fused:
        total += Cost(memory=self._memory(computation, instruction))
    return total

  def _instruction(self, computation, instruction, begun, fused) -> Cost:
    called, opcode = instruction.called, instruction.opcode
    if opcode == "while":
      trips = trip_count(self._module, computation, instruction)
      once = Cost()
      for role in ("body", "condition"):
        once += self.computation(called[role][0], begun)
      return once.times(1 if trips is None else trips) + Cost(guessed=trips is None)
    if opcode == "conditional":
      branches = [self.computation(name, set(begun)) for name in called["branches"]]
      return max(branches, key=lambda cost: (cost.flops, cost.memory))
    if opcode == "call":
      return self.computation((called.get("to_apply") or called["calls"])[0], begun, fused)
    if opcode in ("fusion", "async-start"):
      return self.computation(called["calls"][0], begun, fused=True)
    if kind := _collective(opcode):
      return self._sent(computation, instruction, kind, begun if fused else None)
    return Cost(flops=_flops(computation, instruction))

  def _sent(self, computation, instruction, kind, begun) -> Cost:
    channel = re.search(r"channel_id=(\d+)", instruction.attributes)
    if begun is not None and channel:
      if channel[1] in begun:
        return Cost()
      begun.add(channel[1])
    group = hlo.device_group(instruction, self._module.devices)
    n = len(group)
    if n < 2:
      return Cost()
    size = sum(leaf.bytes for name in instruction.operands
               for leaf in _shape(computation, name))
    share = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1,
             "collective-broadcast": 1}.get(kind, (n - 1) / n)
    return Cost(wire={(kind, group): size * share}, calls={(kind, group): 1})

  def _memory(self, computation, instruction) -> float:
    opcode, operands = instruction.opcode, instruction.operands
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
      return 0
    if opcode == "fusion":
      return self._fusion_memory(computation, instruction)
    if opcode.startswith("copy-start"):  # the result names the source again
      return _hbm(instruction.shape[:1]) + _hbm(_shape(computation, operands[0]))
    result = _hbm(instruction.shape[:1] if opcode.endswith("-start") else instruction.shape)
    if opcode in ("dynamic-slice", "gather", "slice", "slice-start"):
      return 2 * result
    if opcode in ("dynamic-update-slice", "scatter"):
      return 2 * _hbm(_shape(computation, operands[-1 if opcode == "scatter" else 1]))
    return result + sum(_hbm(_shape(computation, name)) for name in operands)

  def _fusion_memory(self, computation, instruction):
    inner = self._module.computations[instruction.called["calls"][0]]
    read = 0
    for parameter in inner.instructions.values():
      if parameter.opcode == "parameter":
        operand = instruction.operands[int(parameter.arguments)]
        whole = _hbm(_shape(computation, operand))
        read += min(whole, self._used(inner, parameter)) if whole else 0
    roots = self._outputs(inner)
    return read + sum(_written(inner, root, leaf) for root, leaf in
                      zip(roots, instruction.shape, strict=False) if not leaf.on_chip)

  def _used(self, computation, value):
    """Bytes of a fusion's parameter that the fusion really reads."""
    total, size = 0, sum(leaf.bytes for leaf in value.shape)
    for user in computation.instructions.values():
      if value.name not in user.operands or user.opcode in ("tuple", "custom-call"):
        continue  # handed through
      place = user.operands.index(value.name)
      if user.opcode == "bitcast" or "output_to_operand_aliasing" in user.attributes:
        total += self._used(computation, user)
      elif user.opcode in ("dynamic-slice", "gather", "slice") and place == 0:
        total += sum(leaf.bytes for leaf in user.shape)
      elif user.opcode == "dynamic-update-slice" and place == 0:
        total += 0  # updated in place
      elif user.opcode == "fusion":
        inner = self._module.computations[user.called["calls"][0]]
        parameter = next(i for i in inner.instructions.values()
                         if i.opcode == "parameter" and int(i.arguments) == place)
        total += self._used(inner, parameter)
      else:
        return size
    return min(total, size)

  def _outputs(self, computation):
    root = computation.instructions[computation.root]
    return [computation.instructions.get(n) for n in root.operands] \
        if root.opcode == "tuple" else [root]


def _written(computation, value, leaf):
  """Bytes that a fusion writes for one of its results."""
  while value is not None and value.opcode == "bitcast":
    value = computation.instructions.get(value.operands[0])
  if value is None or value.opcode in ("parameter", "custom-call"):
    return 0  # handed through
  if value.opcode == "dynamic-update-slice":
    return sum(x.bytes for x in _shape(computation, value.operands[1]))
  return leaf.bytes


def _flops(computation, instruction) -> float:
  if instruction.opcode == "dot":
    left = _shape(computation, instruction.operands[0])[0]
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    sizes = [left.dims[int(d)] for d in contracted[1].split(",") if d] if contracted else []
    return 2.0 * math.prod(instruction.shape[0].dims) * math.prod(sizes)
  if instruction.opcode == "convolution":
    return _convolution_flops(computation, instruction)
  if instruction.opcode == "reduce":
    # A product with a single row becomes a sum of elementwise products.
    return 2.0 * math.prod(_shape(computation, instruction.operands[0])[0].dims)
  return 0.0


def _convolution_flops(computation, instruction) -> float:
  """Products that a convolution makes, padding and holes left out (matrix products too)."""
  left, kernel = (_shape(computation, n)[0].dims for n in instruction.operands[:2])
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
  left_labels, kernel_labels, out_labels = labels.groups()
  out = instruction.shape[0].dims
  groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
  total = 2.0 * kernel[kernel_labels.index("i")] * math.prod(
      size for size, label in zip(out, out_labels) if label in "bf")
  total /= int(groups[1]) if groups else 1
  window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
  window = dict(re.findall(r"(\w+)=([\dx_\-]+)", window[1])) if window else {}
  for axis in sorted(set(out_labels) - set("bf")):
    number = int(axis)
    pick = lambda field, default: window.get(field, "").split("x")[number] or default \
        if field in window else default
    low = int(pick("pad", "0_0").split("_")[0])
    total *= _window_hits(
        left[left_labels.index(axis)], kernel[kernel_labels.index(axis)],
        out[out_labels.index(axis)], int(pick("stride", 1)), low,
        int(pick("lhs_dilate", 1)), int(pick("rhs_dilate", 1)))
  return total


def _window_hits(size, kernel, out, stride, low, spread, kernel_spread):
  """Pairs of (output place, kernel place) that meet an input value along one axis."""
  place = (np.arange(out, dtype=np.int64)[:, None] * stride - low
           + np.arange(kernel, dtype=np.int64) * kernel_spread)
  return int(np.sum((place >= 0) & (place <= (size - 1) * spread) & (place % spread == 0)))


def _collective(opcode):
  kind = opcode.removesuffix("-start")
  return kind if kind in COLLECTIVES else None


def _shape(computation, name):
  found = computation.instructions.get(name)
  return found.shape if found else ()


def _hbm(shape) -> int:
  return sum(leaf.bytes for leaf in shape if not leaf.on_chip)
