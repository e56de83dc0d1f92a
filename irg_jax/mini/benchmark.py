"""The mini world's test as a benchmark: clauses, with the verifier in place of a detector.

  --prompts    test.jsonl; it comes with this package
  item ids     "00000", the line from 0
  images       roundN/00000/samples/00000.png ... 00003.png, and roundN/00000/metadata.jsonl
"""

import hashlib
import pathlib

import numpy as np
from PIL import Image

from irg_jax import evaluate
from irg_jax.evaluate import base
from irg_jax.evaluate import clauses
from irg_jax.evaluate import records
from irg_jax.evaluate import score
from irg_jax.mini import thoughts
from irg_jax.mini import verifier
from irg_jax.mini import world

FILES = pathlib.Path(__file__).parent / "files"
SPLITS = {"seen": 168, "unseen": 96}
RIGHT = "correct"  # the words of an image without a fault


class Mini(clauses.ClauseBenchmark):
  """The protocol of the mini world's test."""

  name, title, packaged, published_counts = "mini", "Mini world", FILES, SPLITS
  columns = ("Mini world",)
  images_help = "4"
  example_checkpoint = "out/mini/checkpoint"
  sources = "the verifier of the mini world (irg_jax/mini/verifier.py)."
  tasks_help = "mini's tags, seen, unseen"

  def read_items(self, path):
    return self.clause_items(records.file_in(path, "test.jsonl"), world.TASKS, SPLITS)

  def tasks(self, item):
    return (item.extra["tag"], item.extra["split"])

  def score(self, folder, options=None, open_judge=None):
    return score.score_images(folder, Verified, {"protocol": protocol()})


MINI = Mini()
evaluate.register(MINI)


def protocol() -> dict:
  """All that decides a score: the verifier, by a digest of its sources."""
  digest = hashlib.sha256()
  for module in (verifier, world):
    digest.update(pathlib.Path(module.__file__).read_bytes())
  return {"verifier": verifier.__name__, "sha256": digest.hexdigest()[:16]}


class Verified:
  """Adds up a round's images, as `score.score_images` wants it.

  An image's line of items.jsonl gets "grid" too: what the verifier sees in each cell, or None
  where two things stand in one.
  """

  def __init__(self):
    self._all = clauses.TaskSummary(world.TASKS)
    self._splits = {name: clauses.TaskSummary(()) for name in SPLITS}
    self._unscored = base.Unscored()

  def add(self, item, path) -> dict:
    """Judges the image at `path`; returns its scores and the faults in words."""
    try:
      with Image.open(path) as image:
        verdict = verifier.score(np.asarray(image.convert("RGB")), item.extra)
    except (OSError, ValueError) as e:
      self._unscored.add(str(path), "not an image of the mini world", str(e))
      return {"scores": {}, "why": str(e), "words": None, "grid": None}
    for summary in (self._all, self._splits[item.extra["split"]]):
      summary.add(verdict.correct, item.extra["tag"], item.id)
    return {"scores": {"correct": int(verdict.correct)}, "why": None,
            "words": ", ".join(verdict.faults) or RIGHT, "grid": seen_grid(verdict.seen)}

  def value(self) -> dict:
    """As `clauses.TaskSummary`, and so again for each split under "splits"."""
    splits = {name: summary.value() for name, summary in self._splits.items()}
    for summary in splits.values():
      del summary["missing_tasks"]  # some tasks cannot be unseen
    return self._all.value() | {"splits": splits, "unscored": self._unscored.summary()}


def seen_grid(seen) -> list[list[str]] | None:
  """The things in each cell, in the words of the thoughts; None where words cannot say it."""
  try:
    return thoughts.grid(seen.things, seen.unclear)
  except thoughts.Inexpressible:
    return None


def faults(words: str) -> tuple[str, ...]:
  """The faults that a line's words name."""
  return () if words == RIGHT else tuple(words.split(", "))
