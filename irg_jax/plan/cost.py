"""Cost of a program on one chip: FLOPs from its jaxpr, HBM and ICI bytes from its compiled text.

XLA's own cost analysis counts a loop body once. These programs are loops over layers inside loops
over steps, so both counters multiply a body by its number of turns. A loop that data may end early
counts in full, a loop without a static bound once, and of a conditional the most expensive branch.

FLOPs are those of matrix products and convolutions, recomputation in the backward pass included. A
jaxpr is the program before partitioning, so chips are taken to share the work evenly.

A compiled text does not show what a Pallas kernel does, so its bytes, too, come from the jaxpr: its
grid and its blocks (`_kernel`). Of the pairs of blocks, the visible share counts.

A compiled text is the program of one chip after partitioning and fusion. HBM bytes are the operands
and results of each operation outside a fusion, without arrays that stay on the chip; an array that
is only sliced, or updated in place, counts as the slice. ICI bytes are what a chip sends in a ring.
"""

import dataclasses
import math
import re
from collections import Counter

import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

# --- FLOPs of a jaxpr


def count_flops(jaxpr) -> tuple[float, int]:
  """(FLOPs of all chips together, number of loops without a static bound) of a jaxpr."""
  work = count_work(jaxpr)
  return work["flops"], work["unbounded"]


def count_work(jaxpr, visible=lambda keys: (1.0, 1.0)) -> Counter:
  """Work of all chips together in a jaxpr, with that of each Pallas kernel by its name.

  Args:
    visible: function (keys of a row) -> (share of its pairs of blocks that a kernel visits, share
      of them that one of several views sees, on average).

  Returns:
    Counter of "flops", those of kernels included; "unbounded": number of loops without a static
    bound; ("calls", kernel), ("flops", kernel) and ("hbm", kernel): bytes read and written.
  """
  # What is recomputed for nothing stays in the jaxpr, but not in the compiled program.
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  return _count(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0], visible)


def _count(jaxpr, visible) -> Counter:
  jaxpr, total = getattr(jaxpr, "jaxpr", jaxpr), Counter(flops=0.0, unbounded=0)
  used = {x for x in jaxpr.outvars if isinstance(x, core.Var)}.union(*(
      [x for x in eqn.invars if isinstance(x, core.Var)] for eqn in jaxpr.eqns))
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name == "pallas_call":  # JAX keeps a kernel that nobody needs, XLA does not
      total.update(_kernel(eqn, visible) if used.intersection(eqn.outvars) else {})
      continue
    inner = [_count(part, visible) for part in core.jaxprs_in_params(eqn.params)]
    if name == "cond":
      inner = [max(inner, key=lambda work: work["flops"])]
    turns = _TURNS[name](eqn.params) if name in _TURNS else 1
    total["unbounded"] += turns is None
    for work in inner:
      total.update({key: n if key == "unbounded" else n * (1 if turns is None else turns)
                    for key, n in work.items()})
    if name in _PRODUCTS:
      shapes = [x.aval.shape for x in (*eqn.invars, *eqn.outvars)]
      total["flops"] += 2.0 * _PRODUCTS[name](*shapes, eqn.params["dimension_numbers"])
  return total


def _kernel(eqn, visible) -> Counter:
  """Work of an attention kernel, see `model.kernels.tpu` and `model.kernels.gpu`.

  Its first operands list pairs of an outer block and an inner one; after these come the words of
  queries and keys, q and k. For TPUs the grid is (heads, pairs), for GPUs (outer blocks, heads,
  rows) with a loop over the inner blocks. What is found by the outer block moves once for each of
  these, the rest once for each visible pair.
  """
  params, grid = eqn.params, eqn.params["grid_mapping"]
  operands = [x.aval for x in eqn.invars[grid.num_dynamic_grid_bounds:]]
  tpu = grid.num_index_operands > 0
  lists = operands[:grid.num_index_operands or 3]
  q, k = operands[len(lists) + 2:][:2]
  share, seen = visible(k.shape[2])
  heads = grid.grid[0 if tpu else 1]
  programs = heads * lists[0].size if tpu else math.prod(grid.grid)
  outer = math.prod(_blocks(grid.block_mappings[-1])) if tpu else programs
  moved = sum(_block_bytes(x) * (programs * share if _by_inner(x, tpu) else outer)
              for x in grid.block_mappings)
  # One conditional of each view holds the products of whole blocks, another those with a mask.
  inner = [_count(part, visible)["flops"] for e in params["jaxpr"].eqns
           for part in core.jaxprs_in_params(e.params)]
  # A program for GPUs takes a part of an outer block, and skips no view.
  parts = 1 if tpu else grid.grid[0] * grid.grid[2] // (lists[0].size - 1)
  flops = sum(inner) / (2 if tpu else 1) * heads * parts * lists[-1].size * (
      seen if q.shape[1] > 1 and tpu else share)
  name = params["name"]
  return Counter({"flops": flops, ("calls", name): 1, ("flops", name): flops, ("hbm", name): moved})


def _lengths(mapping) -> list[int | None]:
  """Lengths of a block by dimension; None for one that the kernel does not see."""
  return [n if isinstance(n, int) else getattr(n, "block_size", None) for n in mapping.block_shape]


def _blocks(mapping) -> list[int]:
  """Numbers of blocks of an array by dimension."""
  return [-(-n // (size or 1)) for n, size in zip(mapping.array_aval.shape, _lengths(mapping))]


def _block_bytes(mapping) -> int:
  """Bytes of a block, the last dimension padded to whole lanes."""
  *lead, last = (n or 1 for n in _lengths(mapping))
  return math.prod(lead) * (-(-last // 128) * 128) * mapping.array_aval.dtype.itemsize


def _by_inner(mapping, tpu: bool) -> bool:
  """Whether a block changes with the inner one.

  The arguments of the map are (head, step, outer, inner, ...) for TPUs, the outer block first for
  GPUs.
  """
  jaxpr = mapping.index_map_jaxpr.jaxpr
  needed = {x for x in jaxpr.outvars if isinstance(x, core.Var)}
  for eqn in reversed(jaxpr.eqns):
    if needed.intersection(eqn.outvars):
      needed.update(x for x in eqn.invars if isinstance(x, core.Var))
  return jaxpr.invars[3] in needed if tpu else jaxpr.invars[0] not in needed


def _while_turns(params) -> int | None:
  """Turns by the comparisons `counter < constant` of a condition, counting from 0 up by 1."""
  condition = params["cond_jaxpr"].jaxpr
  casts = {eqn.outvars[0]: eqn.invars[0] for eqn in condition.eqns if len(eqn.invars) == 1}
  bounds = [bound if isinstance(bound, core.Literal) else casts.get(bound)
            for counter, bound in (e.invars for e in condition.eqns if e.primitive.name == "lt")
            if counter in condition.invars]
  return min((int(b.val) for b in bounds if isinstance(b, core.Literal)), default=None)


# How often the inner jaxprs of a primitive run. That of a shard_map is the program of one device.
_TURNS = {
    "scan": lambda params: params["length"], "while": _while_turns,
    "shard_map": lambda params: math.prod(
        params["mesh"].shape[axis] for axis in params["newly_manual_axes"])}
# Multiply-adds by the shapes of operands and result; products with padding count.
_PRODUCTS = {
    "dot_general": lambda a, b, out, numbers: math.prod(out) * math.prod(
        a[d] for d in numbers[0][0]),
    "conv_general_dilated": lambda x, kernel, out, numbers: math.prod(out) * (
        math.prod(kernel) // kernel[numbers.rhs_spec[0]])}

# --- HBM and ICI bytes of a compiled text

# Control flow, other names of a value, and the ends of operations that counted at their start.
_FREE = frozenset((
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "custom-call", "iota", "async",
    "opt-barrier"))
# Share of its operand that a chip sends among n chips.
_SENT = {
    "all-gather": lambda n: n - 1, "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n, "reduce-scatter": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1}
_CALLERS = frozenset(("while", "conditional", "call", "fusion", "async"))

_LINE = re.compile(r"\s+(?P<root>ROOT )?%(?P<name>[\w.\-]+) = (?P<shape>.+?) "
                   r"(?P<opcode>[a-z][a-z\-]*)\((?P<args>[^)]*)\)(?P<attributes>.*)")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]+(\d*)\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"(?:condition|body|calls|to_apply|_computations?)=\{?((?:%[\w.\-]+,? ?)+)")


@dataclasses.dataclass(eq=False)
class _Op:
  """One operation of a computation, which is a dict of operations by name."""

  kind: str  # opcode, without the "-start" of asynchronous operations
  root: bool
  args: str  # value of a constant, number of a parameter
  attributes: str
  sizes: list[int]  # bytes of each array of the result
  hbm: list[int]  # likewise, 0 for arrays kept on the chip
  operands: list["_Op"]
  called: list[dict[str, "_Op"]]
  users: list["_Op"] = dataclasses.field(default_factory=list)


def count_traffic(text: str) -> Counter:
  """HBM and ICI bytes of `compiled.as_text()`.

  Returns:
    Counter of "hbm": bytes read and written; ("sent", kind, group): bytes sent by a kind of
    collective in a group of device ids; ("calls", kind, group): number of these collectives.

  Raises:
    ValueError: the text has no entry computation.
  """
  computations, entry = {}, None
  for line in text.splitlines():  # operands and called computations come before their users
    if line.startswith(("%", "ENTRY")):
      ops = computations[_NAME.search(line)[1]] = {}
      entry = ops if line.startswith("ENTRY") else entry
    elif found := _LINE.match(line):
      ops[found["name"]] = _parse(found, ops, computations)
  if entry is None:
    raise ValueError("the text of the compiled program has no ENTRY computation")
  counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", text.split("\n", 1)[0])
  return _cost(entry, math.prod(map(int, counts)), set())


def _parse(line, ops, computations) -> _Op:
  sizes, hbm = [], []
  for dtype, bits, dims, layout in _ARRAY.findall(line["shape"]):
    size = 0 if dtype == "token" else max(1, int(bits or 8) // 8) * math.prod(_numbers(dims))
    sizes.append(size)
    hbm.append(0 if re.search(r"S\([1-9]", layout) else size)  # memory space 0 is HBM
  kind = line["opcode"].removesuffix("-start")
  called = _CALLED.findall(line["attributes"].split("metadata=")[0]) if kind in _CALLERS else ()
  op = _Op(kind, bool(line["root"]), line["args"], line["attributes"], sizes, hbm,
           [ops[name] for name in _NAME.findall(line["args"])],
           [computations[name] for name in _NAME.findall(" ".join(called))])
  if kind != line["opcode"]:
    if operands := re.match(r"\(\((.*?)\), ", line["shape"]):  # these stand before the result
      count = len(_ARRAY.findall(operands[1]))
      op.sizes, op.hbm = sizes[count:count + 1], hbm[count:count + 1]
    del op.hbm[1:]  # operands and state of an asynchronous operation
  for operand in dict.fromkeys(op.operands):
    operand.users.append(op)
  return op


def _cost(ops, devices, begun, fused=False) -> Counter:
  """Cost of one run of a computation. HBM bytes of a fusion count where it is called.

  `begun` collects the channels of collectives that are spread over several fusions. Such a
  collective counts once, where it begins.
  """
  total = Counter()
  for op in ops.values():
    within = fused or op.kind in ("fusion", "async")
    inner = [_cost(part, devices, begun, within) for part in op.called]
    if op.kind == "conditional":
      inner = [max(inner, key=lambda cost: cost["hbm"])]
    turns = _turns(op) if op.kind == "while" else 1
    for cost in inner:
      total.update({key: n * turns for key, n in cost.items()})
    if op.kind in _SENT:
      group = device_group(op.attributes, devices)
      channel = re.findall(r"channel_id=\d+", op.attributes)
      if len(group) > 1 and not (fused and begun.intersection(channel)):
        total["calls", op.kind, group] += 1
        total["sent", op.kind, group] += _SENT[op.kind](len(group)) * sum(
            sum(operand.sizes) for operand in op.operands)
      begun.update(channel if fused else ())
    if not (fused or op.kind in _FREE or op.kind.endswith("-done")):
      total["hbm"] += _written(op) + sum(min(sum(x.hbm), _read(op, x)) for x in op.operands)
  return total


def _read(op, value) -> float:
  """Bytes that an operation reads of its operand `value`; infinite for the whole of it."""
  place = op.operands.index(value)
  if op.kind == "fusion":
    value = next(x for x in op.called[0].values() if x.kind == "parameter" and int(x.args) == place)
    return sum(_read(user, value) for user in value.users)
  if op.kind == "bitcast":
    return sum(_read(user, op) for user in op.users)
  if op.kind in ("dynamic-slice", "gather", "slice") and place == 0:
    return sum(op.sizes)
  in_place = op.kind == "dynamic-update-slice" and place == 0
  return 0 if in_place or op.kind in ("tuple", "custom-call") else math.inf


def _written(op) -> int:
  """Bytes that an operation writes to HBM."""
  results, sizes, total = [op], [sum(op.hbm)], 0
  if op.kind == "fusion":
    root = _root(op.called[0])
    results, sizes = root.operands if root.kind == "tuple" else [root], op.hbm
  for result, size in zip(results, sizes):
    while result.kind == "bitcast":
      result = result.operands[0]
    if result.kind == "dynamic-update-slice":
      size = min(size, sum(result.operands[1].sizes))
    total += 0 if result.kind in ("parameter", "custom-call") else size
  return total


def _turns(loop) -> int:
  """Turns of a loop by XLA's note, else by `counter < bound`, counting from 0 up by a constant."""
  if noted := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.attributes):
    return int(noted[1])
  index = lambda op: int(re.search(r"index=(\d+)", op.attributes)[1])
  (start,), (condition, body), turns = loop.operands, loop.called, []
  for op in condition.values():
    if op.kind == "compare" and "direction=LT" in op.attributes:
      counter, bound = op.operands
      if bound.kind == "get-tuple-element" and start.kind == "tuple":
        bound = start.operands[index(bound)]
      if counter.kind == "get-tuple-element" and bound.kind == "constant":
        new = _root(body).operands[index(counter)]
        steps = (int(x.args) for x in new.operands if x.kind == "constant" and new.kind == "add")
        turns.append(-(-int(bound.args) // next(steps, 1)))  # an unrolled loop counts by 2 or more
  return min(turns, default=1)


def _root(ops):
  return next(op for op in ops.values() if op.root)


def device_group(attributes: str, devices: int) -> tuple[int, ...]:
  """Device ids of the first group of a collective, or its first pair; the others are like it."""
  if found := re.search(r"(?:source_target_pairs|replica_groups)=\{\{(.*?)\}\}", attributes):
    groups = [_numbers(group) for group in found[1].split("},{")]
    return next((group for group in groups if len(set(group)) > 1), groups[0][:1])
  if found := re.search(r"replica_groups=\[([\d,]+)\]<=(\S+)", attributes):
    return tuple(_ids(found[2]).reshape(_numbers(found[1]))[0].tolist())
  if found := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=(\S+))? \{(.*?)\}",
                        attributes):
    sizes = {axis: int(size) for axis, size in re.findall(r"('\w+')=(\d+)", found[1])}
    first = tuple(slice(None) if axis in found[3] else 0 for axis in sizes)
    ids = _ids(found[2] or f"[{devices}]").reshape([*sizes.values()])
    return tuple(ids[first].ravel().tolist())
  return tuple(range(devices))


def _ids(text):
  """Device ids of "[4,2]T(1,0)": 0 to 7 as a 4 x 2 array, transposed."""
  dims, order = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
  ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
  return ids.transpose(_numbers(order)) if order else ids


def _numbers(text) -> tuple[int, ...]:
  return tuple(int(number) for number in text.split(",") if number)
