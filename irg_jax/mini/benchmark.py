"""The mini world's test: a benchmark whose judge is the verifier, and its figures.

  --prompts    test.jsonl; it comes with this package. Prompts of tasks that it lacks, which a fork
               has added to `tasks.TASKS`, are generated and stand after its own; those of another
               world than the first are all generated
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
from irg_jax.mini.world import WORLD1, WORLDS, World, of, test_records

FILES = pathlib.Path(__file__).parent / "files"
SPLITS = ("seen", "unseen")
NEW_PROMPTS = 24  # of a task that test.jsonl lacks, in each split
PARTS = ("things", "shape", "fill")  # see `parts`
RIGHT = "correct"  # the words of an image without a fault
RESAMPLES, SEED = 2000, 0  # of the intervals

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
    own, items = path == FILES, []
    if not own or self.world is WORLD1:
      path = records.file_in(path, "test.jsonl")
      items = self.clause_items(path, self.world.tasks, SPLITS)
    known = frozenset(i.extra["tag"] for i in items)
    new = new_records(self.world, known) if own or path.parent == FILES else ()
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


def arm_figures(drawn: Drawn) -> dict:
  """All figures, as JSON values: {"rounds": {"1": ...}, "cost": ...}."""
  rounds = {}
  for number, right in enumerate(drawn.right, 1):
    values = np.ma.masked_invalid(right).mean(-1).filled(np.nan)
    there = int((~np.isnan(right)).sum())
    seconds = [sum(trace["rounds"][number - 1]["seconds"].values())
               for trace in drawn.traces.values() if len(trace["rounds"]) >= number]
    rounds[str(number)] = entry = {
        "scores": scores(values, drawn.items),
        "by_prompt": [None if np.isnan(v) else float(v) for v in values],
        "pictures": there, "missing": len(drawn.traces) - there,
        "plan_drawn": plan_drawn(drawn, number),
        # The median: the first batch, which compiles, has no effect.
        "seconds": float(np.median(seconds)) if seconds else None}
    lines = [line["scores"] for (*_, n), line in drawn.lines.items() if n == number]
    if any("things" in scored for scored in lines):
      entry["parts"] = {name: float(np.mean([scored[name] for scored in lines if scored]))
                        for name in PARTS}
    if number > 1:
      entry["changes"] = changes(drawn.right[number - 2], right)
      entry["reflections"] = reflections(drawn, number)
  return {"rounds": rounds, "cost": drawn.cost}


def scores(values: np.ndarray, items) -> dict:
  """{split: {"tasks": {task: interval}, "overall": interval}} of [prompts]; NaN is left out."""
  tags, splits = np.array([(item.extra["tag"], item.extra["split"]) for item in items]).T
  found, names = {}, of(items[0].extra).tasks
  for split in ("all", *SPLITS):
    own = np.where((splits == split) | (split == "all"), values, np.nan)
    tasks = {task: interval(np.where(tags == task, own, np.nan), tags) for task in names}
    found[split] = {"tasks": {t: v for t, v in tasks.items() if v}, "overall": interval(own, tags)}
  return found


def difference(after, before, items) -> dict:
  """{split: interval} of the paired difference of two "by_prompt", over prompts in both."""
  change = np.array(after, float) - np.array(before, float)
  return {split: found["overall"] for split, found in scores(change, items).items()}


def interval(values: np.ndarray, tags: np.ndarray) -> dict | None:
  """The mean over tasks of their means over prompts, with its 95 % bootstrap interval.

  `values` is float [prompts], NaN is left out; prompts are resampled within each task of `tags`.
  Returns {"value", "low", "high", "prompts"}, or None without a value.
  """
  rng, means, samples = np.random.default_rng(SEED), [], []
  for tag in dict.fromkeys(tags.tolist()):
    own = values[(tags == tag) & ~np.isnan(values)]
    if len(own):
      means.append(own.mean())
      samples.append(own[rng.integers(len(own), size=(RESAMPLES, len(own)))].mean(1))
  if not means:
    return None
  low, high = np.percentile(np.mean(samples, 0), (2.5, 97.5))
  return {"value": float(np.mean(means)), "low": float(low), "high": float(high),
          "prompts": int((~np.isnan(values)).sum())}


def changes(before: np.ndarray, after: np.ndarray) -> dict:
  """Shares of correct images made wrong and wrong ones made correct; as rows of `Drawn.right`."""
  both = ~np.isnan(before) & ~np.isnan(after)
  before, after = before[both] == 1, after[both] == 1
  return {"right_to_wrong": _share((before & ~after).sum(), before.sum()),
          "wrong_to_right": _share((~before & after).sum(), (~before).sum())}


def reflections(drawn: Drawn, number: int) -> dict:
  """Compares the thoughts before round `number` with the verifier's view of the image before.

  Shares: "readable", of all; "faults_named": exactly the actual faults, of all (a correct image
  has none); "wrong_faults_named": the same, of wrong images; "wrong_noticed": some fault, of wrong
  images; "right_doubted": some fault, of correct ones; "seen_rightly": all cells as the verifier
  sees them, of all.
  """
  rows = []
  for (i, image), trace in drawn.traces.items():
    line = drawn.lines.get((i, image, number - 1))
    if line is None or not line["scores"] or len(trace["rounds"]) < number:
      continue
    if (think := trace["rounds"][number - 1]["think"]) is None:  # its image was kept before
      continue
    said, actual = thoughts.read_faults(think), faults(line["words"])
    looked = thoughts.read_grid(think.split("What falls short:")[0])
    rows.append((said is not None, said is not None and sorted(said) == sorted(actual), bool(said),
                 bool(actual), line["grid"] is not None and looked == line["grid"]))
  readable, exact, doubts, wrong, sees = np.array(rows, bool).reshape(-1, 5).T
  return {"readable": _share(readable.sum(), len(rows)),
          "faults_named": _share(exact.sum(), len(rows)),
          "wrong_faults_named": _share((exact & wrong).sum(), wrong.sum()),
          "wrong_noticed": _share((doubts & wrong).sum(), wrong.sum()),
          "right_doubted": _share((doubts & ~wrong).sum(), (~wrong).sum()),
          "seen_rightly": _share(sees.sum(), len(rows))}


def plan_drawn(drawn: Drawn, number: int) -> dict | None:
  """Share of images with all cells as their thought plans them; None without thoughts."""
  found = []
  for (i, image), trace in drawn.traces.items():
    line = drawn.lines.get((i, image, number))
    if line is not None and (thought := trace["rounds"][number - 1]["think"]) is not None:
      found.append(line["grid"] is not None and thoughts.read_grid(thought) == line["grid"])
  return _share(sum(found), len(found)) if found else None


def choose(drawn: Drawn) -> list[dict]:
  """The traces to show of each of `KINDS`: the first of the test, by task and split in turn.

  [{"kind", "prompt", "tasks", "seed", "turns": [{"thought", "image": PNG, "faults"}] * 2}]
  """
  chosen = []
  for kind, before, after, count in KINDS if len(drawn.right) > 1 else ():
    fits, groups = (drawn.right[0] == before) & (drawn.right[1] == after), {}
    for i, image in np.argwhere(fits).tolist():
      extra = drawn.items[i].extra
      groups.setdefault((extra["tag"], extra["split"]), []).append((i, image))
    for key in in_turn(groups)[:count]:
      trace, lines = drawn.traces[*key], [drawn.lines[*key, number] for number in (1, 2)]
      turns = [{"thought": entry["think"], "image": (drawn.folder / line["file"]).read_bytes(),
                "faults": faults(line["words"])} for entry, line in zip(trace["rounds"], lines)]
      chosen.append({"kind": kind, "prompt": trace["prompt"], "seed": trace["seed"],
                     "tasks": lines[0]["tasks"], "turns": turns})
  return chosen


def in_turn(groups: dict) -> list:
  """The members of all groups: the first of each, then the second of each, and so on."""
  return [key for _, key in sorted(
      (place, key) for group in groups.values() for place, key in enumerate(group))]


def _share(count, of):
  return {"count": int(count), "of": int(of), "share": float(count / of) if of else None}
