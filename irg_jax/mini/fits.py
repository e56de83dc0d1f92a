"""Fits of the verifier: draws each shape of a world where a blob of pixels is, to name the blob.

It draws shapes from their corners, and shares no code with the painter. The area and middle of a
blob give the size and place that each shape would have. In a world without details all shapes are
drawn there, in the colour of the blob. In a world with details each is drawn in each fill, in the
one or two colours that explain most, and the best ones are moved and sized until they fit.
"""

import functools
import types

import numpy as np
from scipy import ndimage

from irg_jax.mini.world import COLORS, SIZE, lighter

_WINDOW = 26  # pixels a side around the largest blob that can be a thing
_FINE = 128  # samples to a radius in the tables of the shapes
_REACH = 1.2  # radii from the middle to the edge of the tables

# Of worlds with details.
_COARSE = 4  # samples to one of the tables of fills: many are drawn
_FILLS = ("plain", "hollow", "striped", "dotted")
_OUTLINE = 0.28  # width of the outline of a hollow shape, in radii
_SMALL = 5.5  # pixels of radius
_LIGHT = 38.0  # levels around a lighter tone; a colour and its own are at least 79 apart
_RIM = 0.2  # pixels by which a blob is larger than its shape
_KEPT = (8, 5)  # candidates that are moved, in turn
# How many times stronger the colour of thin parts may be: slight blur makes them pale.
_PALE = {"plain": 1.0, "hollow": 1.25, "striped": 1.1, "dotted": 1.1}
_BLUR = 0.55  # standard deviation in pixels of slight blur
_STEP = 0.7  # pixels that a candidate is moved at once, at most
_NAMED = np.array([*COLORS.values()], float)
_LIGHTER = np.array([lighter(color) for color in COLORS])


def square(offsets):
  """Squared lengths of colours, [..., 3] to [...]."""
  return np.einsum("...c,...c->...", offsets, offsets)


def fit(image, ground, blobs, label, box, noise, world):
  """The shape that explains a blob best; None if it is too large to be a thing.

  Args:
    image, ground: float32 [64, 64, 3]; the colour of its background [3].
    blobs, label, box: labels [64, 64]; the blob's label and bounding slices.
    noise: squared levels a pixel.

  Returns:
    shape, detail, x, y, radius; offset: its colour less the background's, and how many times
    stronger it may be, pale; window (slices), cover and drawn (offset) of its pixels; error, and
    that of the second best shape.
  """
  if max(s.stop - s.start for s in box) + 4 > _WINDOW:
    return None
  window = tuple(slice(max(0, s.start - 2), min(SIZE, s.stop + 2)) for s in box)
  near, own = image[window] - ground, blobs[window] == label
  free = own | (ndimage.maximum_filter(own, 5) & (blobs[window] == 0))
  if len(world.details) > 1:
    return _fit_detail(near, own, free, window, ground, noise, world)
  return _fit_shape(near, own, free, window, noise, world)


def _fit_shape(near, own, free, window, noise, world):
  """`fit` in a world without details, of pixels `near` the blob: its `own`, and those `free`."""
  level, weak = square(near[own]), int(0.6 * own.sum())
  color = np.median(near[own][np.argpartition(level, weak)[weak:]], axis=0)  # the strongest 40 %
  size = max(float(color @ color), 1.0)
  cover = near @ color / size * free
  x, y, radius, lengths = _places(cover, window, world)
  drawn = _draw(x, y, radius, window, _shapes(world).sums, np.arange(len(x)))
  aside = (square(near)[free].sum() - (cover**2).sum() * size) / size
  error = ((cover - drawn * free) ** 2).sum((1, 2)) + aside - free.sum() * noise / size
  error = np.maximum(error, 0) / (lengths * radius)
  best, second = np.argsort(error)[:2]
  return types.SimpleNamespace(
      shape=world.shapes[best], detail=world.details[0], x=float(x[best]), y=float(y[best]),
      radius=float(radius[best]), offset=color, window=window, cover=drawn[best],
      drawn=drawn[best][..., None] * color, pale=1.0, error=error[best], second=error[second])


def _places(cover, window, world):
  """(x, y, radius) [7] that each shape would have, by area and middle of a cover; outlines [7]."""
  shapes, area = _shapes(world), max(float(cover.sum()), 1.0)
  radius = np.sqrt(area / shapes.areas)
  rows, columns = (np.arange(s.start, s.stop, dtype=np.float32) + 0.5 for s in window)
  y = float(cover.sum(1) @ rows) / area - shapes.middles * radius
  x = np.full_like(y, float(cover.sum(0) @ columns) / area)
  return x, y, radius, shapes.lengths


def _fit_detail(near, own, free, window, ground, noise, world):
  """`fit` in a world with details: candidates are the shapes [7], each in each of `_FILLS`.

  `near` is [H, W, 3]; `own` and `free` are [H, W].
  """
  filled = ndimage.binary_fill_holes(own)
  free, shapes = free | filled, _shapes(world)
  x, y, radius, _ = _places(filled, window, world)
  at = np.stack([x, y, radius - _RIM], -1).repeat(len(_FILLS), 0)  # [K, 3]
  which = np.arange(len(at))
  for keep in (*_KEPT, 0):
    parts = (2 * which[:, None] + np.arange(2)).ravel()  # places in `shapes.layers`
    drawn = _draw(*at.repeat(2, 0).T, window, shapes.layers, parts, _FINE // _COARSE)
    layers = drawn.reshape(len(at), 2, *free.shape)
    if not keep:  # also as an autoencoder would draw it
      soft = ndimage.gaussian_filter(layers, _BLUR, axes=(2, 3))
      at, which, layers = (np.concatenate(pair) for pair in (
          (at, at), (which, which), (layers, soft)))
    colors, rest = _colored(layers[..., free], near[free])
    error = np.maximum(square(rest).sum(1) - free.sum() * noise, 0) / at[:, 2]
    error /= np.maximum(square(colors[:, 0]), 1.0) * shapes.lengths[which // len(_FILLS)]
    if keep != _KEPT[0]:  # the first colours are rough
      error = np.where(_two_tones(which, colors + ground), error, np.inf)
    best = np.argsort(error)[:keep or None]
    if keep:
      moved = at[best] + _step(at[best], layers[best], colors[best], rest[best], free, window)
      at, which = moved, which[best]
  best, second = best[0], best[which[best] != which[best[0]]][0]
  shape, fill = world.shapes[which[best] // len(_FILLS)], _FILLS[which[best] % len(_FILLS)]
  (x, y, radius), small = at[best].tolist(), fill == "plain" and at[best, 2] < _SMALL
  return types.SimpleNamespace(
      shape=shape, detail="small" if small else fill, x=x, y=y, radius=radius,
      offset=colors[best, 0], window=window, cover=layers[best].sum(0), pale=_PALE[fill],
      drawn=np.einsum("ihw,ic->hwc", layers[best], colors[best]), error=error[best],
      second=error[second])


def _colored(layers, near):
  """The colours [K, 2, 3] of layers [K, 2, P] that explain most of pixels [P, 3]; the rest."""
  squares = layers @ layers.transpose(0, 2, 1) + 1e-3 * np.eye(2)
  colors = np.linalg.solve(squares, layers @ near)
  return colors, near - layers.transpose(0, 2, 1) @ colors


def _two_tones(which, colors):
  """Whether the second of `colors` [K, 2, 3] is the lighter tone of the first, where there is one.

  Else a plain shape would also be a striped one, of two equal colours.
  """
  named = square(colors[:, :1] - _NAMED).argmin(1)
  near = square(colors[:, 1] - _LIGHTER[named]) < _LIGHT**2
  return near | (which % len(_FILLS) < _FILLS.index("striped"))


def _step(at, layers, colors, rest, free, window):
  """By how much candidates should move and grow, [K, 3]: one step of Gauss-Newton.

  `layers` are [K, 2, H, W], `colors` [K, 2, 3], `rest` [K, P, 3].
  """
  down, right = np.gradient(np.einsum("kihw,kic->kchw", layers, colors), axis=(2, 3))
  x, y, radius = at.T[:, :, None, None, None]
  rows, columns = (np.arange(s.start, s.stop) + 0.5 for s in window)
  grown = ((columns - x) * right + (rows[:, None] - y) * down) / radius
  slopes = -np.stack([right, down, grown], 1)[..., free].reshape(len(at), 3, -1)
  rest = rest.transpose(0, 2, 1).reshape(len(at), -1, 1)
  step = np.linalg.solve(slopes @ slopes.transpose(0, 2, 1) + np.eye(3), slopes @ rest)
  return np.clip(step[..., 0], -_STEP, _STEP)


@functools.cache
def _shapes(world):
  """Tables of the seven shapes of a world, in radii from their middle.

  Returns:
    areas [7]; middles [7]: offsets of the centres of area downwards; lengths [7] of the outlines;
    sums [7, samples, samples]: integral images; layers: of the main and the lighter part of each
    shape in each of `_FILLS`, [7 * 4 * 2, fewer samples, ...].
  """
  at = (np.arange(int(2 * _REACH * _FINE)) + 0.5) / _FINE - _REACH
  masks, lengths = map(np.array, zip(*(_mask(shape, at, world) for shape in world.shapes)))
  sums = lambda masks: np.pad((masks / _FINE**2).cumsum(1).cumsum(2),
                              ((0, 0), (1, 0), (1, 0))).astype(np.float32)
  share = masks / _FINE**2
  areas = share.sum((1, 2))
  layers = [layer for shape, mask in zip(world.shapes, masks) for layer in _parts(shape, mask, at)]
  return types.SimpleNamespace(
      areas=areas, middles=share.sum(2) @ at / areas, lengths=lengths, sums=sums(masks),
      layers=sums(np.stack(layers))[:, ::_COARSE, ::_COARSE].copy())


def _parts(shape, mask, at):
  """The main and the lighter part of a shape in each of `_FILLS`, one after the other."""
  hole = ndimage.distance_transform_edt(mask) >= _OUTLINE * _FINE
  x, y = at[None, :], at[:, None]
  bars = mask & (np.abs(np.abs(y) - 0.4) < 0.2)
  dot = np.hypot(x, y - {"triangle": 0.28, "star": 0.08, "heart": -0.1}.get(shape, 0.0)) < 0.36
  none = np.zeros_like(mask)
  return mask, none, mask & ~hole, none, mask & ~bars, bars, mask & ~dot, dot


def _mask(shape, at, world):
  """(mask, length of the outline): a disc, or triangles from the middle to each side."""
  x, y = at[None, :], at[:, None]
  if shape in ("circle", "ring"):
    distance, hole = np.hypot(x, y), 0.5 * (shape == "ring")
    return (distance <= 1) & (distance >= hole), 2 * np.pi * (1 + hole)
  mask, corners = np.zeros((len(at), len(at)), bool), _corners(shape, world)
  x0 = y0 = 0.0
  for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, 0)):
    sides = (x0, y0, x1, y1), (x1, y1, x2, y2), (x2, y2, x0, y0)
    mask |= np.all([(c - a) * (y - b) - (d - b) * (x - a) >= 0 for a, b, c, d in sides], axis=0)
  return mask, np.hypot(*(corners - np.roll(corners, 1, 0)).T).sum()


def _corners(shape, world):
  """The corners of a shape, x to the right and y down, clockwise."""
  if shape == "triangle":
    return np.array([(0.0, -1.0), (1.0, 0.9), (-1.0, 0.9)])
  if shape == "star":
    turns = np.arange(10) * np.pi / 5
    reach = np.where(np.arange(10) % 2, world.star, 1.05)
    return np.stack([reach * np.sin(turns), 0.08 - reach * np.cos(turns)], -1)
  if shape == "heart":
    turns = np.linspace(np.arctan2(-0.371, -0.335), 0, 33)  # from the end of the notch
    lobe = np.stack([0.5 + 0.5 * np.cos(turns), 0.5 * np.sin(turns) - 0.4], -1)
    left = lobe[::-1] * (-1.0, 1.0)
    return np.concatenate([left, [(0.0, -0.3)], lobe, [(0.0, 0.95)]])
  side = world.cross
  quarter = {"square": [0.88 - 0.88j], "diamond": [-1.05j],
             "cross": [side - 1j, side - side * 1j, 1 - side * 1j]}[shape]
  corners = np.concatenate([np.array(quarter) * turn for turn in (1, 1j, -1, -1j)])
  return np.stack([corners.real, corners.imag], -1)


def _draw(x, y, radius, window, sums, which, fine=_FINE):
  """The share of each pixel that shapes cover, float [K, rows, columns].

  `x`, `y` and `radius` are [K], in pixels; `window` has the slices of the rows and columns; `which`
  [K] are the places of the shapes in the integral images `sums`, of `fine` samples to a radius.
  """
  corners = []
  for s, middle in zip(window, (y, x)):  # edges of pixels: the sample before, and the part beyond
    at = ((np.arange(s.start, s.stop + 1) - middle[:, None]) / radius[:, None] + _REACH) * fine
    at = np.clip(at, 0, len(sums[0]) - 1)
    low = np.minimum(at.astype(int), len(sums[0]) - 2)
    corners.append((low, at - low))
  (row, down), (column, right) = corners
  row, down, column, right = row[..., None], down[..., None], column[:, None], right[:, None]
  at = lambda i, j: sums[which[:, None, None], row + i, column + j]
  before, after = (at(0, j) * (1 - down) + at(1, j) * down for j in (0, 1))
  # The integral image at the four corners of a pixel gives its share.
  corner = before * (1 - right) + after * right
  return np.diff(np.diff(corner, axis=1), axis=2) * (radius**2)[:, None, None]
