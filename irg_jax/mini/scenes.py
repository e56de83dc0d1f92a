"""Scenes of the mini worlds, and the painter."""

import itertools
import math

import numpy as np
from scipy import ndimage

from irg_jax.mini.world import (
    BACKGROUNDS, CELL, COLORS, GRID, SIZE, WORLD1, Scene, Thing, World, lighter, of, relations,
    training_record)

_TONE = 6  # levels by which the colour of a background varies
_SHIFT = 1.0  # pixels between a thing and the middle of its cell, at most, in each direction
_GAP = 2.0  # pixels between the bounding squares of two things, at least
_FIRST_DETAIL = 0.6  # share of things with the first detail of a world, where it is left open
_ARRANGEMENTS = 8  # arrangements of which `_clear_cells` takes one
_WAYS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # x, y


def sample_scene(record: dict, rng) -> Scene:
  """A scene that shows exactly what a record asks for; all else is random.

  What the record leaves open never makes a pair held out of training. In an aided world relations
  hold clearly (`_clear_cells`).
  """
  world, include = of(record), record["include"]
  owners = [i for i, clause in enumerate(include) for _ in range(clause["count"])]
  groups = _clear_cells(include, rng) if world.aided else _cells(include, rng)
  cells = list(itertools.chain(*groups))
  details = [detail_of(include[i], rng, world) for i in owners]
  # Two large things in neighbouring cells fit only with small shifts: all are sampled again.
  while True:
    places = [_around(*pair, rng, world) for pair in zip(cells, details)]
    if all(_apart(a, b) for a, b in itertools.combinations(places, 2)):
      break
  things = tuple(Thing(include[i]["class"], color_of(include[i], rng, world), *place, detail)
                 for i, place, detail in zip(owners, places, details))
  tone = _sample_tone(rng)
  return Scene(str(rng.choice(list(BACKGROUNDS))), things, tone, world)


def _cells(include, rng, counts=None):
  """Cells of the things of each clause, such that all relations hold."""
  counts = counts or [clause["count"] for clause in include]
  while True:
    cells = iter(rng.choice(GRID**2, sum(counts), replace=False).tolist())
    groups = [[divmod(i, GRID) for i in itertools.islice(cells, count)] for count in counts]
    if relations_hold(include, groups):
      return groups


def _clear_cells(include, rng):
  """The same, in an arrangement that a small model can learn to plan.

  Of several samples, the one whose relations hold most clearly: off by a cell, a plan is still
  right. Things without relations stand in the order of the prompt, row by row.
  """
  placed = {i for first, _, other in relations(include) for i in (first, other)}
  counts = [clause["count"] * (i in placed) for i, clause in enumerate(include)]
  samples = [_cells(include, rng, counts) for _ in range(_ARRANGEMENTS if placed else 1)]
  groups = max(samples, key=lambda groups: _clearance(include, groups))
  taken = {*itertools.chain(*groups)}
  free = [c for c in itertools.product(range(GRID), repeat=2) if c not in taken]
  count = sum(clause["count"] for clause in include) - len(taken)
  rest = iter([free[i] for i in sorted(rng.choice(len(free), count, replace=False))])
  return [groups[i] or [*itertools.islice(rest, c["count"])] for i, c in enumerate(include)]


def training_scene(rng, world: World = WORLD1) -> Scene:
  """A scene of a `training_record`."""
  return sample_scene(training_record(rng, world), rng)


def crowded_scene(rng, world: World = WORLD1) -> Scene:
  """A scene with things in up to 13 cells, which no prompt asks for; it has no unseen pair."""
  kinds = {detail: [(shape, color) for shape in world.shapes for color in COLORS if not
                    {(shape, color), (shape, detail)} & world.unseen_pairs]
           for detail in world.details}
  cells, places = rng.permutation(GRID**2)[:rng.integers(1, GRID**2 - 2)], []
  for cell in cells:
    detail = _pick(world.details, rng)
    place = place_beside(divmod(int(cell), GRID), places, rng, detail, world)
    places += [(*place, detail)] if place else []
  things = tuple(Thing(*_pick(kinds[detail], rng), *place, detail) for *place, detail in places)
  return Scene(str(rng.choice(list(BACKGROUNDS))), things, _sample_tone(rng), world)


def color_of(clause, rng, world: World) -> str:
  """The colour of a clause, or a random one that training may show with its shape."""
  if "color" in clause:
    return clause["color"]
  return str(rng.choice([c for c in COLORS if (clause["class"], c) not in world.unseen_pairs]))


def detail_of(clause, rng, world: World) -> str:
  """The detail of a clause, or one that training may show with its shape: mostly the first."""
  if "detail" in clause:
    return clause["detail"]
  if len(world.details) == 1 or rng.random() < _FIRST_DETAIL:
    return world.details[0]
  return _pick([d for d in world.details if (clause["class"], d) not in world.unseen_pairs], rng)


def _pick(values, rng):
  """A random value; one alone needs no randomness."""
  return values[rng.integers(len(values))] if len(values) > 1 else values[0]


def relations_hold(include, groups) -> bool:
  """Whether all relations hold between `groups`, the cells of each clause; none on a diagonal."""
  return _clearance(include, groups) > 0


def _clearance(include, groups):
  """Cells by which the way of a relation is longer than that to its side: the least of all."""
  found = []
  for i, relation, other in relations(include):
    x, y = _WAYS[relation]
    for a, b in itertools.product(groups[i], groups[other]):
      down, right = a[0] - b[0], a[1] - b[1]
      found.append(x * right + y * down - abs(y * right + x * down))
  return min(found, default=GRID)


def place_beside(cell, others, rng, detail, world: World) -> tuple[float, float, float] | None:
  """A free place (x, y, radius) near the middle of a cell; None if 200 samples find none."""
  for _ in range(200):
    new = _around(cell, detail, rng, world)
    if all(_apart(new, other) for other in others):
      return new
  return None


def _around(cell, detail, rng, world):
  radius = rng.uniform(*world.radii[detail])
  shift = min(_SHIFT, (CELL - _GAP) / 2 - radius) if world.inside else _SHIFT
  y, x = ((i + 0.5) * CELL + rng.uniform(-shift, shift) for i in cell)
  low, high = radius + 0.5, SIZE - radius - 0.5
  return float(np.clip(x, low, high)), float(np.clip(y, low, high)), float(radius)


def _apart(a, b):
  return max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= a[2] + b[2] + _GAP


def _sample_tone(rng):
  return tuple(int(v) for v in rng.integers(-_TONE, _TONE + 1, 3))


_SAMPLES = 4  # a side of each pixel, for soft edges
_OUTLINE = 0.28  # width of the outline of a hollow shape, in radii


def paint(scene: Scene) -> np.ndarray:
  """The image of a scene, uint8 [64, 64, 3]."""
  image = np.tile(np.add(BACKGROUNDS[scene.background], scene.tone).astype(float), (SIZE, SIZE, 1))
  for thing in scene.things:
    window = tuple(slice(max(0, int(v - thing.radius - 2)), min(SIZE, int(v + thing.radius + 3)))
                   for v in (thing.y, thing.x))
    y, x = (np.arange(s.start, s.stop, 1 / _SAMPLES) + 0.5 / _SAMPLES for s in window)
    x, y = (x[None, :] - thing.x) / thing.radius, (y[:, None] - thing.y) / thing.radius
    inside = _INSIDE[thing.shape](x, y, scene.world)
    if thing.detail == "hollow":
      inside &= ndimage.distance_transform_edt(inside) < _OUTLINE * thing.radius * _SAMPLES
    _cover(image[window], inside, COLORS[thing.color])
    if thing.detail in _LIGHT:
      light = inside & _LIGHT[thing.detail](x, y, thing.shape)
      _cover(image[window], light, lighter(thing.color))
  return np.clip(np.round(image), 0, 255).astype(np.uint8)


def _cover(pixels, inside, color):
  """Lays a colour over pixels [H, W, 3] where samples, bool [4 H, 4 W], are inside."""
  cover = inside.reshape(len(pixels), _SAMPLES, -1, _SAMPLES).mean((1, 3))
  pixels += cover[..., None] * (color - pixels)


def _polygon(x, y, points):
  """Whether (x, y) is inside: a ray to the right meets an odd number of edges."""
  inside = np.zeros(np.broadcast(x, y).shape, bool)
  for (x1, y1), (x2, y2) in zip(points, points[1:] + points[:1]):
    if y1 != y2:
      inside ^= ((y1 > y) != (y2 > y)) & (x < x1 + (y - y1) * (x2 - x1) / (y2 - y1))
  return inside


def _star(x, y, world):
  return _polygon(x, y, [(r * math.sin(i * math.pi / 5), 0.08 - r * math.cos(i * math.pi / 5))
                         for i, r in enumerate((1.05, world.star) * 5)])


def _cross(x, y, world):
  return (np.minimum(abs(x), abs(y)) < world.cross) & (np.maximum(abs(x), abs(y)) < 1)


def _heart(x, y, world):
  """Two lobes over a point, and a notch between them that is wide enough for an outline."""
  lobes = (abs(x) - 0.5)**2 + (y + 0.4)**2 < 0.25
  return np.where(y < -0.4, lobes, abs(x) < (0.95 - y) / 1.35) & (abs(x) > 0.35 * (-0.3 - y))


# x to the right, y down, in radii from the middle of the thing.
_INSIDE = {
    "circle": lambda x, y, world: x**2 + y**2 < 1,
    "square": lambda x, y, world: np.maximum(abs(x), abs(y)) < 0.88,
    "triangle": lambda x, y, world: _polygon(x, y, [(0, -1), (1, 0.9), (-1, 0.9)]),
    "diamond": lambda x, y, world: abs(x) + abs(y) < 1.05,
    "star": _star, "cross": _cross, "heart": _heart,
    "ring": lambda x, y, world: (x**2 + y**2 < 1) & (x**2 + y**2 > 0.25),
}
_MIDDLE = {"triangle": 0.28, "star": 0.08, "heart": -0.1}  # of a dot, downwards
# Where a shape has the lighter tone.
_LIGHT = {
    "striped": lambda x, y, shape: abs(abs(y) - 0.4) < 0.2,
    "dotted": lambda x, y, shape: x**2 + (y - _MIDDLE.get(shape, 0))**2 < 0.36**2,
}
