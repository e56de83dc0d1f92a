"""The text of a compiled program as computations and instructions.

`compiled.as_text()` is one program for one chip, after partitioning and fusion: what it says
is what the chip does. Here it is only read; `plan.cost` counts.
"""

import dataclasses
import math
import re

_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
_LEAF = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(r"\b(condition|body|calls|to_apply|branch_computations|true_computation|"
                     r"false_computation)=\{?(%[\w.\-]+(?:, ?%[\w.\-]+)*)")


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One array of a shape: `bf16[2,3]{1,0:T(8,128)S(1)}` has dims (2, 3) and is on the chip.

  Attributes:
    on_chip: the array lives in the chip's fast memory, not in HBM.
  """

  dtype: str
  dims: tuple[int, ...]
  on_chip: bool

  @property
  def bytes(self) -> int:
    bits = re.search(r"\d+", self.dtype)
    size = _BYTES.get(self.dtype) or max(1, int(bits[0]) // 8 if bits else 0)
    return 0 if self.dtype == "token" else size * math.prod(self.dims)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """`%name = shape opcode(operands), attributes`.

  Attributes:
    shape: the arrays of the result, in order.
    operands: names; `arguments` is their text, which for `parameter` and `constant` is a value.
    called: computations by role: "calls", "body", "condition", "branches", "to_apply".
  """

  name: str
  shape: tuple[Leaf, ...]
  opcode: str
  operands: tuple[str, ...]
  arguments: str
  attributes: str
  called: dict[str, tuple[str, ...]]

  @property
  def op_name(self) -> str:
    """Where in the Python program it comes from, as JAX recorded it."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
  name: str
  instructions: dict[str, Instruction]
  root: str


@dataclasses.dataclass(frozen=True)
class Module:
  """Attributes: `computations` by name, the name of the `entry` one, and how many `devices`."""

  computations: dict[str, Computation]
  entry: str
  devices: int


def parse(text: str) -> Module:
  """Reads the text of a compiled program.

  Raises:
    ValueError: there is no entry computation in it.
  """
  computations, entry, name, lines = {}, None, None, []
  for line in text.splitlines():
    if line.startswith(("%", "ENTRY")) and line.rstrip().endswith("{"):
      name, lines = _NAME.search(line)[1], []
      entry = name if line.startswith("ENTRY") else entry
    elif line.startswith("}") and name:
      computations[name], name = _computation(name, lines), None
    elif name:
      lines.append(line)
  if entry is None:
    raise ValueError("the text of the compiled program has no ENTRY computation")
  header = text.split("\n", 1)[0]
  count = lambda field: int((re.search(rf"{field}=(\d+)", header) or (0, 1))[1])
  return Module(computations, entry, count("num_partitions") * count("replica_count"))


def leaves(shape: str) -> tuple[Leaf, ...]:
  """The arrays that the text of a shape names, tuples taken apart."""
  on_chip = lambda layout: bool(re.search(r"S\([1-9]\d*\)", layout or ""))
  return tuple(Leaf(m[1], tuple(int(d) for d in m[2].split(",") if d), on_chip(m[3]))
               for m in _LEAF.finditer(shape))


def device_group(instruction: Instruction, devices: int) -> tuple[int, ...]:
  """Numbers of the devices that one group of a collective joins.

  The first group is taken: the others are like it. A pair that a collective-permute sends
  between is a group of two.
  """
  text = instruction.attributes
  if found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
    pairs = re.findall(r"\{(\d+),(\d+)\}", text)
    return next(((int(a), int(b)) for a, b in pairs if a != b), (int(found[1]),))
  if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
    return tuple(int(x) for x in found[1].split(","))
  if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
    shape, dims = _ints(found[1]), _ints(found[2])
    order = _ints(found[3]) if found[3] else list(range(len(dims)))
    return tuple(_iota(dims, order)[:math.prod(shape[1:])])
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))?\s*"
                        r"\{([^}]*)\}", text):
    sizes = {a: int(n) for a, n in re.findall(r"'(\w+)'=(\d+)", found[1])}
    axes, grouped = list(sizes), re.findall(r"'(\w+)'", found[3])
    order = [axes.index(a) for a in axes if a not in grouped] + [axes.index(a) for a in grouped]
    places = _iota(list(sizes.values()), order)[:math.prod(sizes[a] for a in grouped)]
    given = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", found[2] or "")
    if not given:
      return tuple(places)
    dims = _ints(given[1])
    ids = _iota(dims, _ints(given[2]) if given[2] else list(range(len(dims))))
    return tuple(ids[place] for place in places)
  return tuple(range(devices))


def _iota(dims, order):
  """0, 1, 2, ... laid out as `dims`, its axes reordered, read off again."""
  ids = [0]
  strides = [math.prod(dims[i + 1:]) for i in range(len(dims))]
  for axis in order:
    ids = [i + strides[axis] * k for i in ids for k in range(dims[axis])]
  return ids


def _ints(text):
  return [int(x) for x in text.split(",")]


def _computation(name, lines):
  instructions, root = {}, None
  for line in lines:
    if found := _HEAD.match(line):
      instruction = _instruction(found[2], line[found.end():])
      instructions[instruction.name] = instruction
      root = instruction.name if found[1] else root
  return Computation(name, instructions, root)


def _instruction(name, text):
  end = _closing(text, 0) if text.startswith("(") else text.index(" ")
  shape, rest = text[:end], text[end:].lstrip()
  start = rest.index("(")
  end = _closing(rest, start)
  arguments, attributes = rest[start + 1:end - 1], rest[end:]
  called = {}
  for role, names in _CALLED.findall(attributes.split("metadata=")[0]):
    role = "branches" if role.endswith(("computations", "_computation")) else role
    called[role] = called.get(role, ()) + tuple(_NAME.findall(names))
  return Instruction(name, leaves(shape), rest[:start], tuple(_NAME.findall(arguments)),
                     arguments, attributes, called)


def _closing(text, start):
  """Index after the parenthesis that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += {"(": 1, ")": -1}.get(text[i], 0)
    if depth == 0:
      return i + 1
  raise ValueError(f"unbalanced parentheses in the compiled program: {text[:80]}")
