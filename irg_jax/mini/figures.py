"""Figures of the mini world's test: scores with intervals, changes between rounds, choices.

Of one arm, as JSON values, from the images that `benchmark.read` gives; and of several runs that
differ in the seed of training.
"""

import collections
import json
import pathlib

import numpy as np

from irg_jax.mini import thoughts
from irg_jax.mini.arms import WORDING
from irg_jax.mini.benchmark import PARTS, SPLITS, Drawn, faults
from irg_jax.mini.world import of

RESAMPLES, SEED = 2000, 0  # of the intervals


def arm_figures(drawn: Drawn) -> dict:
  """All figures, as JSON values: {"rounds": {"1": ...}, "cost": ...}."""
  rounds = {}
  for number, right in enumerate(drawn.right, 1):
    values = np.ma.masked_invalid(right).mean(-1).filled(np.nan)
    there = int((~np.isnan(right)).sum())
    told = [trace["rounds"][number - 1] for trace in drawn.traces.values()
            if len(trace["rounds"]) >= number]
    seconds = [sum(entry["seconds"].values()) for entry in told]
    rounds[str(number)] = entry = {
        **_scored(values, drawn.items), "pictures": there, "missing": len(drawn.traces) - there,
        "plan_drawn": plan_drawn(drawn, number),
        # The median: the first batch, which compiles, has no effect.
        "seconds": float(np.median(seconds)) if seconds else None,
        "passes": max((entry["passes"] for entry in told if "passes" in entry), default=None),
        "choices": open_choices(drawn, number)}
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

  `values` is float [prompts], or [seeds, prompts] to resample both; a prompt with NaN is left out.
  Prompts are resampled within each task of `tags`.
  Returns {"value", "low", "high", "prompts"}, or None without a value.
  """
  rng, means, samples = np.random.default_rng(SEED), [], []
  by_seed = np.atleast_2d(values)
  there, seeds = ~np.isnan(by_seed).any(0), len(by_seed)
  chosen = rng.integers(seeds, size=(RESAMPLES, seeds))  # of one seed, draws nothing
  for tag in dict.fromkeys(tags.tolist()):
    own = by_seed[:, (tags == tag) & there]
    if own.size:
      means.append(own.mean())
      prompts = rng.integers(own.shape[1], size=(RESAMPLES, own.shape[1]))
      samples.append(own[chosen[:, :, None], prompts[:, None]].mean((1, 2)))
  if not means:
    return None
  low, high = np.percentile(np.mean(samples, 0), (2.5, 97.5))
  return {"value": float(np.mean(means)), "low": float(low), "high": float(high),
          "prompts": int(there.sum())}


def changes(before: np.ndarray, after: np.ndarray) -> dict:
  """Shares of correct images made wrong and wrong ones made correct; as rows of `Drawn.right`."""
  return {"right_to_wrong": _share(after[(before == 1) & ~np.isnan(after)] == 0),
          "wrong_to_right": _share(after[(before == 0) & ~np.isnan(after)] == 1)}


def reflections(drawn: Drawn, number: int) -> dict:
  """Compares the thoughts before round `number` with the verifier's view of the image before.

  The shares are those of files/report.toml.
  """
  rows = []
  for (i, image), trace in drawn.traces.items():
    line = drawn.lines.get((i, image, number - 1))
    if line is None or not line["scores"] or len(trace["rounds"]) < number:
      continue
    if (think := trace["rounds"][number - 1]["think"]) is None:  # its image was kept before
      continue
    said, actual = thoughts.read_faults(think), faults(line["words"])
    looked = thoughts.read_seen(think)
    rows.append((said is not None, said is not None and sorted(said) == sorted(actual), bool(said),
                 bool(actual), line["grid"] is not None and looked == line["grid"]))
  readable, exact, doubts, wrong, sees = np.array(rows, bool).reshape(-1, 5).T
  return {"readable": _share(readable), "faults_named": _share(exact),
          "wrong_faults_named": _share(exact[wrong]), "wrong_noticed": _share(doubts[wrong]),
          "right_doubted": _share(doubts[~wrong]), "seen_rightly": _share(sees)}


def plan_drawn(drawn: Drawn, number: int) -> dict | None:
  """Share of images with all cells as their thought plans them; None without thoughts."""
  found = []
  for (i, image), trace in drawn.traces.items():
    line = drawn.lines.get((i, image, number))
    if line is not None and (thought := trace["rounds"][number - 1]["think"]) is not None:
      found.append(line["grid"] is not None and thoughts.read_grid(thought) == line["grid"])
  return _share(np.array(found)) if found else None


def best_of_two(drawn: Drawn) -> dict | None:
  """Figures of first rounds if the better one of two images of a prompt is taken; None without two.

  Of n images of which w are wrong it is the share of pairs that are not both wrong.
  """
  right = drawn.right[0]
  there, wrong = (~np.isnan(right)).sum(-1), (right == 0).sum(-1)
  if there.max() < 2:
    return None
  pairs = np.where(there > 1, there * (there - 1), np.nan)
  values = 1 - wrong * (wrong - 1) / pairs
  return _scored(values, drawn.items) | {"missing": 0, "pictures": int(there.sum())}


def open_choices(drawn: Drawn, number: int) -> dict:
  """The choices of a round where prompts leave them open, each as of `_spread`.

  "cells" are those of things in prompts without a relation; "colors" and "details" those of things
  whose clause names none and is the only one of its shape.
  """
  world = of(drawn.items[0].extra)
  options = {"cells": thoughts.LETTERS, "colors": world.colors, "details": world.details}
  found = {name: collections.Counter() for name in options}
  for (i, _, n), line in drawn.lines.items():
    if n != number or not line.get("grid"):
      continue
    include = drawn.items[i].extra["include"]
    shapes = [clause["class"] for clause in include]
    free = {clause["class"]: clause for clause in include if shapes.count(clause["class"]) == 1}
    for letter, words in zip(thoughts.LETTERS, line["grid"]):
      *detail, color, shape = words.split()
      if shape not in shapes:
        continue
      if not any("position" in clause for clause in include):
        found["cells"][letter] += 1
      if "color" not in free.get(shape, {"color": ""}):
        found["colors"][color] += 1
      if detail and "detail" not in free.get(shape, {"detail": ""}):
        found["details"][detail[0]] += 1
  return {name: _spread(counts, len(options[name])) for name, counts in found.items()}


def read_seeds(out: pathlib.Path) -> dict[int, dict]:
  """{N: the report.json of the run in `out`/seeds/N}, in order."""
  paths = (out / "seeds").glob("[0-9]*/report/report.json")
  return {number: json.loads(path.read_text(encoding="utf-8"))
          for number, path in sorted((int(path.parts[-3]), path) for path in paths)}


def compare_seeds(reports: dict[int, dict], items) -> dict:
  """The rows of files/report.toml's `quoted`, and its differences, by seed and over all seeds.

  `reports` are by what is added to the run's seed. Returns {"seeds": [0, 1, ...], "rows": {name:
  {"each": [interval], "all": interval}}} of seen and unseen prompts together. An interval over
  seeds resamples the seeds as well as the prompts.
  """
  values = [{(name, number): entry["by_prompt"] for name, arm in report["arms"].items()
             for number, entry in arm["rounds"].items()} for report in reports.values()]
  tags, rows = np.array([item.extra["tag"] for item in items]), {}
  for name, arm, *before in (*WORDING["quoted"], *WORDING["differences"]):
    keys = [tuple(key) for key in (arm, *before)]
    if not all(key in found and found[key] for found in values for key in keys):
      continue
    pairs = [[np.array(found[key], float) for key in keys] for found in values]
    change = np.stack([own - sum(others) for own, *others in pairs])
    rows[name] = {"each": [interval(own, tags) for own in change],
                  "all": interval(change, tags)}
  return {"seeds": list(reports), "rows": rows}


def _scored(values, items):
  return {"scores": scores(values, items),
          "by_prompt": [None if np.isnan(v) else float(v) for v in values]}


def _share(flags):
  count, of = int(flags.sum()), len(flags)
  return {"count": count, "of": of, "share": count / of if of else None}


def _spread(counts: collections.Counter, options: int) -> dict | None:
  """Entropy of a choice, divided by that of an even one, and its most frequent value."""
  if not counts or options < 2:
    return None
  (most, times), = counts.most_common(1)
  total = counts.total()
  shares = np.array(list(counts.values())) / total
  return {"entropy": float(-(shares * np.log(shares)).sum() / np.log(options)), "most": most,
          "share": times / total, "count": total, "counts": dict(sorted(counts.items()))}
