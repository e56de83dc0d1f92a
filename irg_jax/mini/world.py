"""The mini world: scenes of coloured shapes, the prompts that ask for them, and the painter.

An image has 64 x 64 pixels and is divided into 4 x 4 cells. A thing stands near the middle of a
cell and may overlap the next one.

A record is in GenEval's form: {"tag", "include": [{"class", "count", "color", "position"}],
"exclude", "prompt"}; a class is a shape, and a position is [relation, index of another clause].
Counts are exact: "two red circles" means two, and an image must show nothing else.
"""

import dataclasses
import hashlib
import itertools
import math
import pathlib
import tomllib
import typing

import numpy as np

SIZE = 64  # pixels a side
GRID = 4  # rows and columns of cells
CELL = SIZE // GRID

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring")
COLORS = {
    "red": (220, 40, 40), "orange": (245, 140, 30), "yellow": (245, 215, 50),
    "green": (50, 160, 70), "blue": (50, 90, 210), "purple": (130, 60, 170),
    "pink": (250, 110, 190), "brown": (130, 85, 50),
}
BACKGROUNDS = {"white": (245, 245, 245), "grey": (170, 170, 170), "black": (25, 25, 25),
               "mint": (190, 230, 205)}
_TONE = 6  # levels by which the colour of a background varies

MIN_RADIUS, MAX_RADIUS = 5.5, 7.5
_SHIFT = 1.0  # pixels between a thing and the middle of its cell, at most, in each direction
_GAP = 2.0  # pixels between the bounding squares of two things, at least
MAX_THINGS = 5

_WAYS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # x, y
RELATIONS = tuple(_WAYS)
_INVERSE = {"right of": "left of", "below": "above"}

# Held out of training: one colour of each shape, in images and prompts; and these relations of two
# shapes, in prompts, whichever of the two is named first.
_FILES = pathlib.Path(__file__).parent / "files"
_WORDING = tomllib.loads((_FILES / "world.toml").read_text())
UNSEEN_PAIRS = frozenset(map(tuple, _WORDING["unseen_pairs"]))
_UNSEEN_RELATIONS = frozenset(map(tuple, _WORDING["unseen_relations"]))
_TEST_SHARE = 5  # one prompt in this many is held out for the test

_FRAMES, _SAID = _WORDING["frames"], _WORDING["relations"]
_NUMBERS = ("no", "one", "two", "three", "four", "five")


@dataclasses.dataclass(frozen=True)
class Thing:
  """A shape in an image."""

  shape: str
  color: str
  x: float  # its middle, in pixels from the left and the top edge
  y: float
  radius: float  # half the side of its bounding square, in pixels

  @property
  def cell(self) -> tuple[int, int]:
    """(row, column) of its middle."""
    return tuple(min(max(int(v // CELL), 0), GRID - 1) for v in (self.y, self.x))


@dataclasses.dataclass(frozen=True)
class Task:
  """A kind of prompt: training, test prompts and tables follow from its entry in `TASKS`."""

  share: float  # of the training prompts, relative to the other tasks; hard ones have more
  clauses: typing.Callable  # Generator -> include clauses of a record, or None to sample again


@dataclasses.dataclass(frozen=True)
class Scene:
  """The content of an image."""

  background: str
  things: tuple[Thing, ...]
  tone: tuple[int, int, int] = (0, 0, 0)  # added to the levels of the background
  unclear: typing.ClassVar[tuple] = ()  # a `verifier.Seen` may have such cells


def sample_record(task: str, rng) -> dict:
  """A random record of a task, with a prompt in one of several phrasings."""
  while not (include := TASKS[task].clauses(rng)):
    pass
  *most, last = names = nouns(include)
  text = f"{', '.join(most)} and {last}" if most else last
  for i, relation, other in relations(include):
    text = f"{names[i]} {_SAID[relation][int(rng.integers(2))]} {names[other]}"
  exclude = [{"class": c["class"], "count": c["count"] + 1} for c in include]
  return {"tag": task, "include": include, "exclude": exclude if task == "counting" else [],
          "prompt": _FRAMES[int(rng.integers(len(_FRAMES)))].format(text)}


def training_record(rng) -> dict:
  """A record that training may show, of a random task."""
  shares = np.array([task.share for task in TASKS.values()])
  while True:
    record = sample_record(str(rng.choice([*TASKS], p=shares / shares.sum())), rng)
    if not is_unseen(record) and not is_for_test(record):
      return record


def test_records(task: str, count: int, unseen: bool) -> list[dict]:
  """Records of a task for the test, the same at every call; "split" is "seen" or "unseen".

  `unseen`: whether they have what is held out of training. Fewer than `count` where a task has no
  more, none where nothing of it is ever held out.
  """
  rng, found = np.random.default_rng([*task.encode(), unseen]), {}
  for _ in range(100 * count):
    record = sample_record(task, rng)
    if is_unseen(record) == unseen and is_for_test(record) and len(found) < count:
      found[record["prompt"]] = record | {"split": "unseen" if unseen else "seen"}
  return list(found.values())


def is_unseen(record: dict) -> bool:
  """Whether a record has a pair of shape and colour, or a relation, held out of training."""
  include, found = record["include"], []
  for i, relation, j in relations(include):
    i, j = (j, i) if relation in _INVERSE else (i, j)
    found.append((include[i]["class"], _INVERSE.get(relation, relation), include[j]["class"]))
  pairs = {(clause["class"], clause.get("color")) for clause in include}
  return bool(pairs & UNSEEN_PAIRS or _UNSEEN_RELATIONS.intersection(found))


def is_for_test(record: dict) -> bool:
  """Whether the exact words of its prompt are held out for the test."""
  digest = hashlib.blake2b(record["prompt"].encode(), digest_size=4).digest()
  return int.from_bytes(digest, "big") % _TEST_SHARE == 0


def relations(include) -> list[tuple[int, str, int]]:
  """(clause, relation, other clause) of all clauses with a position, as indices."""
  return [(i, *clause["position"]) for i, clause in enumerate(include) if "position" in clause]


def noun(count: int, shape: str, color: str | None = None, article: bool = True) -> str:
  """"a red circle", "two red circles"; with `article` false "one red circle"."""
  name = f"{color} {shape}" if color else shape
  if count == 1:
    return f"{('an' if name[0] in 'aeiou' else 'a') if article else 'one'} {name}"
  return f"{_NUMBERS[count]} {name}{'es' if name.endswith('s') else 's'}"


def nouns(include, article: bool = True) -> list[str]:
  """The noun of each clause, see `noun`."""
  return [noun(c["count"], c["class"], c.get("color"), article) for c in include]


def prompt_rules() -> tuple[str, ...]:
  """The grammar of prompts, for `generate.prompts.PromptForm`: files/prompts.toml and the names."""
  vowel = [color for color in COLORS if color[0] in "aeiou"]
  plurals = [noun(2, shape).split()[1] for shape in SHAPES]
  rules = {
      "frame": [frame.format("<things>") for frame in _FRAMES], "shape": SHAPES, "plural": plurals,
      "slip": [f"{shape} -> {plural}" for shape, plural in zip(SHAPES, plurals)],
      "color": [color for color in COLORS if color not in vowel], "vowel_color": vowel,
      "relation": [*itertools.chain(*_SAID.values()), "<other_relation>"],
      "alike": [f"<any_{s}> <is> <relation> <any_{s}> -> <1> <3> <4>" for s in SHAPES],
      "same": [form.format(f"<any_{c}>") for c in COLORS for form in _SAME]}
  rules |= {f"any_{c}": (f"<one> {c} <shape> -> {noun(1, '<2>', c)} # 1",
                         f"<digit> {c} <any_plural> -> <1> {c} <2>") for c in COLORS}
  rules |= {f"any_{shape}": (f"<one> {shape} -> a {shape} # 1", f"<digit> {plural}")
            for shape, plural in zip(SHAPES, plurals)}
  rules |= tomllib.loads((_FILES / "prompts.toml").read_text())["rules"]
  return tuple(f"{name} = {' | '.join(options)}" for name, options in rules.items())


# Kinds of things of one colour, which is put in.
_SAME = ("{0} <is> <relation> {0} -> <1> <3> <4>", "{0} <joined> {0} -> <1> and <3>",
         "{0} <joined> {0} <joined> <thing> -> <1> , <3> and <5>",
         "{0} <joined> <thing> <joined> {0} -> <1> , <3> and <5>",
         "<thing> <joined> {0} <joined> {0} -> <1> , <3> and <5>")


def _clause(shape, count=1, color=None, position=None):
  clause = {"class": str(shape), "count": int(count), "color": color and str(color),
            "position": position}
  return {key: value for key, value in clause.items() if value is not None}


def _pick(names, count, rng):
  return rng.choice(list(names), count, replace=False)


def _free(rng):
  """One to three kinds of things, each one to three times, often coloured, often placed."""
  kinds = int(rng.choice((1, 2, 2, 2, 3)))
  counts = rng.integers(1, 4, kinds)
  if counts.sum() > MAX_THINGS or (kinds == 1 and counts[0] == 1):
    return None
  shapes, colors = rng.choice(SHAPES, kinds), _pick(COLORS, kinds, rng)
  alike = len(set(shapes)) < kinds  # then only colours distinguish them
  include = [_clause(s, n, c if alike or rng.random() < 0.8 else None)
             for s, n, c in zip(shapes, counts, colors)]
  if kinds == 2 and rng.random() < 0.6:
    include[1]["position"] = [str(rng.choice(RELATIONS)), 0]
  return include


TASKS = {
    "single_object": Task(0.05, lambda rng: [_clause(*_pick(SHAPES, 1, rng))]),
    "two_object": Task(0.13, lambda rng: [_clause(s) for s in _pick(SHAPES, 2, rng)]),
    "counting": Task(0.10, lambda rng: [_clause(*_pick(SHAPES, 1, rng), rng.integers(2, 5))]),
    "colors": Task(0.05, lambda rng: [_clause(*_pick(SHAPES, 1, rng), 1, *_pick(COLORS, 1, rng))]),
    "position": Task(0.24, lambda rng: [
        _clause(s, position=p)
        for s, p in zip(_pick(SHAPES, 2, rng), (None, [str(rng.choice(RELATIONS)), 0]))]),
    "color_attr": Task(0.15, lambda rng: [
        _clause(s, 1, c) for s, c in zip(_pick(SHAPES, 2, rng), _pick(COLORS, 2, rng))]),
    "free": Task(0.28, _free),
}


def sample_scene(record: dict, rng) -> Scene:
  """A scene that shows exactly what a record asks for; all else is random.

  A colour that the record leaves open never makes a pair held out of training.
  """
  include = record["include"]
  owners = [i for i, clause in enumerate(include) for _ in range(clause["count"])]
  while True:
    cells = [divmod(int(i), GRID) for i in rng.choice(GRID**2, len(owners), replace=False)]
    groups = [[c for c, owner in zip(cells, owners) if owner == i] for i in range(len(include))]
    if relations_hold(include, groups):
      break
  # Two large things in neighbouring cells fit only with small shifts: all are sampled again.
  while True:
    places = [_around(cell, rng) for cell in cells]
    if all(_apart(a, b) for a, b in itertools.combinations(places, 2)):
      break
  things = tuple(Thing(include[i]["class"], color_of(include[i], rng), *place)
                 for i, place in zip(owners, places))
  tone = _sample_tone(rng)
  return Scene(str(rng.choice(list(BACKGROUNDS))), things, tone)


def training_scene(rng) -> Scene:
  """A scene of a `training_record`."""
  return sample_scene(training_record(rng), rng)


def crowded_scene(rng) -> Scene:
  """A scene with things in up to 13 cells, which no prompt asks for; it has no unseen pair."""
  pairs = [(shape, color) for shape in SHAPES for color in COLORS
           if (shape, color) not in UNSEEN_PAIRS]
  cells, places = rng.permutation(GRID**2)[:rng.integers(1, GRID**2 - 2)], []
  for cell in cells:
    place = place_beside(divmod(int(cell), GRID), places, rng)
    places += [place] if place else []
  things = tuple(Thing(*pairs[rng.integers(len(pairs))], *place) for place in places)
  return Scene(str(rng.choice(list(BACKGROUNDS))), things, _sample_tone(rng))


def color_of(clause, rng) -> str:
  """The colour of a clause, or a random one that training may show with its shape."""
  if "color" in clause:
    return clause["color"]
  return str(rng.choice([c for c in COLORS if (clause["class"], c) not in UNSEEN_PAIRS]))


def relations_hold(include, groups) -> bool:
  """Whether all relations hold between `groups`, the cells of each clause; none on a diagonal."""
  for i, relation, other in relations(include):
    x, y = _WAYS[relation]
    for a, b in itertools.product(groups[i], groups[other]):
      down, right = a[0] - b[0], a[1] - b[1]
      if x * right + y * down <= abs(y * right + x * down):
        return False
  return True


def place_beside(cell, others, rng) -> tuple[float, float, float] | None:
  """A free place (x, y, radius) near the middle of a cell; None if 200 samples find none."""
  for _ in range(200):
    new = _around(cell, rng)
    if all(_apart(new, other) for other in others):
      return new
  return None


def _around(cell, rng):
  radius = rng.uniform(MIN_RADIUS, MAX_RADIUS)
  y, x = ((i + 0.5) * CELL + rng.uniform(-_SHIFT, _SHIFT) for i in cell)
  low, high = radius + 0.5, SIZE - radius - 0.5
  return float(np.clip(x, low, high)), float(np.clip(y, low, high)), float(radius)


def _apart(a, b):
  return max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= a[2] + b[2] + _GAP


def _sample_tone(rng):
  return tuple(int(v) for v in rng.integers(-_TONE, _TONE + 1, 3))


_SAMPLES = 4  # a side of each pixel, for soft edges


def paint(scene: Scene) -> np.ndarray:
  """The image of a scene, uint8 [64, 64, 3]."""
  image = np.tile(np.add(BACKGROUNDS[scene.background], scene.tone).astype(float), (SIZE, SIZE, 1))
  for thing in scene.things:
    window = tuple(slice(max(0, int(v - thing.radius - 2)), min(SIZE, int(v + thing.radius + 3)))
                   for v in (thing.y, thing.x))
    y, x = (np.arange(s.start, s.stop, 1 / _SAMPLES) + 0.5 / _SAMPLES for s in window)
    inside = _INSIDE[thing.shape]((x[None, :] - thing.x) / thing.radius,
                                  (y[:, None] - thing.y) / thing.radius)
    cover = inside.reshape(len(y) // _SAMPLES, _SAMPLES, -1, _SAMPLES).mean((1, 3))
    image[window] += cover[..., None] * (COLORS[thing.color] - image[window])
  return np.clip(np.round(image), 0, 255).astype(np.uint8)


def _polygon(x, y, points):
  """Whether (x, y) is inside: a ray to the right meets an odd number of edges."""
  inside = np.zeros(np.broadcast(x, y).shape, bool)
  for (x1, y1), (x2, y2) in zip(points, points[1:] + points[:1]):
    if y1 != y2:
      inside ^= ((y1 > y) != (y2 > y)) & (x < x1 + (y - y1) * (x2 - x1) / (y2 - y1))
  return inside


_STAR = [(r * math.sin(i * math.pi / 5), 0.08 - r * math.cos(i * math.pi / 5))
         for i, r in enumerate((1.05, 0.42) * 5)]

# x to the right, y down, in radii from the middle of the thing.
_INSIDE = {
    "circle": lambda x, y: x**2 + y**2 < 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.88,
    "triangle": lambda x, y: _polygon(x, y, [(0, -1), (1, 0.9), (-1, 0.9)]),
    "diamond": lambda x, y: abs(x) + abs(y) < 1.05,
    "star": lambda x, y: _polygon(x, y, _STAR),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.32) & (np.maximum(abs(x), abs(y)) < 1),
    "ring": lambda x, y: (x**2 + y**2 < 1) & (x**2 + y**2 > 0.25),
}
