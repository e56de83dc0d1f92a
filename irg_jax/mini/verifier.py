"""Verifier: reads an image alone, finds the things in it, and judges them against a record.

It shares no code with the painter. It draws the shapes itself, from their corners; only names,
colours and sizes come from `world`.

An image is read in three steps. Pixels unlike the background form blobs. The area and middle of a
blob give the size and place that each shape would have; all seven are drawn there, and the best
match names the blob if its error is small and well below the second. Last, a thing or place is
unclear where the things found do not explain the pixels.
"""

import dataclasses
import functools
import types

import numpy as np
from scipy import ndimage

from irg_jax.mini.world import (
    BACKGROUNDS, CELL, COLORS, SIZE, WORLD1, Thing, World, noun, nouns, of, relations)

# Levels are distances between colours, 0 to 442. The limits lie between the values of painted
# images after slight blur, noise and shifts of colour, and those of damaged images.
_UNLIKE = 26.0  # levels from the background that make a pixel part of a blob, ...
_BESIDE = 0.3  # ... and the share of the strongest pixel nearby, so that soft edges do not join
_BACKGROUND = 34.0  # levels around a named background
_COLOR = 28.0  # levels around a named colour; half-way between two is at least 38
_AREA = 10  # pixels; smaller specks are ignored
_RADII = (5.0, 8.3)
_NOISE = 60.0  # squared levels a pixel that may count as noise, all three channels together
_ERROR = 0.11  # squared error of the cover by pixel of outline
_AHEAD = 1.7  # least ratio of the second shape's error to the best one's
_GAP = 0.23  # error of the cover, averaged over 3 x 3 pixels: a part is missing or added
_LEFT = 24.0  # unexplained levels, averaged over 3 x 3 pixels
_WINDOW = 26  # pixels a side around the largest blob that can be a thing

_APART = 6.0  # pixels in the direction of a relation, at least, ...
_STRAIGHT = 0.5  # ... and their share of the whole distance
_WAYS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}

_FINE = 128  # samples to a radius in the tables of the shapes
_REACH = 1.2  # radii from the middle to the edge of the tables
_SQUARE = np.ones((3, 3))


@dataclasses.dataclass(frozen=True)
class Seen:
  """The content of an image."""

  background: str | None  # its name; None if it is no background of the world
  things: tuple[Thing, ...]  # in reading order of their cells
  unclear: tuple[tuple[int, int], ...]  # cells of objects that are no shape in a known colour
  world: World = dataclasses.field(default=WORLD1, repr=False)


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Whether an image is correct, and each fault in words."""

  correct: bool
  faults: tuple[str, ...]
  seen: Seen


def score(image, record: dict) -> Verdict:
  """Reads an image, uint8 [64, 64, 3], and judges it against a record."""
  return judge(look(image, of(record)), record)


def look(image, world: World = WORLD1) -> Seen:
  """The content of an image, uint8 [64, 64, 3]; ValueError for another size or type."""
  image = np.asarray(image)
  if image.shape != (SIZE, SIZE, 3) or image.dtype != np.uint8:
    raise ValueError(f"an image of the mini world is uint8 [{SIZE}, {SIZE}, 3], "
                     f"not {image.dtype} {list(image.shape)}")
  image = image.astype(np.float32)
  ground, noise = _ground(image)
  blobs, count = _blobs(image - ground)
  fits = [_fit(image - ground, blobs, i + 1, box, noise, world)
          for i, box in enumerate(ndimage.find_objects(blobs, count))]
  things, unclear = _explained(image - ground, blobs, fits, ground)
  name = _nearest(ground, BACKGROUNDS, _BACKGROUND)
  return Seen(name, tuple(sorted(things, key=lambda t: (t.cell, t.x))), tuple(sorted(unclear)),
              world)


def judge(seen: Seen, record: dict) -> Verdict:
  """Judges the content of an image: the exact count of each clause, and nothing else.

  The faults are in this order: unclear, missing, too many, wrongly placed.
  """
  include = record["include"]
  groups, extra = assign(seen.things, include)
  faults = [_sentence(len(seen.unclear), "unclear", "shape")] if seen.unclear else []
  for clause, group in zip(include, groups):
    if lacking := clause["count"] - len(group):
      faults.append(_sentence(lacking, "missing", clause["class"], clause.get("color"),
                              clause.get("detail")))
  kinds = [(t.shape, t.color, t.detail) for t in extra]
  faults += [_sentence(kinds.count(kind), "too many", *kind) for kind in dict.fromkeys(kinds)]
  faults += _misplaced(include, groups)
  return Verdict(not faults, tuple(faults), seen)


def assign(things, include) -> tuple[list[list], list]:
  """(things of each clause, the rest); the clauses that say more choose first."""
  groups, left = [[] for _ in include], list(things)
  for i in sorted(range(len(include)), key=lambda i: -len({"color", "detail"} & {*include[i]})):
    clause = include[i]
    fit = [t for t in left if t.shape == clause["class"]
           and t.color == clause.get("color", t.color)
           and t.detail == clause.get("detail", t.detail)]
    groups[i] = fit[:clause["count"]]
    left = [t for t in left if all(t is not other for other in groups[i])]
  return groups, left


def _misplaced(include, groups):
  """A sentence for each relation that some pair does not keep: far enough, not far to the side."""
  faults, names = [], [n.split(" ", 1)[1] for n in nouns(include)]
  for i, relation, other in relations(include):
    offsets = [(a.x - b.x, a.y - b.y) for a in groups[i] for b in groups[other]]
    if any(np.dot(o, _WAYS[relation]) < max(_APART, _STRAIGHT * np.hypot(*o)) for o in offsets):
      verb = "is" if include[i]["count"] == 1 else "are"
      faults.append(f"the {names[i]} {verb} not {relation} the {names[other]}")
  return faults


def _sentence(count, fault, shape, color=None, detail=None):
  """"one red circle is missing", "two shapes are unclear"."""
  number, name = noun(min(count, 5), shape, color, False, detail).split(" ", 1)
  return f"{number if count <= 5 else 'many'} {name} {'is' if count == 1 else 'are'} {fault}"


def _square(offsets):
  """Squared lengths of colours, [..., 3] to [...]."""
  return np.einsum("...c,...c->...", offsets, offsets)


def _ground(image):
  """The background's colour [3], and the noise on it in squared levels a pixel."""
  ground = np.median(image[::2, ::2].reshape(-1, 3), axis=0)
  for _ in range(2):
    square = _square(image - ground)
    near = (square < _UNLIKE**2).astype(np.float32)
    if not near.any():
      return ground, 0.0
    ground = np.einsum("hw,hwc->c", near, image) / near.sum()
  return ground, min(float((square * near).sum() / near.sum()), _NOISE)


def _blobs(offset):
  """Labels [64, 64] and number of the blobs; `offset` is the image less its background."""
  level = np.sqrt(_square(offset))
  strongest = ndimage.maximum_filter(level, 5)
  labels, count = ndimage.label((level > _UNLIKE) & (level > _BESIDE * strongest), _SQUARE)
  keep = np.bincount(labels.ravel(), minlength=count + 1) >= _AREA
  keep[0] = False
  return np.where(keep, np.cumsum(keep), 0)[labels], int(keep.sum())


def _fit(offset, blobs, label, box, noise, world):
  """The shape that explains a blob best; None if it is too large to be a thing.

  Args:
    offset: the image less its background, float32 [64, 64, 3].
    blobs, label, box: labels [64, 64]; the blob's label and bounding slices.
    noise: squared levels a pixel.

  Returns:
    shape, x, y, radius; offset: its colour less the background's; window (slices) and cover of
    its pixels; error, and that of the second best shape.
  """
  if max(s.stop - s.start for s in box) + 4 > _WINDOW:
    return None
  window = tuple(slice(max(0, s.start - 2), min(SIZE, s.stop + 2)) for s in box)
  near, own = offset[window], blobs[window] == label
  free = own | (ndimage.maximum_filter(own, 5) & (blobs[window] == 0))
  level, weak = _square(near[own]), int(0.6 * own.sum())
  color = np.median(near[own][np.argpartition(level, weak)[weak:]], axis=0)  # the strongest 40 %
  size = max(float(color @ color), 1.0)
  cover = near @ color / size * free
  area = max(float(cover.sum()), 1.0)
  areas, middles, lengths, _ = _shapes(world)
  radius = np.sqrt(area / areas)
  rows, columns = (np.arange(s.start, s.stop, dtype=np.float32) + 0.5 for s in window)
  y = float(cover.sum(1) @ rows) / area - middles * radius
  x = np.full_like(y, float(cover.sum(0) @ columns) / area)
  drawn = _draw(x, y, radius, window, world)
  aside = (_square(near)[free].sum() - (cover**2).sum() * size) / size
  error = ((cover - drawn * free) ** 2).sum((1, 2)) + aside - free.sum() * noise / size
  error = np.maximum(error, 0) / (lengths * radius)
  best, second = np.argsort(error)[:2]
  return types.SimpleNamespace(
      shape=world.shapes[best], x=float(x[best]), y=float(y[best]), radius=float(radius[best]),
      offset=color, window=window, cover=drawn[best], error=error[best], second=error[second])


def _explained(offset, blobs, fits, ground):
  """(things, unclear cells): the fits that hold, and the pixels they leave unexplained."""
  rest = offset.copy()
  for fit in filter(None, fits):
    rest[fit.window] -= fit.cover[..., None] * fit.offset
  unlike = _square(rest) > _UNLIKE**2
  rest = np.sqrt(_square(ndimage.uniform_filter(rest, (3, 3, 1))))
  things, unclear = [], []
  for label, fit in enumerate(fits, 1):
    color = fit and _nearest(ground + fit.offset, COLORS, _COLOR)
    part = fit and rest[fit.window][fit.cover > 0].max(initial=0.0) / np.linalg.norm(fit.offset)
    if (color and _RADII[0] <= fit.radius <= _RADII[1] and part <= _GAP
        and fit.error <= _ERROR and fit.second >= _AHEAD * fit.error):
      things.append(Thing(fit.shape, color, fit.x, fit.y, fit.radius))
    else:
      unclear.append(blobs == label)
  known = ndimage.maximum_filter(blobs > 0, 5)
  strays, count = ndimage.label((rest > _LEFT) & unlike & ~known, _SQUARE)
  unclear += [strays == i for i in range(1, count + 1) if (strays == i).sum() >= _AREA]
  middles = map(ndimage.center_of_mass, unclear)
  return things, [tuple(int(v) // CELL for v in middle) for middle in middles]


def _nearest(color, palette, within):
  """The name of the nearest colour of a palette; None if it is not `within` levels."""
  distances = {name: float(np.linalg.norm(color - levels)) for name, levels in palette.items()}
  name = min(distances, key=distances.get)
  return name if distances[name] <= within else None


@functools.cache
def _shapes(world):
  """Tables of the seven shapes of a world, in radii from their middle.

  Areas [7]; offsets of the centres of area downwards [7]; lengths of the outlines [7]; integral
  images [7, samples, samples].
  """
  at = (np.arange(int(2 * _REACH * _FINE)) + 0.5) / _FINE - _REACH
  drawn = [_mask(shape, at) for shape in world.shapes]
  masks = np.stack([mask for mask, _ in drawn]) / _FINE**2
  areas, sums = masks.sum((1, 2)), masks.cumsum(1).cumsum(2)
  return (areas, masks.sum(2) @ at / areas, np.array([length for _, length in drawn]),
          np.pad(sums, ((0, 0), (1, 0), (1, 0))).astype(np.float32))


def _mask(shape, at):
  """(mask, length of the outline): a disc, or triangles from the middle to each side."""
  x, y = at[None, :], at[:, None]
  if shape in ("circle", "ring"):
    distance, hole = np.hypot(x, y), 0.5 * (shape == "ring")
    return (distance <= 1) & (distance >= hole), 2 * np.pi * (1 + hole)
  mask, corners = np.zeros((len(at), len(at)), bool), _corners(shape)
  x0, y0 = corners.mean(0)
  for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, 0)):
    sides = (x0, y0, x1, y1), (x1, y1, x2, y2), (x2, y2, x0, y0)
    mask |= np.all([(c - a) * (y - b) - (d - b) * (x - a) >= 0 for a, b, c, d in sides], axis=0)
  return mask, np.hypot(*(corners - np.roll(corners, 1, 0)).T).sum()


def _corners(shape):
  """The corners of a shape, x to the right and y down, clockwise."""
  if shape == "triangle":
    return np.array([(0.0, -1.0), (1.0, 0.9), (-1.0, 0.9)])
  if shape == "star":
    turns = np.arange(10) * np.pi / 5
    reach = np.where(np.arange(10) % 2, 0.42, 1.05)
    return np.stack([reach * np.sin(turns), 0.08 - reach * np.cos(turns)], -1)
  quarter = {"square": [0.88 - 0.88j], "diamond": [-1.05j],
             "cross": [0.32 - 1j, 0.32 - 0.32j, 1 - 0.32j]}[shape]
  corners = np.concatenate([np.array(quarter) * turn for turn in (1, 1j, -1, -1j)])
  return np.stack([corners.real, corners.imag], -1)


def _draw(x, y, radius, window, world):
  """The share of each pixel that each shape covers, float [7, rows, columns].

  `x`, `y` and `radius` are [7], in pixels; `window` has the slices of the rows and columns.
  """
  sums, corners = _shapes(world)[-1], []
  for s, middle in zip(window, (y, x)):  # edges of pixels: the sample before, and the part beyond
    at = ((np.arange(s.start, s.stop + 1) - middle[:, None]) / radius[:, None] + _REACH) * _FINE
    at = np.clip(at, 0, len(sums[0]) - 1)
    low = np.minimum(at.astype(int), len(sums[0]) - 2)
    corners.append((low, at - low))
  (row, down), (column, right) = corners
  row, down, column, right = row[..., None], down[..., None], column[:, None], right[:, None]
  at = lambda i, j: sums[np.arange(len(x))[:, None, None], row + i, column + j]
  before, after = (at(0, j) * (1 - down) + at(1, j) * down for j in (0, 1))
  # The integral image at the four corners of a pixel gives its share.
  corner = before * (1 - right) + after * right
  return np.diff(np.diff(corner, axis=1), axis=2) * (radius**2)[:, None, None]
