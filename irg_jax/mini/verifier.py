"""Reads an image alone, says what stands where, and scores it against a record.

Nothing here knows how an image was painted: the shapes are drawn anew from their corners, and
only their names, the palette and the size of the image come from the world's description.

An image is read in three steps. What is clearly unlike the background falls into blobs. Each
blob's area and middle say how large and where each shape would have to be; all are drawn so, and
the one that explains the blob's pixels names it, if it does so well and well before the second.
Last, what the shapes found leave unexplained makes them, or the place it stands at, unclear.
"""

import dataclasses

import numpy as np
from scipy import ndimage

from irg_jax.mini import outlines, tasks, world

# Levels are distances between colours, of 0 to 442. The limits lie between what painted images
# show after slight blur, noise and shifts of colour, and what damaged ones show.
_UNLIKE = 26.0  # levels from the background that make a pixel part of a blob, ...
_BESIDE = 0.3  # ... and the share of the strongest pixel nearby, so that soft edges do not join
_BACKGROUND = 34.0  # levels around a named background
_COLOR = 28.0  # levels around a named colour; half-way between two is at least 38
_AREA = 10  # pixels; smaller specks are passed over
_RADII = (5.0, 8.3)
_NOISE = 60.0  # levels squared a pixel that may count as noise, all three channels together
_ERROR = 0.11  # squared error of the cover by pixel of outline
_AHEAD = 1.7  # by how much the second shape's error is larger than the first's
_GAP = 0.23  # error of the cover, averaged over 3 x 3 pixels: a part is missing or added
_LEFT = 24.0  # levels, averaged over 3 x 3 pixels, that nothing found explains
_WINDOW = 26  # pixels a side around the largest blob that can be a thing

_APART = 6.0  # pixels that a thing stands in the direction of a relation, at least, ...
_STRAIGHT = 0.5  # ... and the share of the whole way


@dataclasses.dataclass(frozen=True)
class Seen:
  """What an image shows.

  Attributes:
    background: its name, or None if it is none of the world's.
    things: in reading order of their cells; places and radii in pixels.
    unclear: cells (row, column) of what is clearly there and no known shape in a known colour.
  """

  background: str | None
  things: tuple[world.Thing, ...]
  unclear: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Whether an image is what was asked for, and each fault in words."""

  correct: bool
  faults: tuple[str, ...]
  seen: Seen


def score(image, record: dict) -> Verdict:
  """Reads an image, uint8 [64, 64, 3], and judges it against a record of the tasks."""
  return judge(look(image), record)


def look(image) -> Seen:
  """What an image shows.

  Args:
    image: uint8 [64, 64, 3].

  Raises:
    ValueError: for another size or type.
  """
  image = np.asarray(image)
  if image.shape != (world.SIZE, world.SIZE, 3) or image.dtype != np.uint8:
    raise ValueError(f"an image of the mini world is uint8 [{world.SIZE}, {world.SIZE}, 3], "
                     f"not {image.dtype} {list(image.shape)}")
  image = image.astype(np.float32)
  ground, noise = _ground(image)
  blobs, count = _blobs(image - ground)
  fits = [_fit(image - ground, blobs, i + 1, box, noise)
          for i, box in enumerate(ndimage.find_objects(blobs, count))]
  things, unclear = _explained(image - ground, blobs, fits, ground)
  name = _nearest(ground, world.BACKGROUNDS, _BACKGROUND)
  return Seen(name, tuple(sorted(things, key=lambda t: (t.cell, t.x))), tuple(sorted(unclear)))


def judge(seen: Seen, record: dict) -> Verdict:
  """Judges what is seen against a record: each clause's count exactly, and nothing else.

  Args:
    seen: from `look`.
    record: as in the tasks.

  Returns:
    the verdict; its faults stand in this order: unclear, missing, too many, wrongly placed.
  """
  include = record["include"]
  groups, extra = _assign(seen.things, include)
  faults = []
  if seen.unclear:
    faults.append(_sentence(len(seen.unclear), "shape", None, "unclear"))
  for clause, group in zip(include, groups):
    if len(group) < clause["count"]:
      lacking = clause["count"] - len(group)
      faults.append(_sentence(lacking, clause["class"], clause.get("color"), "missing"))
  kinds = [(t.shape, t.color) for t in extra]
  faults += [_sentence(kinds.count(kind), *kind, "too many") for kind in dict.fromkeys(kinds)]
  faults += _misplaced(include, groups)
  return Verdict(not faults, tuple(faults), seen)


def _assign(things, include):
  """(the things of each clause, the rest): clauses that name a colour choose first."""
  groups, left = [[] for _ in include], list(things)
  for i in sorted(range(len(include)), key=lambda i: "color" not in include[i]):
    clause = include[i]
    fit = [t for t in left if t.shape == clause["class"]
           and t.color == clause.get("color", t.color)]
    groups[i] = fit[:clause["count"]]
    left = [t for t in left if all(t is not other for other in groups[i])]
  return groups, left


def _misplaced(include, groups):
  """A sentence for each relation that a pair of the things there does not keep."""
  faults = []
  for clause, group in zip(include, groups):
    if "position" in clause:
      relation, other = clause["position"]
      if not all(_stands(a, relation, b) for a in group for b in groups[other]):
        verb = "is" if clause["count"] == 1 else "are"
        faults.append(f"the {_name(clause)} {verb} not {relation} the {_name(include[other])}")
  return faults


def _stands(a, relation, b):
  """Whether a thing stands clearly so, seen from another: far enough, and not far to the side."""
  right, down = a.x - b.x, a.y - b.y
  ahead = {"left of": -right, "right of": right, "above": -down, "below": down}[relation]
  return ahead >= _APART and ahead >= _STRAIGHT * np.hypot(right, down)


def _name(clause):
  return tasks.noun(clause["count"], clause["class"], clause.get("color"), False).split(" ", 1)[1]


def _sentence(count, shape, color, fault):
  """"one red circle is missing", "two shapes are unclear"."""
  noun = tasks.noun(min(count, 5), shape, color, False)
  if count > 5:
    noun = "many " + noun.split(" ", 1)[1]
  return f"{noun} {'is' if count == 1 else 'are'} {fault}"


def _ground(image):
  """The background's colour [3] and the noise around it, in levels squared a pixel."""
  ground = np.median(image[::2, ::2].reshape(-1, 3), axis=0)
  for _ in range(2):
    square = _square(image - ground)
    near = (square < _UNLIKE**2).astype(np.float32)
    if not near.any():
      return ground, 0.0
    ground = np.einsum("hw,hwc->c", near, image) / near.sum()
  return ground, min(float((square * near).sum() / near.sum()), _NOISE)


def _square(offsets):
  """The squared lengths of colours, [..., 3] to [...]."""
  return np.einsum("...c,...c->...", offsets, offsets)


def _blobs(offset):
  """Labels [64, 64] of what is unlike the background, and how many blobs there are.

  Args:
    offset: the image less its background, float32 [64, 64, 3].
  """
  level = np.sqrt(_square(offset))
  strongest = ndimage.maximum_filter(level, 5)
  labels, count = ndimage.label((level > _UNLIKE) & (level > _BESIDE * strongest), np.ones((3, 3)))
  sizes = np.bincount(labels.ravel(), minlength=count + 1)
  keep = sizes >= _AREA
  keep[0] = False
  names = np.where(keep, np.cumsum(keep), 0)
  return names[labels], int(keep.sum())


@dataclasses.dataclass(frozen=True)
class _Fit:
  """A blob read as a shape: its place, its colour less the background's, and how it explains it."""

  shape: str
  x: float
  y: float
  radius: float
  offset: np.ndarray
  window: tuple[slice, slice]
  cover: np.ndarray
  error: float
  second: float


def _fit(offset, blobs, label, box, noise) -> _Fit | None:
  """The shape that explains a blob best; None if it is too large to be a thing.

  Args:
    offset: the image less its background, float32 [64, 64, 3].
    blobs: labels [64, 64].
    label: the blob's.
    box: the slices around it.
    noise: levels squared a pixel.
  """
  if max(s.stop - s.start for s in box) + 4 > _WINDOW:
    return None
  window = tuple(slice(max(0, s.start - 2), min(world.SIZE, s.stop + 2)) for s in box)
  near, own = offset[window], blobs[window] == label
  free = own | (ndimage.maximum_filter(own, 5) & (blobs[window] == 0))
  color = _core(near[own])
  size = max(float(color @ color), 1.0)
  cover = near @ color / size * free
  area = max(float(cover.sum()), 1.0)
  table = outlines.table()
  radius = np.sqrt(area / table.areas)
  rows, columns = (np.arange(s.start, s.stop, dtype=np.float32) + 0.5 for s in window)
  y = float(cover.sum(1) @ rows) / area - table.middles * radius
  x = np.full_like(y, float(cover.sum(0) @ columns) / area)
  drawn = outlines.draw(x, y, radius, window)
  aside = (_square(near)[free].sum() - (cover**2).sum() * size) / size
  error = ((cover - drawn * free) ** 2).sum((1, 2)) + aside - free.sum() * noise / size
  error = np.maximum(error, 0) / (table.lengths * radius)
  best, second = np.argsort(error)[:2]
  return _Fit(world.SHAPES[best], float(x[best]), float(y[best]), float(radius[best]), color,
              window, drawn[best], float(error[best]), float(error[second]))


def _core(offsets):
  """The colour of a blob less the background's: the middle of its strongest pixels."""
  level = _square(offsets)
  strongest = np.argpartition(level, int(0.6 * len(level)))[int(0.6 * len(level)):]
  return np.median(offsets[strongest], axis=0)


def _explained(offset, blobs, fits, ground):
  """(things, unclear cells): which fits hold, and what they leave unexplained."""
  rest = offset.copy()
  for fit in fits:
    if fit is not None:
      rest[fit.window] -= fit.cover[..., None] * fit.offset
  unlike = _square(rest) > _UNLIKE**2
  rest = np.sqrt(_square(ndimage.uniform_filter(rest, (3, 3, 1))))
  things, unclear = [], []
  for label, fit in enumerate(fits, 1):
    color = fit and _nearest(ground + fit.offset, world.COLORS, _COLOR)
    if color and _is_clear(fit, rest[fit.window]):
      things.append(world.Thing(fit.shape, color, fit.x, fit.y, fit.radius))
    else:
      unclear.append(_middle_cell(blobs == label))
  known = ndimage.maximum_filter(blobs > 0, 5)
  strays, count = ndimage.label((rest > _LEFT) & unlike & ~known, np.ones((3, 3)))
  unclear += [_middle_cell(strays == i + 1) for i in range(count)
              if (strays == i + 1).sum() >= _AREA]
  return things, unclear


def _is_clear(fit, rest):
  """Whether a fit explains its blob well, everywhere, and better than any other shape would."""
  part = rest[fit.cover > 0].max(initial=0.0) / np.sqrt(fit.offset @ fit.offset)
  return (_RADII[0] <= fit.radius <= _RADII[1] and fit.error <= _ERROR
          and fit.second >= _AHEAD * fit.error and part <= _GAP)


def _nearest(color, palette, within):
  """The palette's name for a colour; None if none is as near as `within` levels."""
  distances = {name: float(np.linalg.norm(color - np.asarray(levels)))
               for name, levels in palette.items()}
  name = min(distances, key=distances.get)
  return name if distances[name] <= within else None


def _middle_cell(mask):
  return tuple(int(v.mean()) // world.CELL for v in np.nonzero(mask))
