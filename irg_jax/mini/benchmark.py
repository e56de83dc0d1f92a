"""The mini world's test: a benchmark whose judge is the verifier, and its figures.

  --prompts    test.jsonl, or test2.jsonl of world 2, as in this package. Prompts of tasks that it
               lacks, which a fork has added to a world's tasks, are generated and stand last
  item ids     "00000", the line from 0
  images       roundN/00000/samples/00000.png ... 00003.png, and roundN/00000/metadata.jsonl
"""

import collections
import dataclasses
import functools
import hashlib
import json
import pathlib

import numpy as np

from irg_jax import evaluate, images
from irg_jax.evaluate import base, clauses, questions, records, score
from irg_jax.mini import thoughts, verifier
from irg_jax.mini import world as world_lib
from irg_jax.mini.world import WORLD1, WORLDS, World, test_records

FILES = pathlib.Path(__file__).parent / "files"
SPLITS = ("seen", "unseen")
NEW_PROMPTS = 24  # of a task that the file lacks, in each split
PARTS = ("things", "shape", "fill")  # see `parts`
RIGHT = "correct"  # the words of an image without a fault

# (title, correct before, correct after, number of traces to show)
KINDS = (("wrong, then right", False, True, 4), ("right both times", True, True, 2),
         ("right, then wrong", True, False, 3), ("wrong both times", False, False, 3))


class Mini(clauses.ClauseBenchmark):
  """The protocol of a mini world's test."""

  packaged = FILES
  images_help = "4"
  example_checkpoint = ""  # the one in the package
  sources = "the verifier of the mini world (irg_jax/mini/verifier.py)."
  tasks_help = "mini's tags, seen, unseen"

  def __init__(self, world: World):
    self.world, number = world, "" if world is WORLD1 else world.name
    self.name, self.title = f"mini{number}", f"Mini world {number}".rstrip()
    self.columns = (self.title,)
    super().__init__()

  def read_items(self, path):
    path = records.file_in(path, self.name.replace("mini", "test") + ".jsonl")
    items = self.clause_items(path, self.world.tasks, SPLITS)
    known = frozenset(i.extra["tag"] for i in items)
    new = new_records(self.world, known) if path.parent == FILES else ()
    return items + [base.Item(self.name, f"{i:05}", record["prompt"], 4, record)
                    for i, record in enumerate(new, len(items))]

  def counts(self, size):
    return dict(collections.Counter(item.extra["split"] for item in self.read()))

  def tasks(self, item):
    return (item.extra["tag"], item.extra["split"])

  def right(self, item, image):
    """Whether an image, uint8 [64, 64, 3], is what the prompt says."""
    return verifier.score(image, item.extra).correct

  def score(self, folder, options=None, open_judge=None):
    summaries = functools.partial(Verified, self.world)
    return score.score_images(folder, summaries, {"protocol": protocol()})


MINIS = {world.name: Mini(world) for world in WORLDS.values()}
MINI = MINIS[WORLD1.name]
for _mini in MINIS.values():
  evaluate.register(_mini)


@functools.cache
def new_records(world: World, known: frozenset[str]) -> list[dict]:
  """Test records of all tasks of a world but those in `known`."""
  return [record for unseen in (False, True) for task in world.tasks if task not in known
          for record in test_records(task, NEW_PROMPTS, unseen, world)]


def protocol() -> dict:
  """The verifier, by a digest of its sources: scores of another one are made again."""
  digest = hashlib.sha256()
  for module in (verifier, world_lib):
    digest.update(pathlib.Path(module.__file__).read_bytes())
  return {"verifier": verifier.__name__, "sha256": digest.hexdigest()[:16]}


class Verified:
  """Scores the images of a round, see `score.score_images`.

  An image's line of items.jsonl also has "grid", the content of each cell, see `seen_grid`. In a
  world with details its scores are also those of `parts`.
  """

  def __init__(self, world: World):
    self._parts = {name: base.Mean() for name in (PARTS if len(world.details) > 1 else ())}
    self._all = clauses.TaskSummary(world.tasks)
    self._splits = {name: clauses.TaskSummary(()) for name in SPLITS}
    self._unscored = base.Unscored()

  def add(self, item, path) -> dict:
    """Judges the image at `path`; returns its scores and the faults in words."""
    try:
      data = questions.read_image(path)
      verdict = verifier.score(images.decode_image(data, str(path)), item.extra)
    except ValueError as e:
      self._unscored.add(str(path), "not an image of the mini world", str(e))
      return {"scores": {}, "why": str(e), "words": None, "grid": None}
    for summary in (self._all, self._splits[item.extra["split"]]):
      summary.add(verdict.correct, item.extra["tag"], item.id)
    scored = {name: parts(verdict)[name] for name in self._parts}
    for name, value in scored.items():
      self._parts[name].add(value)
    return {"scores": {"correct": int(verdict.correct)} | scored, "why": None,
            "words": ", ".join(verdict.faults) or RIGHT, "grid": seen_grid(verdict.seen)}

  def value(self) -> dict:
    """The summary of `clauses.TaskSummary`, that of each split under "splits", and "parts"."""
    splits = {name: summary.value() for name, summary in self._splits.items()}
    for summary in splits.values():
      del summary["missing_tasks"]  # some tasks cannot be unseen
    means = {"parts": {name: mean.value() for name, mean in self._parts.items()}}
    return self._all.value() | {"splits": splits, "unscored": self._unscored.summary()} | (
        means if self._parts else {})


def parts(verdict) -> dict[str, float]:
  """Partial scores of an image: share of its things, and mean fidelity of shapes and fills."""
  shape, fill = np.mean(verdict.seen.fidelity or [(0.0, 0.0)], axis=0)
  return dict(zip(PARTS, (verdict.share, float(shape), float(fill))))


def seen_grid(seen) -> list[str] | None:
  """The content of each cell, see `thoughts.grid`; None where two things are in one cell."""
  try:
    return thoughts.grid(seen)
  except thoughts.Inexpressible:
    return None


def faults(words: str) -> tuple[str, ...]:
  """The faults in the words of a line of items.jsonl."""
  return () if words == RIGHT else tuple(words.split(", "))


@dataclasses.dataclass(frozen=True)
class Drawn:
  """Images of the test, generated and scored; prompts and images count from 0, rounds from 1."""

  folder: pathlib.Path
  items: list  # all prompts of the test
  right: np.ndarray  # float [rounds, prompts, images]: 1 right, 0 wrong, NaN without an image
  lines: dict  # items.jsonl by (prompt, image, round)
  traces: dict  # by (prompt, image)
  cost: dict  # content of cost.json, or {}


def read(folder, mini: Mini = MINI) -> Drawn:
  """Reads a folder of generated and scored images."""
  folder, items = pathlib.Path(folder), mini.read()
  numbers = {item.id: i for i, item in enumerate(items)}
  lines = {(numbers[line["id"]], line["picture"], line["round"]): line
           for _, line in records.read_lines(folder / score.ITEMS)}
  traces = {(i, image): trace for i, item in enumerate(items) for image in range(item.images)
            if (trace := base.read_trace(folder, item, image))}
  rounds = max((number for *_, number in lines), default=1)
  right = np.full((rounds, len(items), max(item.images for item in items)), np.nan)
  for (i, image, number), line in lines.items():
    right[number - 1, i, image] = line["scores"].get("correct", np.nan)
  cost = folder / "cost.json"
  return Drawn(folder, items, right, lines, traces,
               json.loads(cost.read_text()) if cost.is_file() else {})


def choose(drawn: Drawn) -> list[dict]:
  """The traces to show of each of `KINDS`: the first of the test, by task and split in turn.

  [{"kind", "prompt", "tasks", "seed", "turns": [{"thought", "image": PNG, "faults"}] * 2}]
  """
  chosen = []
  for kind, before, after, count in KINDS if len(drawn.right) > 1 else ():
    keys = np.argwhere((drawn.right[0] == before) & (drawn.right[1] == after)).tolist()
    for key in in_turn(keys, [drawn.lines[*key, 1]["tasks"] for key in keys])[:count]:
      trace, lines = drawn.traces[*key], [drawn.lines[*key, number] for number in (1, 2)]
      turns = [{"thought": entry["think"], "image": (drawn.folder / line["file"]).read_bytes(),
                "faults": faults(line["words"])} for entry, line in zip(trace["rounds"], lines)]
      chosen.append({"kind": kind, "prompt": trace["prompt"], "seed": trace["seed"],
                     "tasks": lines[0]["tasks"], "turns": turns})
  return chosen


def select(seen: int | None = None, unseen: int | None = None, images: int = 4,
           mini: Mini = MINI):
  """The first test prompts of each split, a task in turn, with at most `images` images each."""
  items, chosen = mini.read(), []
  for split, limit in (("seen", seen), ("unseen", unseen)):
    own = [item for item in items if item.extra["split"] == split]
    chosen += in_turn(own, [item.extra["tag"] for item in own])[:limit]
  return [dataclasses.replace(item, images=min(images, item.images)) for item in chosen]


def in_turn(entries: list, groups: list) -> list:
  """The first entry of each group, then the second of each, and so on; `groups` are by entry."""
  places = [groups[:i].count(group) for i, group in enumerate(groups)]
  return [entries[i] for i in np.argsort(places, kind="stable")]
