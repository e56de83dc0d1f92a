"""The texts of the mini world: plans, descriptions, reflections, and the better picture.

The cells of a picture have letters, A to D in the first row and M to P in the last. A plan first
chooses a place for each thing, then goes through the picture cell by cell. The places are
choices that a low temperature makes as well as any other; the cells follow from them, and give
each picture token its own words. A cell is a letter and two words, so that a model finds what it
looks for by a letter that it has read before, and by a distance that is always the same.

  <think> The picture shows two red circles left of one blue star. The ground is grey. Places:
  red circle E, red circle I, blue star G. Cells: A empty ground B empty ground ... </think>

A reflection has the four parts of IRGL's: what falls short (after what is seen), the
improvements, the steps, and the final prompt, which has the form of a plan. What falls short is
not counted but looked up: for each place of the thought before, what is seen there.

  <think> I see: The ground is grey. Cells: A empty ground ... Places seen: red circle E red
  circle, red circle I empty ground, blue star G blue star. The rest: none. What falls short: one
  red circle is missing. Improvements: the prompt asks for two red circles left of one blue star.
  Steps: put red circle I, keep the rest. Final prompt: The ground is grey. Places: ... </think>
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
  """The picture cannot be put into words cell by cell, or not into words of the training."""


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
  """The thought before the first picture; `cells` as in `layout`."""
  return f"<think> The picture shows {request(record)}. {layout(scene, record, cells)} </think>"


def layout(scene: world.Scene, record: dict, cells=None) -> str:
  """Where things are to stand: their places, and what follows from them, cell by cell.

  Args:
    cells: where they do not follow from the places, as in a careless plan.
  """
  return f"{places(scene, record)} {grid_text(cells or grid(scene.things))}"


def describe(seen) -> str:
  """What a picture shows; `seen` has background, things and unclear (a Scene has no unclear)."""
  return f"The ground is {seen.background}. {grid_text(grid(seen.things, _unclear(seen)))}"


def reflect(record: dict, verdict, better: world.Scene, before: str) -> str:
  """The thought after a picture: what falls short and how it becomes `better`.

  Args:
    record, verdict: what was asked for, and the verifier's on the picture.
    better: its things in the order of the prompt.
    before: the thought that the picture was drawn after.

  Raises:
    Inexpressible: as `read_places` of `before`.
  """
  return _reflection(record, verdict, before, grid(better.things), layout(better, record))


def retell(record: dict, verdict, before: str) -> str:
  """A reflection on the picture of `verdict` that ends in what the plan `before` plans.

  Raises:
    Inexpressible: the plan cannot be read.
  """
  cells, final = read_grid(before), re.search(r"The ground is .*\.(?= </think>)", before)
  if cells is None or not final:
    raise Inexpressible("a plan that cannot be read")
  return _reflection(record, verdict, before, cells, final[0])


def _reflection(record, verdict, before, better, final):
  seen = verdict.seen
  cells = grid(seen.things, seen.unclear)
  steps = edits(cells, better)
  short = ", ".join(verdict.faults) or "nothing"
  wanted = f"the prompt asks for {request(record)}" if verdict.faults else "none"
  return (f"<think> I see: {describe(seen)} {compared(read_places(before), cells)} "
          f"What falls short: {short}. Improvements: {wanted}. Steps: {', '.join(steps)}. "
          f"Final prompt: {final} </think>")


def compared(planned: list, cells) -> str:
  """What is seen at each place of a thought (from `read_places`), and what is seen beside them."""
  there = dict(zip(_LETTERS, cells))
  found = ", ".join(f"{name} {letter} {there[letter]}" for name, letter in planned)
  others = [f"{letter} {cell}" for letter, cell in there.items()
            if cell != EMPTY and letter not in {letter for _, letter in planned}]
  return f"Places seen: {found or 'none'}. The rest: {', '.join(others) or 'none'}."


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


def listed(cells) -> str:
  """What stands in a list of cells, the empty ones left out, in the form of a plan's places."""
  there = [f"{cell} {letter}" for letter, cell in zip(_LETTERS, cells) if cell != EMPTY]
  return f"Places: {', '.join(there) or 'none'}."


def grid_text(cells) -> str:
  return f"Cells: {' '.join(f'{letter} {cell}' for letter, cell in zip(_LETTERS, cells))}."


def read_grid(text: str) -> list[str] | None:
  """The last list of cells that a text speaks of; None if there is none."""
  pattern = " ".join(rf"{letter} ([a-z]+ [a-z]+)" for letter in _LETTERS)
  found = re.findall(rf"Cells: {pattern}\.", text)
  return list(found[-1]) if found else None


def read_places(text: str) -> list[tuple[str, str]]:
  """The last places that a thought names, as ("red circle", "E"), a cell perhaps twice.

  Raises:
    Inexpressible: they cannot be read, or a pair is among them that training must not show.
  """
  found = re.findall(r"Places: ([^.]*)\.", text)
  if found and found[-1] == "none":
    return []
  named = found and [re.fullmatch(r"([a-z]+) ([a-z]+) ([A-P])", p) for p in found[-1].split(", ")]
  if not named or not all(named):
    raise Inexpressible("a plan that cannot be read")
  if any((shape, color) in tasks.UNSEEN_PAIRS for color, shape, _ in (n.groups() for n in named)):
    raise Inexpressible("a pair that training must not show")
  return [(f"{n[1]} {n[2]}", n[3]) for n in named]


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
  """The better picture: what was asked for, with as much of the seen picture as may stay.

  Its things stand in the order of the prompt.

  Raises:
    Inexpressible: the seen picture shows what training must not, or no arrangement was found.
  """
  seen = verdict.seen
  if any((t.shape, t.color) in tasks.UNSEEN_PAIRS for t in seen.things):
    raise Inexpressible("a pair that training must not show")
  if seen.background is None:
    raise Inexpressible("no known ground")
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
