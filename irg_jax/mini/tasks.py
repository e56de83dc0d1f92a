"""The tasks of the mini worlds: what a kind of prompt asks for, as clauses of a record.

A clause is {"class": shape, "count", "color", "detail", "position": [relation, index of another
clause]}; what it lacks is left open.
"""

import dataclasses
import typing

RELATIONS = ("left of", "right of", "above", "below")


@dataclasses.dataclass(frozen=True)
class Task:
  """A kind of prompt: training, test prompts and tables follow from its entry in a table below."""

  share: float  # of the training prompts, relative to the other tasks; hard ones have more
  clauses: typing.Callable  # World, Generator -> include clauses of a record; None: sample again


def _clause(shape, count=1, color=None, position=None):
  clause = {"class": str(shape), "count": int(count), "color": color and str(color),
            "position": position}
  return {key: value for key, value in clause.items() if value is not None}


def _pick(names, count, rng):
  return rng.choice(list(names), count, replace=False)


def _free(world, rng):
  """One to three kinds of things, each one to three times, often coloured, often placed."""
  kinds = int(rng.choice((1, 2, 2, 2, 3)))
  counts = rng.integers(1, 4, kinds)
  if counts.sum() > world.most or (kinds == 1 and counts[0] == 1):
    return None
  shapes, colors = rng.choice(world.shapes, kinds), _pick(world.colors, kinds, rng)
  alike = len(set(shapes)) < kinds  # then only colours distinguish them
  include = [_clause(s, n, c if alike or rng.random() < 0.8 else None)
             for s, n, c in zip(shapes, counts, colors)]
  if kinds == 2 and rng.random() < 0.6:
    include[1]["position"] = [str(rng.choice(RELATIONS)), 0]
  return include


TASKS = {
    "single_object": Task(0.05, lambda world, rng: [_clause(*_pick(world.shapes, 1, rng))]),
    "two_object": Task(0.13, lambda world, rng: [_clause(s) for s in _pick(world.shapes, 2, rng)]),
    "counting": Task(0.10, lambda world, rng: [
        _clause(*_pick(world.shapes, 1, rng), rng.integers(2, 5))]),
    "colors": Task(0.05, lambda world, rng: [
        _clause(*_pick(world.shapes, 1, rng), 1, *_pick(world.colors, 1, rng))]),
    "position": Task(0.24, lambda world, rng: [
        _clause(s, position=p)
        for s, p in zip(_pick(world.shapes, 2, rng), (None, [str(rng.choice(RELATIONS)), 0]))]),
    "color_attr": Task(0.15, lambda world, rng: [
        _clause(s, 1, c)
        for s, c in zip(_pick(world.shapes, 2, rng), _pick(world.colors, 2, rng))]),
    "free": Task(0.28, _free),
}
