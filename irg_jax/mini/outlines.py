"""The verifier's own drawing of the shapes: which share of each pixel one would cover.

Every shape is drawn once, finely, and summed up to every crossing of fine lines; the share of a
pixel then follows from its four corners, wherever the shape stands and whatever its size.
"""

import functools
import typing

import numpy as np

from irg_jax.mini import world

_FINE = 128  # lines of the drawn shapes to a radius
_REACH = 1.2  # radii that they are drawn around their middle


class Table(typing.NamedTuple):
  """Of each shape, in radii around its middle.

  Attributes:
    areas, middles, lengths: [7]: area, how far below the middle its centre of area lies, and
      the length of its outline.
    sums: [7, lines, lines]: how much of it lies above and left of a crossing.
  """

  areas: np.ndarray
  middles: np.ndarray
  lengths: np.ndarray
  sums: np.ndarray


def _corners(name):
  """The corners of a shape in radii around its middle, x to the right and y down, clockwise."""
  if name == "star":
    turns = np.arange(10) * np.pi / 5
    reach = np.where(np.arange(10) % 2, 0.42, 1.05)
    return np.stack([reach * np.sin(turns), 0.08 - reach * np.cos(turns)], -1)
  quarter = {"square": [(0.88, -0.88)], "diamond": [(0.0, -1.05)],
             "cross": [(0.32, -1.0), (0.32, -0.32), (1.0, -0.32)]}
  if name == "triangle":
    return np.array([(0.0, -1.0), (1.0, 0.9), (-1.0, 0.9)])
  points = np.array(quarter[name])
  turned = [points]
  for _ in range(3):
    points = np.stack([-points[:, 1], points[:, 0]], -1)
    turned.append(points)
  return np.concatenate(turned)


def _fan(corners, x, y):
  """Whether points are in one of the triangles from the middle to each side of a shape."""
  inside = np.zeros(np.broadcast_shapes(x.shape, y.shape), bool)
  middle = corners.mean(0)
  for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, 0)):
    sides = (middle[0], middle[1], x1, y1), (x1, y1, x2, y2), (x2, y2, middle[0], middle[1])
    inside |= np.logical_and.reduce(
        [(c - a) * (y - b) - (d - b) * (x - a) >= 0 for a, b, c, d in sides])
  return inside


@functools.cache
def table() -> Table:
  """All shapes, drawn on first use."""
  lines = int(2 * _REACH * _FINE)
  at = (np.arange(lines) + 0.5) / _FINE - _REACH
  x, y = at[None, :], at[:, None]
  masks, lengths = [], []
  for shape in world.SHAPES:
    if shape in ("circle", "ring"):
      distance = np.hypot(x, y)
      masks.append((distance <= 1) & (distance >= (0.5 if shape == "ring" else 0)))
      lengths.append(2 * np.pi * (1.5 if shape == "ring" else 1))
    else:
      corners = _corners(shape)
      masks.append(_fan(corners, x, y))
      lengths.append(np.hypot(*(corners - np.roll(corners, 1, 0)).T).sum())
  masks = np.stack(masks) / _FINE**2
  areas = masks.sum((1, 2))
  sums = np.pad(masks.cumsum(1).cumsum(2), ((0, 0), (1, 0), (1, 0)))
  return Table(areas, masks.sum(2) @ at / areas, np.array(lengths), sums.astype(np.float32))


def draw(x, y, radius, window):
  """Which share of each pixel of a window each shape covers.

  Args:
    x, y, radius: [7], in pixels.
    window: slices of the image, [rows, columns].

  Returns:
    float [7, rows, columns].
  """
  sums = table().sums
  top, left = (_lines(s, middle, radius) for s, middle in zip(window, (y, x)))
  shapes = np.arange(len(world.SHAPES))[:, None, None]
  (low_y, part_y), (low_x, part_x) = top, left
  low_y, part_y = low_y[:, :, None], part_y[:, :, None]
  low_x, part_x = low_x[:, None], part_x[:, None]
  above = sums[shapes, low_y, low_x] * (1 - part_y) + sums[shapes, low_y + 1, low_x] * part_y
  below = (sums[shapes, low_y, low_x + 1] * (1 - part_y)
           + sums[shapes, low_y + 1, low_x + 1] * part_y)
  corner = above * (1 - part_x) + below * part_x
  return np.diff(np.diff(corner, axis=1), axis=2) * (radius**2)[:, None, None]


def _lines(pixels, middle, radius):
  """Where the edges of pixels lie among the fine lines: the line before, and the part beyond."""
  lines = table().sums.shape[1]
  edges = np.arange(pixels.start, pixels.stop + 1)
  at = ((edges - middle[:, None]) / radius[:, None] + _REACH) * _FINE
  at = np.clip(at, 0, lines - 1)
  low = np.minimum(at.astype(int), lines - 2)
  return low, at - low
