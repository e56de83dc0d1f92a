"""The mini worlds: scenes of coloured shapes, and the prompts that ask for them.

An image has 64 x 64 pixels and is divided into 4 x 4 cells. A thing stands near the middle of a
cell and may overlap the next one. What differs between worlds is in `World`, a value; `WORLDS` has
all of them. Where a function takes a world, the default is the first one; records, scenes and what
the verifier has seen carry theirs.

A record is in GenEval's form: {"tag", "include": [{"class", "count", "color", "position"}],
"exclude", "prompt"}; a class is a shape, and a position is [relation, index of another clause].
Clauses may also have a "detail", and records of other worlds than the first have a "world".
Counts are exact: "two red circles" means two, and an image must show nothing else.
"""

import dataclasses
import functools
import hashlib
import itertools
import pathlib
import tomllib
import typing

import numpy as np

from irg_jax.mini import phrasing, tasks
from irg_jax.mini.phrasing import noun, nouns, relations

SIZE = 64  # pixels a side
GRID = 4  # rows and columns of cells
CELL = SIZE // GRID

COLORS = {
    "red": (220, 40, 40), "orange": (245, 140, 30), "yellow": (245, 215, 50),
    "green": (50, 160, 70), "blue": (50, 90, 210), "purple": (130, 60, 170),
    "pink": (250, 110, 190), "brown": (130, 85, 50),
}
# Share of white in the lighter tone of a colour; all tones are far from the colours and grounds.
LIGHTER = {"red": 0.35, "orange": 0.5, "yellow": 0.5, "green": 0.3, "blue": 0.35, "purple": 0.35,
           "pink": 0.5, "brown": 0.3}
BACKGROUNDS = {"white": (245, 245, 245), "grey": (170, 170, 170), "black": (25, 25, 25),
               "mint": (190, 230, 205)}
_TEST_SHARE = 5  # one prompt in this many is held out for the test
_FILES = pathlib.Path(__file__).parent / "files"


@dataclasses.dataclass(frozen=True, eq=False)
class World:
  """Things, tasks and phrasings of a world, and what is held out of training."""

  name: str
  shapes: tuple[str, ...]
  radii: dict[str, tuple[float, float]]  # by detail, in pixels; a world without details has ""
  most: int  # things in the scene of a prompt
  inside: bool  # each thing stays in its own cell: else many hardly ever fit side by side
  star: float  # radii from the middle of a star to its inner corners
  cross: float  # half the width of the bars of a cross, in radii
  tasks: dict[str, tasks.Task]
  wording: dict  # the content of its file: phrasings, and what is held out
  phrase: typing.Callable  # include clauses, wording, Generator -> prompt, its relations
  aided: bool = True  # its texts and rows help a model to place and to look (docs/mini.md)
  colors: typing.ClassVar[dict] = COLORS

  @property
  def details(self) -> tuple[str, ...]:
    return tuple(self.radii)

  @functools.cached_property
  def unseen_pairs(self) -> frozenset[tuple[str, str]]:
    """(shape, colour) and (shape, detail) that training must not show, nor ask for."""
    return frozenset(map(tuple, self.wording["unseen_pairs"]))

  @functools.cached_property
  def unseen_relations(self) -> frozenset[tuple[str, str, str]]:
    """(shape, relation, shape) that training must not ask for, whichever is named first."""
    return frozenset(map(tuple, self.wording["unseen_relations"]))


WORLD1 = World(
    name="1", shapes=("circle", "square", "triangle", "diamond", "star", "cross", "ring"),
    radii={"": (5.5, 7.5)}, most=5, inside=False, star=0.42, cross=0.32, tasks=tasks.TASKS,
    wording=tomllib.loads((_FILES / "world.toml").read_text()), phrase=phrasing.formal,
    aided=False)  # as the package's model was trained
_LARGE = (6.2, 7.0)
WORLD2 = World(
    name="2", shapes=("circle", "square", "triangle", "diamond", "star", "cross", "heart"),
    radii={"plain": _LARGE, "hollow": _LARGE, "striped": _LARGE, "dotted": _LARGE,
           "small": (4.0, 4.8)},
    most=12, inside=True, star=0.58, cross=0.47, tasks=tasks.TASKS2,
    wording=tomllib.loads((_FILES / "world2.toml").read_text()), phrase=phrasing.typed)
WORLDS = {world.name: world for world in (WORLD1, WORLD2)}


@dataclasses.dataclass(frozen=True)
class Thing:
  """A shape in an image."""

  shape: str
  color: str
  x: float  # its middle, in pixels from the left and the top edge
  y: float
  radius: float  # half the side of its bounding square, in pixels
  detail: str = ""

  @property
  def cell(self) -> tuple[int, int]:
    """(row, column) of its middle."""
    return tuple(min(max(int(v // CELL), 0), GRID - 1) for v in (self.y, self.x))

  @property
  def kind(self) -> str:
    """"red circle", or "striped red circle" in a world with details."""
    return f"{self.detail} {self.color} {self.shape}".lstrip()

  @property
  def pairs(self) -> set[tuple[str, str]]:
    """Pairs of words that may be held out of training, see `World.unseen_pairs`."""
    return {(self.shape, self.color), (self.shape, self.detail)}


@dataclasses.dataclass(frozen=True)
class Scene:
  """The content of an image."""

  background: str
  things: tuple[Thing, ...]
  tone: tuple[int, int, int] = (0, 0, 0)  # added to the levels of the background
  world: World = dataclasses.field(default=WORLD1, repr=False)
  unclear: typing.ClassVar[tuple] = ()  # a `verifier.Seen` may have such cells


def lighter(color: str) -> tuple[float, ...]:
  """The lighter tone of a colour, in levels."""
  return tuple(v + LIGHTER[color] * (255 - v) for v in COLORS[color])


def of(record: dict) -> World:
  """The world of a record."""
  return WORLDS[record.get("world", WORLD1.name)]


def sample_record(task: str, rng, world: World = WORLD1) -> dict:
  """A random record of a task, with a prompt in one of several phrasings.

  In world 2 "placed" has the relations as its prompt says them.
  """
  while not (include := world.tasks[task].clauses(world, rng)):
    pass
  exclude = [{"class": c["class"], "count": c["count"] + 1} for c in include]
  prompt, placed = world.phrase(include, world.wording, rng)
  record = {"tag": task, "include": include, "exclude": exclude if task == "counting" else [],
            "prompt": prompt}
  return record if world is WORLD1 else record | {"world": world.name, "placed": placed}


def training_record(rng, world: World = WORLD1, task: str | None = None) -> dict:
  """A record that training may show, of a task, or of a random one."""
  shares = np.array([task.share for task in world.tasks.values()])
  while True:
    chosen = task or str(rng.choice([*world.tasks], p=shares / shares.sum()))
    record = sample_record(chosen, rng, world)
    if not is_unseen(record) and not is_for_test(record):
      return record


def test_records(task: str, count: int, unseen: bool, world: World = WORLD1) -> list[dict]:
  """Records of a task for the test, the same at every call; "split" is "seen" or "unseen".

  `unseen`: whether they have what is held out of training. Fewer than `count` where a task has no
  more, none where nothing of it is ever held out.
  """
  rng, found = np.random.default_rng([*task.encode(), unseen]), {}
  for _ in range(100 * count):
    if len(found) == count:
      break
    record = sample_record(task, rng, world)
    if is_unseen(record) == unseen and is_for_test(record):
      found[record["prompt"]] = record | {"split": "unseen" if unseen else "seen"}
  return list(found.values())


def is_unseen(record: dict) -> bool:
  """Whether a record has a pair of shape and word, or a relation, held out of training."""
  world, include, found = of(record), record["include"], []
  for i, relation, j in relations(include):
    if relation in ("right of", "below"):
      i, relation, j = j, phrasing.INVERSE[relation], i
    found.append((include[i]["class"], relation, include[j]["class"]))
  pairs = {(clause["class"], clause.get(key)) for clause in include for key in ("color", "detail")}
  return bool(pairs & world.unseen_pairs or world.unseen_relations.intersection(found))


def is_for_test(record: dict) -> bool:
  """Whether the exact words of its prompt, in capitals or not, are held out for the test."""
  words = record["prompt"].lower().rstrip(".!")
  digest = hashlib.blake2b(words.encode(), digest_size=4).digest()
  return int.from_bytes(digest, "big") % _TEST_SHARE == 0


def prompt_rules(world: World = WORLD1) -> tuple[str, ...]:
  """The grammar of prompts, for `generate.prompts.PromptForm`: files/prompts.toml and the names."""
  vowel = [color for color in COLORS if color[0] in "aeiou"]
  plurals = [noun(2, shape).split()[1] for shape in world.shapes]
  rules = {
      "frame": [frame.format("<things>") for frame in world.wording["frames"]],
      "shape": world.shapes, "plural": plurals,
      "slip": [f"{shape} -> {plural}" for shape, plural in zip(world.shapes, plurals)],
      "color": [color for color in COLORS if color not in vowel], "vowel_color": vowel,
      "relation": [*itertools.chain(*world.wording["relations"].values()), "<other_relation>"],
      "alike": [f"<any_{s}> <is> <relation> <any_{s}> -> <1> <3> <4>" for s in world.shapes],
      "same": [form.format(f"<any_{c}>") for c in COLORS for form in _SAME]}
  rules |= {f"any_{c}": (f"<one> {c} <shape> -> {noun(1, '<2>', c)} # 1",
                         f"<digit> {c} <any_plural> -> <1> {c} <2>") for c in COLORS}
  rules |= {f"any_{shape}": (f"<one> {shape} -> a {shape} # 1", f"<digit> {plural}")
            for shape, plural in zip(world.shapes, plurals)}
  rules |= tomllib.loads((_FILES / "prompts.toml").read_text())["rules"]
  return tuple(f"{name} = {' | '.join(options)}" for name, options in rules.items())


# Kinds of things of one colour, which is put in.
_SAME = ("{0} <is> <relation> {0} -> <1> <3> <4>", "{0} <joined> {0} -> <1> and <3>",
         "{0} <joined> {0} <joined> <thing> -> <1> , <3> and <5>",
         "{0} <joined> <thing> <joined> {0} -> <1> , <3> and <5>",
         "<thing> <joined> {0} <joined> {0} -> <1> , <3> and <5>")
