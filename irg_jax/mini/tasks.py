"""What is asked for in the mini world: GenEval's six tasks and free combinations of them.

A record is GenEval's: {"tag", "include": [{"class", "count", "color", "position"}], "exclude",
"prompt"}; here class is a shape. A clause is meant exactly: "two red circles" are two, no more,
and an image holds nothing that was not asked for.
"""

import hashlib
import itertools
import re

from irg_jax.mini import world

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr", "free")
RELATIONS = ("left of", "right of", "above", "below")
_INVERSE = {"right of": "left of", "below": "above"}

# Never in training: one colour of each shape, in any image or prompt, ...
UNSEEN_PAIRS = frozenset({
    ("circle", "green"), ("square", "pink"), ("triangle", "blue"), ("diamond", "red"),
    ("star", "purple"), ("cross", "yellow"), ("ring", "orange"),
})
# ... and these relations of two shapes, in any prompt, in either direction of speech.
UNSEEN_RELATIONS = frozenset({
    ("circle", "left of", "star"), ("square", "left of", "ring"), ("triangle", "left of", "cross"),
    ("star", "left of", "diamond"), ("ring", "left of", "triangle"),
    ("cross", "above", "circle"), ("diamond", "above", "square"), ("star", "above", "triangle"),
    ("ring", "above", "star"), ("square", "above", "circle"),
})
TRAINING_SHARES = (0.05, 0.13, 0.10, 0.05, 0.24, 0.15, 0.28)  # of the tasks: more of the hard ones
TEST_SHARE = 5  # one prompt of as many is kept for the test

_FRAMES = ("{}", "a picture of {}", "draw {}", "please paint {}", "an image with {}",
           "show me {}", "i would like to see {}", "make a drawing of {}", "{} on a plain ground",
           "a simple picture that shows {}")
_RELATION_WORDS = {"left of": ("left of", "to the left of"),
                   "right of": ("right of", "to the right of"),
                   "above": ("above", "over"), "below": ("below", "under")}
NUMBERS = ("no", "one", "two", "three", "four", "five")


def sample_record(task: str, rng) -> dict:
  """A random record of a task, with a prompt in one of many phrasings."""
  while True:
    include = _CLAUSES[task](rng)
    if include is not None:
      break
  record = {"tag": task, "include": include,
            "exclude": [{"class": c["class"], "count": c["count"] + 1} for c in include]
            if task == "counting" else []}
  return record | {"prompt": phrase(record, rng)}


def is_unseen(record: dict) -> bool:
  """Whether it names a shape in a colour, or a relation, that training never shows."""
  include = record["include"]
  for clause in include:
    if (clause["class"], clause.get("color")) in UNSEEN_PAIRS:
      return True
    if "position" in clause:
      relation, other = clause["position"]
      a, b = clause["class"], include[other]["class"]
      if relation in _INVERSE:
        a, relation, b = b, _INVERSE[relation], a
      if (a, relation, b) in UNSEEN_RELATIONS:
        return True
  return False


def is_for_test(record: dict) -> bool:
  """Whether its prompt, in these very words, belongs to the test and not to training."""
  digest = hashlib.blake2b(record["prompt"].encode(), digest_size=4).digest()
  return int.from_bytes(digest, "big") % TEST_SHARE == 0


def training_record(rng) -> dict:
  """A record that may be trained on, of a random task."""
  while True:
    record = sample_record(str(rng.choice(TASKS, p=TRAINING_SHARES)), rng)
    if not is_unseen(record) and not is_for_test(record):
      return record


def test_records(count: int, rng, *, unseen: bool) -> list[dict]:
  """Different records of the test, all tasks in turn; each says "seen" or "unseen" in "split".

  Args:
    count: how many. Some tasks cannot be unseen and are then passed over.
    unseen: of combinations that training never shows, or of those that it does.
  """
  tasks = [t for t in TASKS if not (unseen and t in ("single_object", "two_object", "counting"))]
  records, prompts = [], set()
  turns = itertools.cycle(tasks)
  while len(records) < count:
    task = next(turns)
    for _ in range(2000):  # few prompts of one object exist; then the task is passed over
      record = sample_record(task, rng)
      if (is_unseen(record) == unseen and is_for_test(record)
          and record["prompt"] not in prompts):
        prompts.add(record["prompt"])
        records.append(record | {"split": "unseen" if unseen else "seen"})
        break
  return records


def sample_scene(record: dict, rng) -> world.Scene:
  """A scene that shows exactly what a record asks for, free where it leaves freedom.

  A pair that training must not show is never chosen where the colour is free.
  """
  include = record["include"]
  counts = [clause["count"] for clause in include]
  owners = [i for i, n in enumerate(counts) for _ in range(n)]
  while True:
    cells = [divmod(int(i), world.GRID)
             for i in rng.choice(world.GRID**2, len(owners), replace=False)]
    groups = [[c for c, owner in zip(cells, owners) if owner == i] for i in range(len(include))]
    if relations_hold(include, groups):
      break
  things = tuple(
      world.Thing(include[owner]["class"], color_of(include[owner], rng), *place)
      for owner, place in zip(owners, world.place(cells, rng)))
  tone = world.sample_tone(rng)
  return world.Scene(world.sample_background(rng), things, tone)


def training_scene(rng) -> world.Scene:
  """A scene of some `training_record`."""
  return sample_scene(training_record(rng), rng)


def crowded_scene(rng) -> world.Scene:
  """A scene that no prompt asks for, with things in up to 13 cells; no unseen pair is in it."""
  pairs = [(shape, color) for shape in world.SHAPES for color in world.COLORS
           if (shape, color) not in UNSEEN_PAIRS]
  cells = rng.permutation(world.GRID**2)[:rng.integers(1, world.GRID**2 - 2)]
  places = []
  for cell in cells:
    place = world.place_beside(divmod(int(cell), world.GRID), places, rng)
    places += [place] if place else []
  things = tuple(world.Thing(*pairs[rng.integers(len(pairs))], *place) for place in places)
  return world.Scene(world.sample_background(rng), things, world.sample_tone(rng))


def relations_hold(include, groups) -> bool:
  """Whether cells (row, column) of each clause stand as the clauses say, and clearly so."""
  for clause, group in zip(include, groups):
    if "position" in clause:
      relation, other = clause["position"]
      if not all(cell_relation(a, b) == relation for a in group for b in groups[other]):
        return False
  return True


def cell_relation(a, b) -> str | None:
  """Where cell `a` is as seen from `b`; None on a diagonal, where it is not clear."""
  down, right = a[0] - b[0], a[1] - b[1]
  if abs(right) > abs(down):
    return "left of" if right < 0 else "right of"
  if abs(down) > abs(right):
    return "above" if down < 0 else "below"
  return None


def phrase(record: dict, rng) -> str:
  """A prompt for a record, in one of several phrasings."""
  include = record["include"]
  nouns = [noun(c["count"], c["class"], c.get("color")) for c in include]
  placed = [i for i, c in enumerate(include) if "position" in c]
  if placed:
    relation, other = include[placed[0]]["position"]
    words = _RELATION_WORDS[relation][int(rng.integers(2))]
    text = f"{nouns[placed[0]]} {words} {nouns[other]}"
  else:
    text = " and ".join(filter(None, [", ".join(nouns[:-1]), nouns[-1]]))
  return _FRAMES[int(rng.integers(len(_FRAMES)))].format(text)


def words() -> set[str]:
  """All words of prompts."""
  frames = [*_FRAMES, *(w for words in _RELATION_WORDS.values() for w in words)]
  nouns = [noun(count, shape, color) for count in (1, 2) for shape in world.SHAPES
           for color in (None, *world.COLORS)]
  return set(re.findall(r"\w+", " ".join([*frames, *nouns, *NUMBERS[1:], "and"]).lower()))


def noun(count: int, shape: str, color: str | None = None, article: bool = True) -> str:
  """"a red circle", "two red circles"; with `article` false "one red circle"."""
  name = f"{color} {shape}" if color else shape
  if count == 1:
    first = ("an" if name[0] in "aeiou" else "a") if article else "one"
    return f"{first} {name}"
  return f"{NUMBERS[count]} {name}{'es' if name.endswith('s') else 's'}"


def color_of(clause, rng) -> str:
  """The colour of a clause, or one that training may show with its shape."""
  if "color" in clause:
    return clause["color"]
  return str(rng.choice([c for c in world.COLORS if (clause["class"], c) not in UNSEEN_PAIRS]))


def _clause(shape, count=1, color=None, position=None):
  clause = {"class": str(shape), "count": int(count)}
  if color is not None:
    clause["color"] = str(color)
  if position is not None:
    clause["position"] = position
  return clause


def _shapes(rng, n):
  return [str(s) for s in rng.choice(world.SHAPES, n, replace=False)]


def _colors(rng, n):
  return [str(c) for c in rng.choice(list(world.COLORS), n, replace=False)]


def _position(rng):
  first, second = _shapes(rng, 2)
  return [_clause(first), _clause(second, position=[str(rng.choice(RELATIONS)), 0])]


def _free(rng):
  """Up to three kinds of things in different numbers, often coloured, often placed."""
  kinds = int(rng.choice((1, 2, 2, 2, 3)))
  counts = rng.integers(1, 4, kinds)
  if counts.sum() > world.MAX_THINGS or (kinds == 1 and counts[0] == 1):
    return None
  shapes, colors = rng.choice(world.SHAPES, kinds), _colors(rng, kinds)
  alike = len(set(shapes)) < kinds  # then only their colours tell them apart
  include = [_clause(s, n, c if alike or rng.random() < 0.8 else None)
             for s, n, c in zip(shapes, counts, colors)]
  if kinds == 2 and rng.random() < 0.6:
    include[1]["position"] = [str(rng.choice(RELATIONS)), 0]
  return include


_CLAUSES = {
    "single_object": lambda rng: [_clause(_shapes(rng, 1)[0])],
    "two_object": lambda rng: [_clause(s) for s in _shapes(rng, 2)],
    "counting": lambda rng: [_clause(_shapes(rng, 1)[0], rng.integers(2, 5))],
    "colors": lambda rng: [_clause(_shapes(rng, 1)[0], 1, _colors(rng, 1)[0])],
    "position": _position,
    "color_attr": lambda rng: [_clause(s, 1, c) for s, c in zip(_shapes(rng, 2), _colors(rng, 2))],
    "free": _free,
}
