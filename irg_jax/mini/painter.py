"""Paints scenes: the ground truth that the models of the mini world learn from."""

import math

import numpy as np

from irg_jax.mini import world

_SAMPLES = 4  # a side of each pixel, for soft edges


def paint(scene: world.Scene) -> np.ndarray:
  """The image of a scene, uint8 [64, 64, 3]."""
  base = np.add(world.BACKGROUNDS[scene.background], scene.tone)
  image = np.empty((world.SIZE, world.SIZE, 3))
  image[:] = base
  for thing in scene.things:
    _paint_thing(image, thing)
  return np.clip(np.round(image), 0, 255).astype(np.uint8)


def _paint_thing(image, thing):
  """Blends a thing into float [64, 64, 3]; only the pixels around it are looked at."""
  top, left = (max(0, int(v - thing.radius - 2)) for v in (thing.y, thing.x))
  bottom, right = (min(world.SIZE, int(v + thing.radius + 3)) for v in (thing.y, thing.x))
  offsets = (np.arange(_SAMPLES) + 0.5) / _SAMPLES
  x, y = (((np.arange(start, stop)[:, None] + offsets).ravel() - middle) / thing.radius
          for start, stop, middle in ((left, right, thing.x), (top, bottom, thing.y)))
  inside = _INSIDE[thing.shape](x[None, :], y[:, None])
  cover = inside.reshape(bottom - top, _SAMPLES, right - left, _SAMPLES).mean((1, 3))[..., None]
  window = image[top:bottom, left:right]
  window += cover * (np.asarray(world.COLORS[thing.color]) - window)


def _polygon(x, y, points):
  """Whether (x, y) is inside a polygon, by the number of edges that a ray to the right meets."""
  inside = np.zeros(np.broadcast(x, y).shape, bool)
  for (x1, y1), (x2, y2) in zip(points, points[1:] + points[:1]):
    if y1 == y2:
      continue
    crosses = (y1 > y) != (y2 > y)
    inside ^= crosses & (x < x1 + (y - y1) * (x2 - x1) / (y2 - y1))
  return inside


def _star_points():
  return [(r * math.sin(i * math.pi / 5), 0.08 - r * math.cos(i * math.pi / 5))
          for i, r in enumerate((1.05, 0.42) * 5)]


# x to the right, y down, in radii from the middle of the thing.
_INSIDE = {
    "circle": lambda x, y: x**2 + y**2 < 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.88,
    "triangle": lambda x, y: _polygon(x, y, [(0, -1), (1, 0.9), (-1, 0.9)]),
    "diamond": lambda x, y: abs(x) + abs(y) < 1.05,
    "star": lambda x, y: _polygon(x, y, _star_points()),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.32) & (np.maximum(abs(x), abs(y)) < 1),
    "ring": lambda x, y: (x**2 + y**2 < 1) & (x**2 + y**2 > 0.25),
}
