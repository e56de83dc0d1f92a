"""What there is in the mini world: shapes, colours, scenes, and where things stand.

An image is 64 pixels a side and is spoken of as four rows of four cells. A thing stands
freely around the middle of a cell and may reach into the next one.
"""

import dataclasses

import numpy as np

SIZE = 64  # pixels a side
GRID = 4  # rows and columns of cells
CELL = SIZE // GRID

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring")
COLORS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 215, 50),
    "green": (50, 160, 70),
    "blue": (50, 90, 210),
    "purple": (130, 60, 170),
    "pink": (250, 110, 190),
    "brown": (130, 85, 50),
}
BACKGROUNDS = {
    "white": (245, 245, 245),
    "grey": (170, 170, 170),
    "black": (25, 25, 25),
    "mint": (190, 230, 205),
}
TONE = 6  # a background's colour varies by as many levels

MIN_RADIUS, MAX_RADIUS = 5.5, 7.5
SHIFT = 1.0  # how far a thing may stand from the middle of its cell, in each direction
GAP = 2.0  # pixels between the squares around two things
MAX_THINGS = 5


@dataclasses.dataclass(frozen=True)
class Thing:
  """A shape in an image.

  Attributes:
    shape, color: names.
    x, y: its middle, in pixels from the left and the top edge.
    radius: half the side of the square around it, in pixels.
  """

  shape: str
  color: str
  x: float
  y: float
  radius: float

  @property
  def cell(self) -> tuple[int, int]:
    """(row, column) that its middle is in."""
    return tuple(int(np.clip(v // CELL, 0, GRID - 1)) for v in (self.y, self.x))


@dataclasses.dataclass(frozen=True)
class Scene:
  """An image before it is painted; `tone` is added to the background's three levels."""

  background: str
  things: tuple[Thing, ...]
  tone: tuple[int, int, int] = (0, 0, 0)


def sample_background(rng) -> str:
  return str(rng.choice(list(BACKGROUNDS)))


def sample_tone(rng) -> tuple[int, int, int]:
  return tuple(int(v) for v in rng.integers(-TONE, TONE + 1, 3))


def place(cells, rng) -> list[tuple[float, float, float]]:
  """Free places (x, y, radius) around the middles of the given cells, apart from each other.

  Args:
    cells: different (row, column).
    rng: numpy Generator.
  """
  # Two things of the largest size in neighbouring cells fit only with little shift, so both
  # are drawn anew until they do.
  while True:
    places = [_around(cell, rng) for cell in cells]
    if all(apart(a, b) for i, a in enumerate(places) for b in places[:i]):
      return places


def apart(a, b) -> bool:
  """Whether two places (x, y, radius) keep the gap between them."""
  return max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= a[2] + b[2] + GAP


def place_beside(cell, others, rng) -> tuple[float, float, float] | None:
  """A place around the middle of a cell, apart from `others`; None if there is hardly any."""
  for _ in range(200):
    new = _around(cell, rng)
    if all(apart(new, other) for other in others):
      return new
  return None


def _around(cell, rng):
  radius = rng.uniform(MIN_RADIUS, MAX_RADIUS)
  y, x = ((i + 0.5) * CELL + rng.uniform(-SHIFT, SHIFT) for i in cell)
  low, high = radius + 0.5, SIZE - radius - 0.5
  return float(np.clip(x, low, high)), float(np.clip(y, low, high)), float(radius)
