"""Texts of the mini world: plans, descriptions, reflections; and the improved scene.

The cells of an image have letters, A to P, row by row. A plan first chooses a cell for each thing,
then lists the content of all cells. The choices are robust to a low temperature; the cells follow
from them, and give each image token words of its own. Each cell is a letter and two words, so a
model finds a cell by its letter, at a constant distance.

  <think> The picture shows two red circles left of one blue star. The ground is grey. Places:
  red circle E, red circle I, blue star G. Cells: A empty ground B empty ground ... </think>

A reflection has the four parts of IRGL: faults (after what is seen), improvements, steps, final
prompt. Things seen are listed in the order of the places in the thought before, so faults are the
differences of two lists, without counting. Steps name a cell after its thing, like places, so the
final prompt is looked up like a plan. Things have the letter first, and are not looked up.

  <think> I see: The ground is grey. Cells: A empty ground ... Things: E red circle, I empty
  ground, G blue star. What falls short: one red circle is missing. Improvements: the prompt asks
  for two red circles left of one blue star. Steps: put red circle I, keep the rest. Final
  prompt: The ground is grey. Cells: A empty ground ... </think>

In an aided world it begins with the request, and of what is seen it names the cells alone that are
not as they shall be. A small model copies the nearest list of cells: a second one in a reflection
would become its final prompt, or, if it stood last, the image. Here the final prompt is the plan,
where that is right, and stands directly before the image, as a plan does.

  <think> First, the prompt asks for two red circles. I see: The ground is grey. Wrong: ι plain
  empty ground. What falls short: one red circle is missing. Improvements: show all of it. Steps:
  draw again what is wrong, keep the rest. Final prompt: The ground is grey. Cells: A plain ...
"""

import itertools
import re

import numpy as np

from irg_jax.mini import verifier
from irg_jax.mini.scenes import color_of, detail_of, place_beside, relations_hold
from irg_jax.mini.world import (
    CELL, COLORS, GRID, WORLD1, Scene, Thing, World, nouns, relations)

SYSTEM_PROMPT = "Think, draw, look, and draw again."
SATISFIED = "What falls short: nothing."  # see `generate.settings.Defaults`
QUESTION = "What does the picture show?"
REQUEST = "What shall the picture show?"
EMPTY, UNCLEAR = "empty ground", "unclear shape"
_AGAIN, _REST, _ALL = "draw again what is wrong", "keep the rest", "keep everything"  # steps

LETTERS = "ABCDEFGHIJKLMNOP"  # of the cells, row by row
# In an aided world, of the cells of an image that is looked at: a small model that looks up "E" can
# hardly tell what is there from what was planned.
SEEN_LETTERS = "αβγδεζηθικλμνξοπ"


class Inexpressible(ValueError):
  """The scene cannot be put into words, or not into words that training may show."""


def request(record: dict) -> str:
  """The request of a record, in the fixed wording of thoughts and the order of its prompt."""
  named, placed = nouns(record["include"], article=False), _relations(record)
  alone = {*range(len(named))} - {i for first, _, other in placed for i in (first, other)}
  said = [f"{named[i]} {relation} {named[other]}" for i, relation, other in placed]
  return ", ".join(said + [named[i] for i in sorted(alone)])


def _relations(record):
  """`relations`, where possible as the prompt says them: then a model need not turn them round."""
  return record.get("placed") or relations(record["include"])


def plan(record: dict, scene: Scene, cells=None) -> str:
  """The thought before the first image; `cells` are those of a careless plan, else of the scene."""
  return (f"<think> The picture shows {request(record)}. {places(scene, record)} "
          f"{grid_text(cells or grid(scene))} </think>")


def describe(scene) -> str:
  """The background and cells of a `Scene` or a `verifier.Seen`."""
  return f"The ground is {scene.background}. {grid_text(grid(scene))}"


def observe(seen) -> str:
  """`describe` of an image that is looked at; in an aided world the letters are `SEEN_LETTERS`."""
  letters = SEEN_LETTERS if seen.world.aided else LETTERS
  return f"The ground is {seen.background}. {grid_text(grid(seen), letters)}"


def reflect(record: dict, verdict, better: Scene, before: str) -> str:
  """The thought after an image: its faults, and the steps to the scene `better`.

  In an aided world it says first what the prompt asks for: faults follow from that.

  Inexpressible where `before`, the thought before the image, has no readable places.
  """
  seen, faults = verdict.seen, verdict.faults
  cells, after, letters = grid(seen), grid(better), read_places(before)
  asked, final = f"the prompt asks for {request(record)}", f"Final prompt: {describe(better)}"
  short = f"What falls short: {', '.join(faults) or 'nothing'}. Improvements:"
  if better.world.aided:
    said = f"First, {asked}. I see: The ground is {seen.background}. {unlike(cells, after)}"
    improved, steps = "show all of it", [_AGAIN, _REST] if cells != after else [_ALL]
  else:
    said, improved = f"I see: {observe(seen)} {listed(cells, letters)}", asked
    steps = edits(cells, after)
  return (f"<think> {said} {short} {improved if faults else 'none'}. "
          f"Steps: {', '.join(steps)}. {final} </think>")


def edits(before, after) -> list[str]:
  """The steps from one list of cells to another."""
  steps = [f"put {new} {letter}" for letter, old, new in zip(LETTERS, before, after) if old != new]
  return steps + [_REST if steps else _ALL]


def places(scene: Scene, record: dict | None = None) -> str:
  """The ground and the cell of each thing; with a record, in the order of its prompt.

  Like things stand in the order of their cells, so that no letter repeats.
  """
  things = scene.things
  if record:
    rest = iter(things)
    groups = [sorted(itertools.islice(rest, clause["count"]), key=lambda t: t.cell)
              for clause in record["include"]]
    # "a star above a cross": the cross is the first clause.
    first = [i for i, _, other in _relations(record) for i in (i, other)]
    things = itertools.chain(*(groups[i] for i in dict.fromkeys([*first, *range(len(groups))])))
  named = [f"{t.kind} {LETTERS[GRID * t.cell[0] + t.cell[1]]}" for t in things]
  return f"The ground is {scene.background}. Places: {', '.join(named) or 'none'}."


def grid(seen) -> list[str]:
  """The content of each cell of a `Scene` or a `verifier.Seen`, row by row.

  It is "red circle", "empty ground" or "unclear shape", each with the first detail before it in a
  world with details. Inexpressible where two things are in one cell.
  """
  empty, unclear = (f"{seen.world.details[0]} {name}".lstrip() for name in (EMPTY, UNCLEAR))
  cells = [empty] * GRID**2
  named = [(t.cell, t.kind) for t in seen.things]
  for (row, column), name in [*named, *((cell, unclear) for cell in seen.unclear)]:
    if cells[GRID * row + column] != empty:
      raise Inexpressible("two things in one cell")
    cells[GRID * row + column] = name
  return cells


def grid_text(cells, letters=LETTERS) -> str:
  return f"Cells: {' '.join(f'{letter} {cell}' for letter, cell in zip(letters, cells))}."


def unlike(cells, wanted) -> str:
  """The cells of an image that are not as `wanted`."""
  found = [f"{at} {cell}" for at, cell, want in zip(SEEN_LETTERS, cells, wanted) if cell != want]
  return f"Wrong: {', '.join(found) or 'none'}."


def listed(cells, first=()) -> str:
  """The cells at the letters `first`, in their order, then all others that are not empty."""
  there = dict(zip(LETTERS, cells))
  others = [at for at, cell in there.items() if at not in first and not cell.endswith(EMPTY)]
  said = [f"{at} {there[at]}" for at in [*first, *others]]
  return f"Things: {', '.join(said) or 'none'}."


def read_grid(text: str, letters=LETTERS) -> list[str] | None:
  """The last list of cells in a text; None if there is none."""
  for word in ("[a-z]+ [a-z]+", "[a-z]+ [a-z]+ [a-z]+"):
    pattern = " ".join(f"{letter} ({word})" for letter in letters)
    if found := re.findall(rf"Cells: {pattern}\.", text):
      return list(found[-1])
  return None


def read_places(text: str) -> list[str]:
  """The letters of the cells where a thought wants things; Inexpressible if it cannot be read.

  They are a plan's places, in its order, maybe with repeats; or the filled cells of a reflection's
  final prompt.
  """
  if found := re.findall(r"Places: ([^.]*)\.", text):
    named = [re.fullmatch("[a-z]+ [a-z]+ (?:[a-z]+ )?([A-P])", place)
             for place in found[-1].split(", ")]
    if found[-1] == "none" or all(named):
      return [place[1] for place in named if place]
  elif cells := read_grid(text):
    return [at for at, cell in zip(LETTERS, cells) if not cell.endswith(EMPTY)]
  raise Inexpressible("a thought before that cannot be read")


def read_scene(text: str, world: World = WORLD1) -> Scene | None:
  """The scene of the last ground and cells in a text, with medium things; None if there is none.

  A cell whose words are no colour and shape (and detail) counts as empty.
  """
  cells = read_grid(text)
  grounds = re.findall(r"The ground is ([a-z]+)\.(?: Places: [^.]*\.)? Cells: A", text)
  if not grounds or cells is None:
    return None
  things = []
  for i, cell in enumerate(cells):
    *detail, color, shape = cell.split()
    radii = world.radii.get(" ".join(detail))
    if shape in world.shapes and color in COLORS and radii:
      y, x = ((k + 0.5) * CELL for k in divmod(i, GRID))
      things.append(Thing(shape, color, x, y, sum(radii) / 2, *detail))
  return Scene(grounds[-1], tuple(things), world=world)


def read_faults(text: str) -> tuple[str, ...] | None:
  """The faults that a reflection names; None if it cannot be read."""
  found = re.search(r"What falls short: ([^.]*)\.", text)
  if not found:
    return None
  return () if found[1] == "nothing" else tuple(found[1].split(", "))


def read_seen(text: str) -> list[str] | None:
  """The cells that a reflection or description says it sees, as of `read_grid`.

  An aided reflection says them by what is not as in its final prompt.
  """
  if wrong := re.search(r"Wrong: ([^.]*)\.", text):
    said = [re.fullmatch("([α-π]) ([a-z ]+)", cell) for cell in wrong[1].split(", ")]
    if not (final := read_grid(text)) or wrong[1] != "none" and not all(said):
      return None
    return [*(dict(zip(SEEN_LETTERS, final)) | dict(c.groups() for c in said if c)).values()]
  text = text.split("What falls short:")[0]
  return read_grid(text, SEEN_LETTERS) or read_grid(text)


def improve(record: dict, verdict, rng, plan: str = "") -> Scene:
  """A correct scene, in the order of the prompt, that keeps as much of the image as possible.

  In an aided world, what is missing stands where `plan`, the thought before the image, has it, if
  that plan is right: only what was drawn badly is then drawn again, and nothing is planned again.

  Inexpressible where the image shows what training must not, or no arrangement was found.
  """
  seen = verdict.seen
  check_showable(seen)
  matches, _ = verifier.assign(seen.things, record["include"])
  if verdict.correct:
    things = tuple(itertools.chain(*matches))
    return _expressible(Scene(seen.background, things, world=seen.world))
  planned = read_scene(plan, seen.world) if seen.world.aided else None
  if planned and (things := _restored(record, matches, planned, rng)):
    return _expressible(Scene(seen.background, things, world=seen.world))
  for attempt in range(2000):
    keep = 1.0 if attempt < 300 else 0.6 if attempt < 600 else 0.0
    kept = [[t for t in group if rng.random() < keep] for group in matches]
    things = _complete(record["include"], kept, seen, rng, 8.0 if attempt < 600 else 1.0)
    if things is not None:
      return _expressible(Scene(seen.background, things, world=seen.world))
  raise Inexpressible("no arrangement found")


def _expressible(scene):
  grid(scene)  # raises
  return scene


def keeps(record: dict, verdict, better: Scene) -> bool:
  """Whether a better scene keeps what is right: all things asked for, but those that must move.

  Those are the things of a relation that does not hold.
  """
  groups, _ = verifier.assign(verdict.seen.things, record["include"])
  moved = {i for a, _, b in verifier.misplaced(record["include"], groups) for i in (a, b)}
  right = {thing for i, group in enumerate(groups) for thing in group if i not in moved}
  return right <= {*better.things}


def check_showable(seen) -> None:
  """Raises Inexpressible for an image that training must not show: unseen pair, unknown ground."""
  if any(t.pairs & seen.world.unseen_pairs for t in seen.things):
    raise Inexpressible("a pair that training must not show")
  if seen.background is None:
    raise Inexpressible("no known ground")


def _restored(record, kept, planned, rng):
  """The things of a right plan, those in `kept` as they are; None if it has them elsewhere."""
  if not verifier.judge_scene(planned, record).correct:
    return None
  wanted, _ = verifier.assign(planned.things, record["include"])
  there = [{t.cell: t for t in group} for group in kept]
  if any({*old} - {t.cell for t in new} for old, new in zip(there, wanted)):
    return None
  things, places_ = [], [(t.x, t.y, t.radius) for old in there for t in old.values()]
  for old, new in zip(there, wanted):
    for thing in new:
      if thing.cell not in old:
        place = place_beside(thing.cell, places_, rng, thing.detail, planned.world)
        if place is None:
          return None
        places_.append(place)
        thing = Thing(thing.shape, thing.color, *place, thing.detail)
      things.append(old.get(thing.cell, thing))
  return tuple(things)


def _complete(include, kept, seen, rng, lure):
  """Things for all clauses, around those kept; None if this sample does not fit.

  A wrong thing is best replaced where it stands, so its cell is `lure` times as likely.
  """
  fixed = [t for group in kept for t in group]
  taken = {t.cell for t in fixed}
  free = [divmod(i, GRID) for i in range(GRID**2)]
  free = [c for c in free if c not in taken]
  wrong = {t.cell for t in seen.things if t not in fixed} | set(seen.unclear)
  weights = np.array([lure if c in wrong else 1.0 for c in free])
  missing = [i for i, clause in enumerate(include) for _ in range(clause["count"] - len(kept[i]))]
  picked = rng.choice(len(free), len(missing), replace=False, p=weights / weights.sum())
  cells = [free[i] for i in picked]
  groups = [[t.cell for t in kept[i]] + [c for c, owner in zip(cells, missing) if owner == i]
            for i in range(len(include))]
  if not relations_hold(include, groups):
    return None
  places_, things = [(t.x, t.y, t.radius) for t in fixed], list(fixed)
  for cell, owner in zip(cells, missing):
    detail = detail_of(include[owner], rng, seen.world)
    if (place := place_beside(cell, places_, rng, detail, seen.world)) is None:
      return None
    places_.append(place)
    color = color_of(include[owner], rng, seen.world)
    things.append(Thing(include[owner]["class"], color, *place, detail))
  owners = [i for i, group in enumerate(kept) for _ in group] + missing
  return tuple(things[i] for i in np.argsort(owners, kind="stable"))
