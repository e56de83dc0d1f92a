"""The mini world's test: GenEval's form and figures, with its verifier in the detector's place."""

import hashlib
import pathlib

import numpy as np
from PIL import Image

from irg_jax.evaluate import geneval
from irg_jax.evaluate import prompts
from irg_jax.evaluate import tally
from irg_jax.mini import outlines
from irg_jax.mini import tasks
from irg_jax.mini import thoughts
from irg_jax.mini import verifier
from irg_jax.mini import world

RIGHT = "correct"  # the words of an image without a fault


def protocol() -> dict:
  """What decides a score: the verifier, by a digest of its sources."""
  digest = hashlib.sha256()
  for module in (verifier, outlines, world, tasks):
    digest.update(pathlib.Path(module.__file__).read_bytes())
  return {"verifier": verifier.__name__, "sha256": digest.hexdigest()[:16]}


class Verified:
  """Adds up a round's images, as `score.score_images` wants it.

  A picture's line of items.jsonl gets "grid" too: what the verifier sees in each cell, or None
  where two things stand in one.
  """

  def __init__(self):
    self._all = geneval.Summary(tasks.TASKS)
    self._splits = {name: geneval.Summary(()) for name in prompts.MINI_SPLITS}
    self._unscored = tally.Unscored()

  def add(self, item, path) -> dict:
    """Judges the image at `path`; returns its scores and the faults in words."""
    try:
      with Image.open(path) as image:
        verdict = verifier.score(np.asarray(image.convert("RGB")), item.extra)
    except (OSError, ValueError) as e:
      self._unscored.add(str(path), "not an image of the mini world", str(e))
      return {"scores": {}, "why": str(e), "words": None, "grid": None}
    result = {"correct": verdict.correct, "tag": item.extra["tag"], "metadata": item.id}
    self._all.add(result)
    self._splits[item.extra["split"]].add(result)
    return {"scores": {"correct": int(verdict.correct)}, "why": None,
            "words": ", ".join(verdict.faults) or RIGHT, "grid": seen_grid(verdict.seen)}

  def value(self) -> dict:
    """As `geneval.Summary`, and so again for each split under "splits"."""
    splits = {name: summary.value() for name, summary in self._splits.items()}
    for summary in splits.values():
      del summary["missing_tasks"]  # some tasks cannot be unseen
    return self._all.value() | {"splits": splits, "unscored": self._unscored.summary()}


def seen_grid(seen) -> list[list[str]] | None:
  """What stands in each cell, in the words of the thoughts; None where it cannot be said so."""
  try:
    return thoughts.grid(seen.things, seen.unclear)
  except thoughts.Inexpressible:
    return None


def faults(words: str) -> tuple[str, ...]:
  """The faults that a line's words name."""
  return () if words == RIGHT else tuple(words.split(", "))
