"""How often a loop of a compiled program runs."""

import re


def trip_count(module, computation, loop) -> int | None:
  """How often a loop runs, at most; None if that depends on data.

  Read from the compiler's note if it left one, else from the condition, which compares a
  counter that starts at a constant and grows by one with a bound.
  """
  if noted := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.attributes):
    return int(noted[1])
  condition = module.computations[loop.called["condition"][0]]
  for compare in _comparisons(module, condition):
    (counter, start), (_, bound) = (_loop_value(computation, loop, condition, name)
                                    for name in compare)
    if bound is not None and counter is not None:
      return max(0, bound - (start or 0))
  return None


def _comparisons(module, condition):
  """Operand names of each `a < b` in a condition, as names in the condition itself."""
  for instruction in condition.instructions.values():
    if instruction.opcode == "compare" and "direction=LT" in instruction.attributes:
      yield instruction.operands
    if instruction.opcode == "fusion":
      inner = module.computations[instruction.called["calls"][0]]
      for operands in _comparisons(module, inner):
        places = [inner.instructions[n] for n in operands]
        if all(p.opcode in ("parameter", "constant") for p in places):
          yield tuple(instruction.operands[int(p.arguments)] if p.opcode == "parameter"
                      else p.name for p in places)


def _loop_value(computation, loop, condition, name):
  """(place in the loop's state or None, value at the start or None) of a condition's value."""
  value = condition.instructions.get(name)
  if value is None:
    return None, None
  if value.opcode == "constant":
    return None, _integer(value)
  if value.opcode in ("copy", "bitcast"):
    return _loop_value(computation, loop, condition, value.operands[0])
  if value.opcode != "get-tuple-element":
    return None, None
  place = int(re.search(r"index=(\d+)", value.attributes)[1])
  state = computation.instructions[loop.operands[0]]
  if state.opcode != "tuple":
    return place, None
  return place, _constant(computation, state.operands[place])


def _constant(computation, name):
  value = computation.instructions.get(name)
  while value is not None and value.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
    value = computation.instructions.get(value.operands[0])
  return _integer(value) if value is not None and value.opcode == "constant" else None


def _integer(constant):
  return int(constant.arguments) if re.fullmatch(r"-?\d+", constant.arguments.strip()) else None
