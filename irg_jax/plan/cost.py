"""Cost of a program on one chip: FLOPs from its jaxpr, HBM and ICI bytes from its compiled text.

XLA's own cost analysis counts a loop body once. These programs are loops over layers inside loops
over steps, so both counters multiply a body by its number of turns. Of a conditional the dearer
branch counts. A loop that data may end early counts with all turns that its condition allows, and
a loop without any bound as one turn.

FLOPs: matrix products and convolutions, and what the backward pass recomputes of them. A jaxpr is
the program before partitioning, so chips are taken to share the work evenly. Elementwise
operations, and work that XLA replicates or pads, do not count.

Bytes: a compiled text is one chip's program after partitioning and fusion. HBM bytes are the
operands and results of each operation outside a fusion, without arrays that the compiler keeps on
the chip; of an array that is only sliced, or updated in place, the slice. ICI bytes are what a chip
sends in a ring: (n - 1) / n of the array among n chips, and twice that in an all-reduce.
"""

import collections
import functools
import math
import re

import numpy as np
from jax.extend import core

# --- FLOPs of a jaxpr


def count_flops(jaxpr) -> tuple[float, int]:
  """(FLOPs of all chips together, number of loops without a static bound) of a jaxpr."""
  total, unbounded = 0.0, 0
  for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    parts = [count_flops(part) for part in _inner_jaxprs(eqn.params)]
    if eqn.primitive.name == "cond":
      parts = [max(parts)]
    turns = _turns(eqn)
    unbounded += sum(number for _, number in parts) + (turns is None)
    total += (1 if turns is None else turns) * sum(flops for flops, _ in parts) + _own_flops(eqn)
  return total, unbounded


def _inner_jaxprs(params):
  for value in params.values():
    for x in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(x, (core.Jaxpr, core.ClosedJaxpr)):
        yield x


def _turns(eqn) -> int | None:
  """How often the inner jaxprs of an equation run; None for a loop without a static bound."""
  kind, params = eqn.primitive.name, eqn.params
  if kind == "scan":
    return params["length"]
  if kind == "shard_map":  # the inner jaxpr is that of one device
    return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
  return _while_turns(params["cond_jaxpr"].jaxpr) if kind == "while" else 1


def _while_turns(condition) -> int | None:
  """Turns by the comparisons `counter < constant` of a condition, counting from 0 up by 1."""
  casts = {e.outvars[0]: e.invars[0] for e in condition.eqns if len(e.invars) == 1}
  constant = lambda x: x if isinstance(x, core.Literal) else casts.get(x)
  bounds = [constant(e.invars[1]) for e in condition.eqns
            if e.primitive.name == "lt" and e.invars[0] in condition.invars]
  return min((int(b.val) for b in bounds if isinstance(b, core.Literal)), default=None)


def _own_flops(eqn) -> float:
  if eqn.primitive.name == "dot_general":
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    each = math.prod(shape[d] for d in contracted)
  elif eqn.primitive.name == "conv_general_dilated":  # products with padding count
    kernel, spec = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
    each = math.prod(kernel) // kernel[spec[0]]
  else:
    return 0.0
  return 2.0 * each * math.prod(eqn.outvars[0].aval.shape)


# --- HBM and ICI bytes of a compiled text

# Control flow, names of other values, and ends of what counted where it started.
_FREE = frozenset((
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "custom-call", "iota", "async-start",
    "opt-barrier"))
# Share of its operand that a chip sends among n chips.
_SHARES = {
    "all-gather": lambda n: n - 1, "all-reduce": lambda n: 2 * (n - 1) / n,
    "collective-permute": lambda n: 1, "collective-broadcast": lambda n: 1,
    **dict.fromkeys(("reduce-scatter", "all-to-all", "ragged-all-to-all"), lambda n: (n - 1) / n)}

_LINE = re.compile(r"\s+(?P<root>ROOT )?%(?P<name>[\w.\-]+) = (?P<shape>.+?) "
                   r"(?P<opcode>[a-z][a-z\-]*)\((?P<args>[^)]*)\)(?P<rest>.*)")
_ARRAY = re.compile(r"\b([a-z]+(\d*)\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"(?:condition|body|calls|to_apply|_computations?)=\{?((?:%[\w.\-]+,? ?)+)")


def count_traffic(text: str) -> collections.Counter:
  """HBM and ICI bytes of `compiled.as_text()`.

  Returns:
    Counter of "hbm": bytes read and written; ("sent", kind, group): bytes sent by a kind of
    collective in a group of device ids; ("calls", kind, group): number of these collectives.

  Raises:
    ValueError: the text has no entry computation.
  """
  computations, entry = {}, None
  for line in text.splitlines():
    if line.startswith(("%", "ENTRY")):
      name = _names(line)[0]
      entry, ops = name if line.startswith("ENTRY") else entry, {}
      computations[name] = ops
    elif found := _LINE.match(line):
      ops[found["name"]] = found
  if entry is None:
    raise ValueError("the text of the compiled program has no ENTRY computation")
  counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", text.split("\n", 1)[0])
  return _Walk(computations, math.prod(map(int, counts))).run(entry)


class _Walk:
  """Adds up the operations of computations, which are matches of `_LINE` by name.

  An asynchronous collective may be spread over several fusions with one channel id. It counts
  once, where it begins: `begun` holds the ids that were seen.
  """

  def __init__(self, computations, devices):
    self.computations, self.devices, self.begun = computations, devices, set()

  def run(self, name, fused=False) -> collections.Counter:
    """Cost of one run. HBM bytes of a fusion count where it is called."""
    total, ops = collections.Counter(), self.computations[name]
    for op in ops.values():
      total.update(self._inner(ops, op, fused))
      free = op["opcode"] in _FREE or op["opcode"].endswith(("-done", "-update"))
      if not fused and not free:
        total["hbm"] += self._written(ops, op) + sum(
            min(sum(_sizes(ops[n]["shape"], hbm=True)), self._read([op], n))
            for n in _names(op["args"]))
    return total

  def _inner(self, ops, op, fused):
    kind, called = op["opcode"].removesuffix("-start"), _called(op)
    if kind == "while":
      turns = _text_turns(ops, op, *(self.computations[name] for name in called))
      once = sum(map(self.run, called), collections.Counter())
      return {key: n * turns for key, n in once.items()}
    if kind == "conditional":
      return max(map(self.run, called), key=lambda cost: cost["hbm"])
    if kind in ("call", "fusion", "async"):
      return self.run(called[0], fused or kind != "call")
    channel = re.search(r"channel_id=\d+|$", op["rest"])[0]
    if kind not in _SHARES or (fused and channel in self.begun):
      return {}
    self.begun |= {channel} - {""} if fused else set()
    group = device_group(op["rest"], self.devices)
    sent = sum(sum(_sizes(ops[n]["shape"])) for n in _names(op["args"])) * _SHARES[kind](len(group))
    return {("sent", kind, group): sent, ("calls", kind, group): 1} if len(group) > 1 else {}

  def _read(self, ops, name):
    """Bytes that operations read of the value `name`; infinite if one of them reads it whole."""
    total = 0
    for op in ops:
      opcode, operands = op["opcode"], _names(op["args"])
      if name not in operands or opcode in ("tuple", "custom-call"):
        continue
      place = operands.index(name)
      if opcode == "bitcast":
        total += self._read(ops, op["name"])
      elif opcode == "fusion":
        inner = self.computations[_called(op)[0]].values()
        total += sum(self._read(inner, i["name"]) for i in inner
                     if i["opcode"] == "parameter" and int(i["args"]) == place)
      elif opcode in ("dynamic-slice", "gather", "slice", "slice-start") and place == 0:
        total += sum(_sizes(op["shape"]))
      elif opcode != "dynamic-update-slice" or place:  # which updates operand 0 in place
        return math.inf
    return total

  def _written(self, ops, op):
    """Bytes that an operation writes to HBM."""
    sizes = _sizes(op["shape"], hbm=True)
    if op["opcode"] != "fusion":
      return _result(ops, op, sizes[0] if op["opcode"].endswith("-start") else sum(sizes))
    ops = self.computations[_called(op)[0]]
    root = _root(ops)
    results = [ops[n] for n in _names(root["args"])] if root["opcode"] == "tuple" else [root]
    return sum(_result(ops, value, size) for value, size in zip(results, sizes))


def _result(ops, op, size):
  """Bytes that are written for a result of `size` bytes."""
  while op["opcode"] == "bitcast":
    op = ops[_names(op["args"])[0]]
  if op["opcode"] == "dynamic-update-slice":
    return min(size, sum(_sizes(ops[_names(op["args"])[1]]["shape"])))
  return 0 if op["opcode"] in ("parameter", "custom-call") else size


def _text_turns(ops, loop, condition, body) -> int:
  """Turns of a loop by XLA's note, else by `counter < bound`, counting from 0 up by a constant."""
  if noted := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop["rest"]):
    return int(noted[1])
  start, turns = ops[_names(loop["args"])[0]], []
  for op in condition.values():
    if op["opcode"] == "compare" and "direction=LT" in op["rest"]:
      counter, bound = (condition[n] for n in _names(op["args"]))
      if bound["opcode"] == "get-tuple-element" and start["opcode"] == "tuple":
        bound = ops[_names(start["args"])[_index(bound)]]
      if counter["opcode"] == "get-tuple-element" and bound["opcode"] == "constant":
        new = body[_names(_root(body)["args"])[_index(counter)]]
        added = [body[n] for n in _names(new["args"])] if new["opcode"] == "add" else []
        step = [int(x["args"]) for x in added if x["opcode"] == "constant"]  # unrolled: 2 or more
        turns.append(-(-int(bound["args"]) // (step or [1])[0]))
  return min(turns, default=1)


def _index(op):
  return int(re.search(r"index=(\d+)", op["rest"])[1])


def _root(ops):
  return next(op for op in ops.values() if op["root"])


@functools.lru_cache(2**16)
def _names(text) -> list[str]:
  return re.findall(r"%([\w.\-]+)", text)


def _called(op) -> list[str]:
  return _names(" ".join(_CALLED.findall(op["rest"].split("metadata=")[0])))


@functools.lru_cache(2**16)
def _sizes(shape, hbm=False) -> list[int]:
  """Bytes of each array in the text of a shape; with `hbm`, 0 for arrays kept on the chip."""
  on_chip = lambda layout: hbm and re.search(r"S\([1-9]", layout)  # memory space 0 is HBM
  return [0 if dtype == "token" or on_chip(layout) else
          max(1, int(bits or 8) // 8) * math.prod(int(d) for d in dims.split(",") if d)
          for dtype, bits, dims, layout in _ARRAY.findall(shape)]


def device_group(attributes: str, devices: int) -> tuple[int, ...]:
  """Device ids of the first group of a collective, or its first pair; the others are like it."""
  if found := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
    pairs = [_numbers(pair) for pair in re.findall(r"\d+,\d+", found[1])]
    return next((pair for pair in pairs if pair[0] != pair[1]), pairs[0][:1])
  if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
    return _numbers(found[1])
  if found := re.search(r"replica_groups=\[([\d,]+)\]<=([^ ]*)", attributes):
    return tuple(_ids(found[2]).reshape(_numbers(found[1]))[0].tolist())
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}", attributes):
    sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
    ids = _ids(found[2]) if found[2].strip() else np.arange(math.prod(sizes.values()))
    first = tuple(slice(None) if f"'{axis}'" in found[3] else 0 for axis in sizes)
    return tuple(ids.reshape([*sizes.values()])[first].ravel().tolist())
  return tuple(range(devices))


def _ids(text):
  """Flat ids of "[4,2]T(1,0)": 0 to 7 as a 4 x 2 array, transposed."""
  dims, order = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
  ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
  return (ids.transpose(_numbers(order)) if order else ids).ravel()


def _numbers(text) -> tuple[int, ...]:
  return tuple(map(int, text.split(",")))
