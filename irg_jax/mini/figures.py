"""What the images and thoughts of an arm come to: scores, intervals, changes, reflections."""

import dataclasses
import json
import pathlib

import numpy as np

from irg_jax.evaluate import base, records, score
from irg_jax.mini import benchmark, evaluate, thoughts, world

SPLITS = ("all", "seen", "unseen")
RESAMPLES, SEED = 2000, 0


@dataclasses.dataclass(frozen=True)
class Drawn:
  """An arm as it was drawn and scored.

  Attributes:
    folder: of the arm.
    items: all prompts of the test.
    right: float [rounds, prompts, images]: 1 right, 0 wrong, NaN where there is no image.
    lines: items.jsonl by (prompt, image, round); prompts and images from 0, rounds from 1.
    traces: by (prompt, image).
    cost: what cost.json says, or {}.
  """

  folder: pathlib.Path
  items: list
  right: np.ndarray
  lines: dict
  traces: dict
  cost: dict

  @property
  def rounds(self) -> int:
    return len(self.right)


def read(folder) -> Drawn:
  """Reads a folder that `evaluate.evaluate` has drawn and scored."""
  folder, items = pathlib.Path(folder), benchmark.MINI.read()
  numbers = {item.id: i for i, item in enumerate(items)}
  lines = {(numbers[line["id"]], line["picture"], line["round"]): line
           for _, line in records.read_lines(folder / score.ITEMS)}
  traces = {}
  for i, item in enumerate(items):
    for image in range(item.images):
      if trace := base.read_trace(folder, item, image):
        traces[i, image] = trace
  rounds = max((number for _, _, number in lines), default=1)
  right = np.full((rounds, len(items), max(item.images for item in items)), np.nan)
  for (i, image, number), line in lines.items():
    right[number - 1, i, image] = line["scores"].get("correct", np.nan)
  cost = folder / evaluate.COST
  return Drawn(folder, items, right, lines, traces,
               json.loads(cost.read_text()) if cost.is_file() else {})


def arm_figures(drawn: Drawn) -> dict:
  """All figures of an arm, as JSON: {"rounds": {"1": ...}, "cost": ...}."""
  rounds = {}
  for number in range(1, drawn.rounds + 1):
    entry = round_scores(by_prompt(drawn.right[number - 1]), drawn.items)
    entry["pictures"] = int((~np.isnan(drawn.right[number - 1])).sum())
    entry["missing"] = len(drawn.traces) - entry["pictures"]
    entry["plan_drawn"] = plan_drawn(drawn, number)
    entry["seconds"] = seconds(drawn, number)
    if number > 1:
      entry["changes"] = changes(drawn.right[number - 2], drawn.right[number - 1])
      entry["reflections"] = reflections(drawn, number)
    rounds[str(number)] = entry
  return {"rounds": rounds, "cost": drawn.cost}


def by_prompt(right: np.ndarray) -> np.ndarray:
  """The share of right images of each prompt, [prompts, images] to [prompts]; NaN: none."""
  there = ~np.isnan(right)
  count = there.sum(-1)
  return np.where(count > 0, np.where(there, right, 0).sum(-1) / np.maximum(count, 1), np.nan)


def round_scores(values: np.ndarray, items) -> dict:
  """Scores with intervals by split and task, and the values themselves.

  Args:
    values: float [prompts], NaN where there is no image.

  Returns:
    {"scores": {split: {"tasks": {task: interval}, "overall": interval}},
     "by_prompt": [number or None]}
  """
  tags = np.array([item.extra["tag"] for item in items])
  scores = {}
  for split in SPLITS:
    own = np.where(_in_split(items, split), values, np.nan)
    found = {task: interval(np.where(tags == task, own, np.nan), tags) for task in world.TASKS}
    scores[split] = {"tasks": {t: v for t, v in found.items() if v},
                     "overall": interval(own, tags)}
  return {"scores": scores, "by_prompt": [None if np.isnan(v) else float(v) for v in values]}


def difference(after, before, items) -> dict:
  """{split: interval} of the paired difference of two `by_prompt`, over prompts in both."""
  after, before = (np.array([np.nan if v is None else v for v in values], float)
                   for values in (after, before))
  tags = np.array([item.extra["tag"] for item in items])
  return {split: interval(np.where(_in_split(items, split), after - before, np.nan), tags)
          for split in SPLITS}


def interval(values: np.ndarray, tags: np.ndarray) -> dict | None:
  """The mean over tasks of the means over their prompts, and where 95 % of resamples have it.

  Args:
    values: float [prompts]; NaN is left out.
    tags: the task of each prompt. Prompts are drawn anew, with replacement, within each.

  Returns:
    {"value", "low", "high", "prompts"}, or None without a value.
  """
  rng, means, draws = np.random.default_rng(SEED), [], []
  for tag in dict.fromkeys(tags.tolist()):
    own = values[(tags == tag) & ~np.isnan(values)]
    if len(own):
      means.append(own.mean())
      draws.append(own[rng.integers(len(own), size=(RESAMPLES, len(own)))].mean(1))
  if not means:
    return None
  low, high = np.percentile(np.mean(draws, 0), (2.5, 97.5))
  return {"value": float(np.mean(means)), "low": float(low), "high": float(high),
          "prompts": int((~np.isnan(values)).sum())}


def changes(before: np.ndarray, after: np.ndarray) -> dict:
  """How often a right image became wrong, and a wrong one right; arrays as `Drawn.right`'s."""
  both = ~np.isnan(before) & ~np.isnan(after)
  before, after = before[both] == 1, after[both] == 1
  return {"right_to_wrong": share((before & ~after).sum(), before.sum()),
          "wrong_to_right": share((~before & after).sum(), (~before).sum())}


def reflections(drawn: Drawn, number: int) -> dict:
  """What the thoughts before round `number` say of the image before, against the verifier.

  Returns:
    shares: "readable" of all; "faults_named": exactly the actual faults, of all (a right image
    has none); "wrong_faults_named": so of the wrong images; "wrong_noticed": something falls
    short, of the wrong images; "right_doubted": so of the right ones; "seen_rightly": what the
    thought sees in each cell is there, of all.
  """
  rows = []
  for (i, image), trace in drawn.traces.items():
    line = drawn.lines.get((i, image, number - 1))
    if line is None or not line["scores"] or len(trace["rounds"]) < number:
      continue
    said = thoughts.read_faults(trace["rounds"][number - 1]["think"] or "")
    actual = benchmark.faults(line["words"])
    looked = (trace["rounds"][number - 1]["think"] or "").split("What falls short:")[0]
    rows.append((said is not None, said is not None and sorted(said) == sorted(actual), bool(said),
                 bool(actual), line["grid"] is not None
                 and thoughts.read_grid(looked) == line["grid"]))
  readable, exact, doubts, wrong, sees = np.array(rows, bool).reshape(-1, 5).T
  return {"readable": share(readable.sum(), len(rows)),
          "faults_named": share(exact.sum(), len(rows)),
          "wrong_faults_named": share((exact & wrong).sum(), wrong.sum()),
          "wrong_noticed": share((doubts & wrong).sum(), wrong.sum()),
          "right_doubted": share((doubts & ~wrong).sum(), (~wrong).sum()),
          "seen_rightly": share(sees.sum(), len(rows))}


def plan_drawn(drawn: Drawn, number: int) -> dict | None:
  """How often the image has in each cell what its thought planned; None without thoughts."""
  found = []
  for (i, image), trace in drawn.traces.items():
    line = drawn.lines.get((i, image, number))
    if line is not None and (thought := trace["rounds"][number - 1]["think"]) is not None:
      found.append(line["grid"] is not None and thoughts.read_grid(thought) == line["grid"])
  return share(sum(found), len(found)) if found else None


def seconds(drawn: Drawn, number: int) -> float | None:
  """Seconds of a round for a batch; the median, so that the compiling of the first is not in it."""
  times = [sum(trace["rounds"][number - 1]["seconds"].values())
           for trace in drawn.traces.values() if len(trace["rounds"]) >= number]
  return float(np.median(times)) if times else None


def share(count, of) -> dict:
  return {"count": int(count), "of": int(of), "share": float(count / of) if of else None}


def _in_split(items, split):
  return np.array([split in ("all", item.extra["split"]) for item in items])
