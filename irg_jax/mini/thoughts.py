"""The texts of the mini world: plans, descriptions, reflections, and the better image.

The cells of an image have letters, A to D in the first row and M to P in the last. A plan first
chooses a place for each thing, then goes through the image cell by cell. The places are
choices that a low temperature makes as well as any other; the cells follow from them, and give
each image token its own words. A cell is a letter and two words, so that a model finds what it
looks for by a letter that it has read before, and by a distance that is always the same.

  <think> The image shows two red circles left of one blue star. The ground is grey. Places:
  red circle E, red circle I, blue star G. Cells: A empty ground B empty ground ... </think>

A reflection has the four parts of IRGL's: what falls short (after what is seen), the
improvements, the steps, and the final prompt. What falls short need not be counted: the things
seen are listed in the order of the places that the thought before named, so the two lists agree
where nothing is amiss.

  <think> I see: The ground is grey. Cells: A empty ground ... Things: E red circle, I empty
  ground, G blue star. What falls short: one red circle is missing. Improvements: the prompt asks
  for two red circles left of one blue star. Steps: put red circle I, keep the rest. Final
  prompt: The ground is grey. Cells: A empty ground ... </think>

The steps name a cell after the thing, as a plan's places do, so that the cells of the final prompt
are looked up as those of a plan are; where no step names a cell, they are those seen. What is
listed of those has the letter first: the other way round it would be looked up in their place.
"""

import itertools
import re

import numpy as np

from irg_jax.mini import tasks, world

SYSTEM_PROMPT = "Think, draw, look, and draw again."
QUESTION = "What does the picture show?"
EMPTY, UNCLEAR = "empty ground", "unclear shape"

_LETTERS = "ABCDEFGHIJKLMNOP"  # of the cells, row by row


class Inexpressible(ValueError):
  """The image cannot be put into words cell by cell, or not into words of the training."""


def request(record: dict) -> str:
  """What a record asks for, in the one form that thoughts use."""
  include = record["include"]
  nouns = [tasks.noun(c["count"], c["class"], c.get("color"), article=False) for c in include]
  for noun, clause in zip(nouns, include):
    if "position" in clause:
      relation, other = clause["position"]
      return f"{noun} {relation} {nouns[other]}"
  return ", ".join(nouns)


def plan(record: dict, scene: world.Scene, cells=None) -> str:
  """The thought before the first image.

  Args:
    cells: where they do not follow from the places, as in a careless plan.
  """
  return (f"<think> The picture shows {request(record)}. {places(scene, record)} "
          f"{grid_text(cells or grid(scene.things))} </think>")


def describe(seen) -> str:
  """What an image shows; `seen` has background, things and unclear (a Scene has no unclear)."""
  return f"The ground is {seen.background}. {grid_text(grid(seen.things, _unclear(seen)))}"


def reflect(record: dict, verdict, better: world.Scene, before: str) -> str:
  """The thought after an image: what falls short and how it becomes `better`.

  Args:
    record, verdict: what was asked for, and the verifier's on the image.
    before: the thought that the image was drawn after.

  Raises:
    Inexpressible: as `read_places` of `before`.
  """
  seen = verdict.seen
  cells = grid(seen.things, seen.unclear)
  steps = edits(cells, grid(better.things))
  short = ", ".join(verdict.faults) or "nothing"
  wanted = f"the prompt asks for {request(record)}" if verdict.faults else "none"
  return (f"<think> I see: {describe(seen)} {listed(cells, read_places(before))} "
          f"What falls short: {short}. Improvements: {wanted}. Steps: {', '.join(steps)}. "
          f"Final prompt: {describe(better)} </think>")


def edits(before, after) -> list[str]:
  """The steps from one list of cells to another."""
  steps = [f"put {new} {letter}" for letter, old, new in zip(_LETTERS, before, after) if old != new]
  return steps + ["keep the rest" if steps else "keep everything"]


def places(scene: world.Scene, record: dict | None = None) -> str:
  """The ground, and what stands where; with a record see `_in_prompt_order`."""
  things = scene.things if record is None else _in_prompt_order(scene, record)
  named = ", ".join(f"{t.color} {t.shape} {_LETTERS[_number(t.cell)]}" for t in things)
  return f"The ground is {scene.background}. Places: {named or 'none'}."


def _in_prompt_order(scene, record):
  """The things as the prompt speaks of them, those of a clause from the first cell to the last.

  So the next of several like things needs a later letter, and none is chosen twice by mistake.
  """
  things = iter(scene.things)
  groups = [sorted(itertools.islice(things, clause["count"]), key=lambda t: t.cell)
            for clause in record["include"]]
  if any("position" in clause for clause in record["include"]):
    groups.reverse()  # "a star above a cross": the cross is the first clause
  return [thing for group in groups for thing in group]


def _number(cell):
  row, column = cell
  return world.GRID * row + column


def grid(things, unclear=()) -> list[str]:
  """What stands in each cell, row by row: "red circle", "empty ground" or "unclear shape".

  Raises:
    Inexpressible: two things in one cell, or a pair that training must not show.
  """
  cells = [EMPTY] * world.GRID**2
  named = [(t.cell, f"{t.color} {t.shape}") for t in things]
  for cell, name in [*named, *((cell, UNCLEAR) for cell in unclear)]:
    if cells[_number(cell)] != EMPTY:
      raise Inexpressible("two things in one cell")
    cells[_number(cell)] = name
  return cells


def listed(cells, first=()) -> str:
  """What stands in a list of cells: at the letters `first`, in their order, then elsewhere.

  The empty cells are left out, but not those of `first`.
  """
  there = dict(zip(_LETTERS, cells))
  others = [at for at, cell in there.items() if cell != EMPTY and at not in first]
  return f"Things: {', '.join(f'{at} {there[at]}' for at in [*first, *others]) or 'none'}."


def grid_text(cells) -> str:
  return f"Cells: {' '.join(f'{letter} {cell}' for letter, cell in zip(_LETTERS, cells))}."


def read_grid(text: str) -> list[str] | None:
  """The last list of cells that a text speaks of; None if there is none."""
  pattern = " ".join(rf"{letter} ([a-z]+ [a-z]+)" for letter in _LETTERS)
  found = re.findall(rf"Cells: {pattern}\.", text)
  return list(found[-1]) if found else None


def read_places(text: str) -> list[str]:
  """The letters of the cells that a thought wants things in, a letter perhaps twice.

  Those of a plan are in its order; a reflection has no places, so they are those of the things in
  its final prompt.

  Raises:
    Inexpressible: they cannot be read.
  """
  if found := re.findall(r"Places: ([^.]*)\.", text):
    named = [re.fullmatch("[a-z]+ [a-z]+ ([A-P])", place) for place in found[-1].split(", ")]
    if found[-1] == "none" or all(named):
      return [place[1] for place in named if place]
  elif cells := read_grid(text):
    return [at for at, cell in zip(_LETTERS, cells) if cell != EMPTY]
  raise Inexpressible("a thought before that cannot be read")


def read_scene(text: str) -> world.Scene | None:
  """The scene of the last ground and cells that a text speaks of; None if there is none.

  Its things are of middle size and stand in the middle of their cells. A cell whose words are no
  colour and shape is taken as empty.
  """
  grounds, cells = re.findall(r"The ground is ([a-z]+)\.", text), read_grid(text)
  if not grounds or cells is None:
    return None
  radius = (world.MIN_RADIUS + world.MAX_RADIUS) / 2
  things = []
  for i, cell in enumerate(cells):
    color, shape = cell.split()
    if shape in world.SHAPES and color in world.COLORS:
      row, column = divmod(i, world.GRID)
      things.append(world.Thing(shape, color, (column + 0.5) * world.CELL,
                                (row + 0.5) * world.CELL, radius))
  return world.Scene(grounds[-1], tuple(things))


def read_faults(text: str) -> tuple[str, ...] | None:
  """What a reflection says falls short; None if it says nothing readable."""
  found = re.search(r"What falls short: ([^.]*)\.", text)
  if not found:
    return None
  return () if found[1] == "nothing" else tuple(found[1].split(", "))


def improve(record: dict, verdict, rng) -> world.Scene:
  """The better image: what was asked for, with as much of the seen image as may stay.

  Its things stand in the order of the prompt.

  Raises:
    Inexpressible: the seen image shows what training must not, or no arrangement was found.
  """
  seen = verdict.seen
  check_showable(seen)
  matches = _matches(record["include"], seen.things)
  if verdict.correct:
    return _checked(world.Scene(seen.background, tuple(t for group in matches for t in group)))
  for attempt in range(2000):
    keep = 1.0 if attempt < 300 else 0.6 if attempt < 600 else 0.0
    kept = [[t for t in group if rng.random() < keep] for group in matches]
    things = _complete(record["include"], kept, seen, rng, 8.0 if attempt < 600 else 1.0)
    if things is not None:
      return _checked(world.Scene(seen.background, things))
  raise Inexpressible("no arrangement found")


def check_showable(seen) -> None:
  """Refuses what was seen in an image that training must not show.

  Raises:
    Inexpressible: an unseen pair, or no known ground.
  """
  if any((t.shape, t.color) in tasks.UNSEEN_PAIRS for t in seen.things):
    raise Inexpressible("a pair that training must not show")
  if seen.background is None:
    raise Inexpressible("no known ground")


def _checked(scene):
  grid(scene.things)
  return scene


def _matches(include, things):
  """The things that each clause can claim, no more than it asks for; coloured clauses first."""
  left, matches = list(things), [[] for _ in include]
  for i in sorted(range(len(include)), key=lambda i: "color" not in include[i]):
    clause = include[i]
    for thing in list(left):
      if (len(matches[i]) < clause["count"] and thing.shape == clause["class"]
          and thing.color == clause.get("color", thing.color)):
        matches[i].append(thing)
        left.remove(thing)
  return matches


def _complete(include, kept, seen, rng, lure):
  """Things for all clauses around those kept; None if this draw does not fit.

  A thing that is wrong is best replaced where it stands: such cells are `lure` times as likely.
  """
  fixed = [t for group in kept for t in group]
  owners = [i for i, group in enumerate(kept) for _ in group]
  free = [divmod(i, world.GRID) for i in range(world.GRID**2)]
  free = [c for c in free if c not in {t.cell for t in fixed}]
  wrong = {t.cell for t in seen.things if t not in fixed} | set(_unclear(seen))
  weights = np.array([lure if c in wrong else 1.0 for c in free])
  missing = [i for i, clause in enumerate(include) for _ in range(clause["count"] - len(kept[i]))]
  picked = rng.choice(len(free), len(missing), replace=False, p=weights / weights.sum())
  cells = [free[i] for i in picked]
  groups = [[t.cell for t in kept[i]] + [c for c, owner in zip(cells, missing) if owner == i]
            for i in range(len(include))]
  if not tasks.relations_hold(include, groups):
    return None
  places = [(t.x, t.y, t.radius) for t in fixed]
  things = list(fixed)
  for cell, owner in zip(cells, missing):
    place = world.place_beside(cell, places, rng)
    if place is None:
      return None
    places.append(place)
    things.append(world.Thing(include[owner]["class"], tasks.color_of(include[owner], rng), *place))
  return tuple(things[i] for i in np.argsort(owners + missing, kind="stable"))


def _unclear(seen):
  return getattr(seen, "unclear", ())
