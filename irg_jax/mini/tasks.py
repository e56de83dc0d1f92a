"""The tasks of the mini worlds: what a kind of prompt asks for, as clauses of a record.

A clause is {"class": shape, "count", "color", "detail", "position": [relation, index of another
clause]}; what it lacks is left open.
"""

import dataclasses
import typing

import numpy as np

RELATIONS = ("left of", "right of", "above", "below")


@dataclasses.dataclass(frozen=True)
class Task:
  """A kind of prompt: training, test prompts and tables follow from its entry in a table below."""

  share: float  # of the training prompts, relative to the other tasks; hard ones have more
  clauses: typing.Callable  # World, Generator -> include clauses of a record; None: sample again


def _clause(shape, count=1, color=None, position=None, detail=None):
  clause = {"class": str(shape), "count": int(count), "color": color and str(color),
            "detail": detail and str(detail), "position": position}
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


def _kinds(world, rng, counts, color=0.8, detail=0.5, placed=()):
  """Clauses of things, as many of each kind as `counts` says.

  `color` and `detail` are the shares of clauses that name theirs. Of one shape, all clauses name
  colours, and different ones: else it would be open which clause a thing belongs to. `placed` are
  pairs of a clause and an earlier one, with a random relation.
  """
  shapes = rng.choice(world.shapes, len(counts))
  include = []
  for shape, count in zip(shapes, counts):
    alike = (shapes == shape).sum() > 1
    taken = {clause["color"] for clause in include if alike and clause["class"] == shape}
    named = rng.choice([c for c in world.colors if c not in taken])
    include.append(_clause(shape, count, named if alike or rng.random() < color else None,
                           detail=rng.choice(world.details) if rng.random() < detail else None))
  for i, other in placed:
    include[i]["position"] = [str(rng.choice(RELATIONS)), other]
  return include


def _many(world, rng):
  """Seven things or more, of three to five kinds."""
  counts = rng.integers(1, 6, rng.integers(3, 6))
  return _kinds(world, rng, counts) if 7 <= counts.sum() <= world.most else None


def _beside(world, rng):
  """A relation of two kinds, one or two things each, and two to five things of a third kind."""
  counts = (*rng.choice((1, 1, 2), 2), rng.integers(2, 6))
  return _kinds(world, rng, counts, placed=[(1, 0)])


def _related(world, rng):
  """Four kinds with two relations: in a row, to the same kind, or apart.

  A kind without a relation has two to four things, the others one; or, where all have one, one of
  them has two: more hardly ever fit.
  """
  pairs = [((1, 0), (2, 1)), ((1, 0), (2, 0)), ((1, 0), (3, 2))][rng.integers(3)]
  counts = np.ones(4, int)
  if pairs[1][0] == 2:
    counts[3] = rng.integers(2, 5)
  else:
    counts[rng.integers(4)] = 2
  return _kinds(world, rng, counts, placed=pairs)


TASKS2 = {
    "detail": Task(0.12, lambda world, rng: _kinds(world, rng, (rng.integers(1, 4),), 0.7, 1.0)),
    "color_attr": Task(0.12, lambda world, rng: _kinds(world, rng, rng.integers(1, 4, 2), 1.0)),
    "counting": Task(0.25, lambda world, rng: _kinds(world, rng, rng.integers(3, 6, 2), 0.5)),
    "position": Task(0.50, _beside),
    "many": Task(0.70, _many),
    "relations": Task(0.60, _related),
}
