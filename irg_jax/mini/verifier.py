"""Verifier: reads an image alone, finds the things in it, and judges them against a record.

It shares no code with the painter, see `fits`; only names, colours and sizes come from `world`.

An image is read in three steps. Pixels unlike the background form blobs. `fits` finds the shape
that explains a blob best; it names the blob if its error is small and well below the second. Last,
a thing or place is unclear where the things found do not explain the pixels.
"""

import dataclasses

import numpy as np
from scipy import ndimage

from irg_jax.mini.fits import fit, square
from irg_jax.mini.world import (
    BACKGROUNDS, CELL, COLORS, SIZE, WORLD1, Thing, World, noun, nouns, of, relations)

# Levels are distances between colours, 0 to 442. The limits lie between the values of painted
# images after slight blur, noise and shifts of colour, and those of damaged images.
_UNLIKE = 26.0  # levels from the background that make a pixel part of a blob, ...
_BESIDE = 0.3  # ... and the share of the strongest pixel nearby, so that soft edges do not join
_BACKGROUND = 34.0  # levels around a named background
_COLOR = 28.0  # levels around a named colour; half-way between two is at least 38
_AREA = 10  # pixels; smaller specks are ignored
_SMALLER, _LARGER = 0.5, 0.8  # pixels by which a radius may be out of the range of its world
_NOISE = 60.0  # squared levels a pixel that may count as noise, all three channels together
_ERROR = 0.11  # squared error of the cover by pixel of outline
_AHEAD = 1.7  # least ratio of the second shape's error to the best one's
_GAP = 0.23  # error of the cover, averaged over 3 x 3 pixels: a part is missing or added
_LEFT = 24.0  # unexplained levels, averaged over 3 x 3 pixels

_APART = 6.0  # pixels in the direction of a relation, at least, ...
_STRAIGHT = 0.5  # ... and their share of the whole distance
_WAYS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
_SQUARE = np.ones((3, 3))


@dataclasses.dataclass(frozen=True)
class Seen:
  """The content of an image."""

  background: str | None  # its name; None if it is no background of the world
  things: tuple[Thing, ...]  # in reading order of their cells
  unclear: tuple[tuple[int, int], ...]  # cells of objects that are no shape in a known colour
  world: World = dataclasses.field(default=WORLD1, repr=False)
  # Of each thing, then of each unclear object: how well its shape and its fill are drawn, 0 to 1.
  fidelity: tuple[tuple[float, float], ...] = ()
  # Levels by which the colour of the background is off the named one.
  tone: tuple[int, ...] = dataclasses.field(default=(0, 0, 0), compare=False)


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Whether an image is correct, each fault in words, and how much of it is right.

  `share` is the number of things that were asked for and are there, of those asked for or of those
  there, whichever are more; where things stand does not count. See also `Seen.fidelity`.
  """

  correct: bool
  faults: tuple[str, ...]
  seen: Seen
  share: float = 1.0


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
  fits = [fit(image, ground, blobs, i + 1, box, noise, world)
          for i, box in enumerate(ndimage.find_objects(blobs, count))]
  things, unclear = _explained(image - ground, blobs, fits, ground, world)
  name = _nearest(ground, BACKGROUNDS, _BACKGROUND)
  tone = tuple(int(v) for v in np.round(ground - BACKGROUNDS[name])) if name else (0, 0, 0)
  things, unclear = sorted(things, key=lambda t: (t[0].cell, t[0].x)), sorted(unclear)
  return Seen(name, tuple(t for t, _ in things), tuple(c for c, _ in unclear), world,
              tuple(f for _, f in things + unclear), tone)


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
  names = [name.split(" ", 1)[1] for name in nouns(include)]
  for i, relation, other in misplaced(include, groups):
    verb = "is" if include[i]["count"] == 1 else "are"
    faults.append(f"the {names[i]} {verb} not {relation} the {names[other]}")
  asked, there = sum(c["count"] for c in include), len(seen.things) + len(seen.unclear)
  share = sum(map(len, groups)) / max(asked, there, 1)
  return Verdict(not faults, tuple(faults), seen, share)


def judge_scene(scene, record: dict) -> Verdict:
  """Judges a scene as if it were seen."""
  return judge(Seen(scene.background, scene.things, (), scene.world), record)


def assign(things, include) -> tuple[list[list], list]:
  """(things of each clause, the rest); the clauses that say more choose first."""
  groups, left = [[] for _ in include], list(things)
  for i in sorted(range(len(include)), key=lambda i: -len({"color", "detail"} & {*include[i]})):
    groups[i] = [t for t in left if meant(t, include[i])][:include[i]["count"]]
    left = [t for t in left if all(t is not other for other in groups[i])]
  return groups, left


def meant(thing, clause) -> bool:
  """Whether a thing is of the kind that a clause asks for."""
  return (thing.shape == clause["class"] and thing.color == clause.get("color", thing.color)
          and thing.detail == clause.get("detail", thing.detail))


def misplaced(include, groups) -> list[tuple[int, str, int]]:
  """The relations that some pair does not keep: far enough, and not far to the side."""
  found = []
  for i, relation, other in relations(include):
    offsets = [(a.x - b.x, a.y - b.y) for a in groups[i] for b in groups[other]]
    if any(np.dot(o, _WAYS[relation]) < max(_APART, _STRAIGHT * np.hypot(*o)) for o in offsets):
      found.append((i, relation, other))
  return found


def _sentence(count, fault, shape, color=None, detail=None):
  """"one red circle is missing", "two shapes are unclear"."""
  number, name = noun(min(count, 5), shape, color, False, detail).split(" ", 1)
  return f"{number if count <= 5 else 'many'} {name} {'is' if count == 1 else 'are'} {fault}"


def _ground(image):
  """The background's colour [3], and the noise on it in squared levels a pixel."""
  ground = np.median(image[::2, ::2].reshape(-1, 3), axis=0)
  for _ in range(2):
    off = square(image - ground)
    near = (off < _UNLIKE**2).astype(np.float32)
    if not near.any():
      return ground, 0.0
    ground = np.einsum("hw,hwc->c", near, image) / near.sum()
  return ground, min(float((off * near).sum() / near.sum()), _NOISE)


def _blobs(offset):
  """Labels [64, 64] and number of the blobs; `offset` is the image less its background."""
  level = np.sqrt(square(offset))
  strongest = ndimage.maximum_filter(level, 5)
  labels, count = ndimage.label((level > _UNLIKE) & (level > _BESIDE * strongest), _SQUARE)
  keep = np.bincount(labels.ravel(), minlength=count + 1) >= _AREA
  keep[0] = False
  return np.where(keep, np.cumsum(keep), 0)[labels], int(keep.sum())


def _explained(offset, blobs, fits, ground, world):
  """([(thing, fidelity)], [(unclear cell, fidelity)]).

  Unclear are fits that do not hold, and pixels that are left unexplained.
  """
  rest = offset.copy()
  for fitted in filter(None, fits):
    rest[fitted.window] -= fitted.drawn
  raw = square(rest)
  unlike = raw > _UNLIKE**2
  rest = np.sqrt(square(ndimage.uniform_filter(rest, (3, 3, 1))))
  things, unclear = [], []
  for label, fitted in enumerate(fits, 1):
    fidelity = _fidelity(fitted, raw[fitted.window]) if fitted else (0.0, 0.0)
    if thing := fitted and _named(fitted, rest[fitted.window], ground, world):
      things.append((thing, fidelity))
    else:
      unclear.append((blobs == label, fidelity))
  known = ndimage.maximum_filter(blobs > 0, 5)
  strays, count = ndimage.label((rest > _LEFT) & unlike & ~known, _SQUARE)
  unclear += [(strays == i, (0.0, 0.0)) for i in range(1, count + 1)
              if (strays == i).sum() >= _AREA]
  return things, [(tuple(int(v) // CELL for v in ndimage.center_of_mass(mask)), fidelity)
                  for mask, fidelity in unclear]


def _fidelity(fitted, rest):
  """Fidelity of the outline and of the inside of a blob, 0 to 1.

  It is 1 less the root mean square of what is left unexplained there, as a share of the blob's
  colour; `rest` are squared levels in the fit's window.
  """
  inside = ndimage.binary_fill_holes(fitted.cover > 0.5)
  inner = ndimage.binary_erosion(inside)
  edge, size = ndimage.binary_dilation(inside) & ~inner, square(fitted.offset)
  return tuple(max(0.0, 1.0 - float(np.sqrt(rest[zone].mean() / size))) if zone.any() else 0.0
               for zone in (edge, inner))


def _named(fitted, rest, ground, world):
  """The thing that a fit is; None if it is unclear. `rest` are unexplained levels in its window."""
  color = _nearest(ground, COLORS, _COLOR, fitted.offset, fitted.pale)
  part = rest[fitted.cover > 0].max(initial=0.0) / np.linalg.norm(fitted.offset)
  low, high = world.radii[fitted.detail]
  if (color and low - _SMALLER <= fitted.radius <= high + _LARGER and part <= _GAP
      and fitted.error <= _ERROR and fitted.second >= _AHEAD * fitted.error):
    return Thing(fitted.shape, color, fitted.x, fitted.y, fitted.radius, fitted.detail)
  return None


def _nearest(color, palette, within, offset=0.0, most=0.0):
  """The name of the nearest colour of a palette; None if it is not `within` levels.

  With `offset`, `color` plus the offset, or plus up to `most` times the offset, is meant.
  """
  distances = {}
  for name, levels in palette.items():
    times = np.clip((levels - color) @ offset / (offset @ offset), 1.0, most) if most else 0.0
    distances[name] = float(np.linalg.norm(color + times * offset - levels))
  name = min(distances, key=distances.get)
  return name if distances[name] <= within else None
