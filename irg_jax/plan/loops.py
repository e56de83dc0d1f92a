"""How often a loop of a compiled program runs."""

import re


def trip_count(module, computation, loop) -> int | None:
  """How often a loop runs, at most; None if nothing but data bounds it.

  Read from the compiler's note if it left one, else from the condition, which compares a
  counter that starts at a constant and grows by one with a bound.
  """
  if noted := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.attributes):
    return int(noted[1])
  condition = module.computations[loop.called["condition"][0]]
  most = None
  for compare in _comparisons(module, condition):
    (counter, start), (_, bound) = (_loop_value(computation, loop, condition, value)
                                    for value in compare)
    if bound is not None and counter is not None:
      turns = max(0, bound - (start or 0))
      most = turns if most is None else min(most, turns)
  return most


def _comparisons(module, condition):
  """Both sides of each `a < b` in a condition: its instructions, or constants of a fusion in it."""
  for instruction in condition.instructions.values():
    if instruction.opcode == "compare" and "direction=LT" in instruction.attributes:
      yield tuple(condition.instructions[name] for name in instruction.operands)
    if instruction.opcode == "fusion":
      inner = module.computations[instruction.called["calls"][0]]
      for values in _comparisons(module, inner):
        if all(v.opcode in ("parameter", "constant") for v in values):
          yield tuple(condition.instructions[instruction.operands[int(v.arguments)]]
                      if v.opcode == "parameter" else v for v in values)


def _loop_value(computation, loop, condition, value):
  """(place in the loop's state or None, value at the start or None) of a condition's value."""
  if value.opcode == "constant":
    return None, _integer(value)
  if value.opcode in ("copy", "bitcast"):
    return _loop_value(computation, loop, condition, condition.instructions[value.operands[0]])
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
