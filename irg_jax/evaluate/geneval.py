"""GenEval: from detected boxes to a verdict on each image, and the benchmark's summary.

Pure functions of plain records; the detector and the colour classifier are elsewhere. A record of
detections is

  {"filename": "00000/samples/00000.png",
   "metadata": the prompt's line of evaluation_metadata.jsonl (tag, include, exclude, prompt),
   "detections": {class: [{"box": [x1, y1, x2, y2], "score": s, "color": "red"}, ...]}}

where `color` is the colour classifier's answer, needed only where a clause asks for one.
"""

import dataclasses
import hashlib
import json

import numpy as np

from irg_jax.evaluate import tally

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")


@dataclasses.dataclass(frozen=True)
class Options:
  """The official defaults; `max_overlap` 1 means that no box is dropped for overlapping."""

  threshold: float = 0.3
  counting_threshold: float = 0.9
  max_objects: int = 16
  max_overlap: float = 1.0
  position_threshold: float = 0.1


class Unscorable(ValueError):
  """The record does not say enough for a verdict; `reason` is a short constant phrase."""

  def __init__(self, reason: str, detail: str = ""):
    super().__init__(f"{reason}: {detail}" if detail else reason)
    self.reason, self.detail = reason, detail


@dataclasses.dataclass(frozen=True)
class Box:
  """A kept box: `values` is float32 [5], x1 y1 x2 y2 score, as the official detector has it."""

  values: np.ndarray
  color: str | None


def score_image(record: dict, options: Options = Options(), details: bool = True) -> dict:
  """The line of the official results.jsonl for one record of detections.

  Args:
    details: also "details", the kept boxes of all classes; without it only the classes that
      the prompt speaks of are looked at, which is what the verdict needs.

  Raises:
    Unscorable: the record is malformed, or a colour that a clause needs is missing.
  """
  metadata, detections = _metadata(record), record.get("detections")
  if not isinstance(detections, dict):
    raise Unscorable("no detections")
  if not details:
    named = {c["class"] for key in ("include", "exclude") for c in metadata.get(key, ())}
    detections = {name: detections[name] for name in sorted(named & set(detections))}
  objects = kept_boxes(detections, metadata["tag"], options)
  reasons = verdict(metadata, objects, options)
  result = {
      "filename": record.get("filename", ""),
      "tag": metadata["tag"],
      "prompt": metadata["prompt"],
      "correct": not reasons,
      "reason": "\n".join(reasons),
      "metadata": json.dumps(metadata),
  }
  if details:
    kept = {name: [box.values.tolist() for box in boxes] for name, boxes in objects.items()}
    result["details"] = json.dumps(kept)
  return result


def kept_boxes(detections: dict, tag: str, options: Options = Options()) -> dict[str, list[Box]]:
  """The boxes that count, by class, surest first; a class without any is absent.

  Strictly above the threshold, at most `max_objects` a class. Scores are compared as float32,
  so that 0.3 is not above 0.3.
  """
  limit = options.counting_threshold if tag == "counting" else options.threshold
  found = {}
  for name, entries in detections.items():
    rows = _rows(name, entries)
    # Ascending and turned round: of equal scores the later one comes first, as upstream.
    order = np.argsort(rows[:, 4], kind="stable")[::-1]
    order = order[rows[order, 4] > np.float32(limit)][: options.max_objects].tolist()
    if order:
      boxes = [Box(rows[i], entries[i].get("color")) for i in order]
      found[name] = boxes if options.max_overlap == 1 else _without_overlaps(boxes, options)
  return found


def verdict(metadata: dict, objects: dict[str, list[Box]],
            options: Options = Options()) -> list[str]:
  """Why the image is wrong, a line a failure in the official words; empty: it is right."""
  reasons, groups = [], []
  for clause in metadata.get("include", ()):
    found = objects.get(clause["class"], [])[: clause["count"]]
    failure = _include_failure(clause, found, groups, options)
    groups.append(None if failure else found)
    if failure:
      reasons.append(failure)
  for clause in metadata.get("exclude", ()):
    count = len(objects.get(clause["class"], []))
    if count >= clause["count"]:
      reasons.append(f"expected {clause['class']}<{clause['count']}, found {count}")
  return reasons


def relations(a: np.ndarray, b: np.ndarray, position_threshold: float = 0.1) -> list[str]:
  """Where box `a` is as seen from box `b`, two relations at most; y grows downward.

  The offset of the centres is shortened by a share of both boxes' sizes, then compared with
  half the length of the whole offset. Arithmetic is float32, as upstream.
  """
  corners = np.stack([a[:4], b[:4]]).astype(np.float32).reshape(2, 2, 2)
  centers = corners.mean(axis=1)
  sizes = np.abs(corners[:, 1] - corners[:, 0])
  offset = centers[0] - centers[1]
  margin = position_threshold * (sizes[0] + sizes[1])
  shortened = np.maximum(np.abs(offset) - margin, 0) * np.sign(offset)
  if np.all(np.abs(shortened) < 1e-3):
    return []
  dx, dy = shortened / np.linalg.norm(offset)
  holds = (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)
  return [name for name, true in zip(RELATIONS, holds) if true]


class Summary:
  """Adds up results; memory grows with the number of prompts only, by a few bytes each.

  `tasks` are those that a whole run has.
  """

  def __init__(self, tasks=TASKS):
    self._expected = tasks
    self._tasks = {}  # tag: Mean
    self._prompts = {}  # digest of the metadata: any image right
    self._images = tally.Mean()

  def add(self, result: dict) -> None:
    """Takes a line of results.jsonl."""
    correct = bool(result["correct"])
    self._images.add(correct)
    self._tasks.setdefault(result["tag"], tally.Mean()).add(correct)
    key = hashlib.blake2b(result["metadata"].encode(), digest_size=8).digest()
    self._prompts[key] = self._prompts.get(key, False) or correct

  def value(self) -> dict:
    """The official figures; tasks in the order in which they first appeared."""
    tasks = {tag: {"score": mean.value(), "correct": int(mean.sum), "count": mean.count}
             for tag, mean in self._tasks.items()}
    return {
        "overall": tally.mean(task["score"] for task in tasks.values()),
        "tasks": tasks,
        "missing_tasks": [tag for tag in self._expected if tag not in tasks],
        "pictures": self._images.count,
        "prompts": len(self._prompts),
        "correct_pictures": self._images.value(),
        "correct_prompts": tally.mean(self._prompts.values()),
    }


def summarize(results) -> dict:
  """The summary of an iterable of results, which is read once."""
  summary = Summary()
  for result in results:
    summary.add(result)
  return summary.value()


def summary_text(summary: dict) -> str:
  """The summary as the official script prints it."""
  lines = ["Summary", "=======", f"Total images: {summary['pictures']}",
           f"Total prompts: {summary['prompts']}"]
  if summary["pictures"]:
    lines += [f"% correct images: {summary['correct_pictures']:.2%}",
              f"% correct prompts: {summary['correct_prompts']:.2%}"]
  lines += ["", "Task breakdown", "=============="]
  for tag, task in summary["tasks"].items():
    lines.append(f"{tag:<16} = {task['score']:.2%} ({task['correct']} / {task['count']})")
  if summary["overall"] is not None:
    lines += ["", f"Overall score (avg. over tasks): {summary['overall']:.5f}"]
  return "\n".join(lines) + "\n"


def _include_failure(clause, found, groups, options):
  """The line that says why an include clause fails, or None; `groups`: matches of the earlier."""
  name, count = clause["class"], clause["count"]
  if len(found) < count:
    return f"expected {name}>={count}, found {len(found)}"
  if "color" in clause and (failure := _color_failure(clause, found)):
    return failure
  if "position" not in clause:
    return None
  relation, target = clause["position"]
  if groups[target] is None:
    return f"no target for {name} to be {relation}"
  for box in found:
    for other in groups[target]:
      true = relations(box.values, other.values, options.position_threshold)
      if relation not in true:
        return f"expected {name} {relation} target, found {' and '.join(true)} target"
  return None


def _color_failure(clause, found):
  name, count, color = clause["class"], clause["count"], clause["color"]
  colors = [box.color for box in found]
  if unknown := [c for c in colors if c not in COLORS]:
    raise Unscorable("no colour for a box" if unknown[0] is None else "unknown colour",
                     f"{name}: {unknown[0]}")
  if colors.count(color) >= count:
    return None
  seen = ", ".join(f"{colors.count(c)} {c}" for c in COLORS if c in colors)
  return f"expected {color} {name}>={count}, found {colors.count(color)} {color}; and {seen}"


def _metadata(record):
  metadata = record.get("metadata") if isinstance(record, dict) else None
  if isinstance(metadata, str):
    metadata = json.loads(metadata)
  if not isinstance(metadata, dict) or not {"tag", "prompt"} <= set(metadata):
    raise Unscorable("no metadata", "the record needs the prompt's tag, include and prompt")
  return metadata


def _rows(name, entries):
  """The boxes of a class as float32 [N, 5]."""
  try:
    rows = np.array([(*entry["box"], entry["score"]) for entry in entries], np.float32)
  except (KeyError, TypeError, ValueError) as e:
    raise Unscorable("malformed box", f"{name}: {e!r}") from e
  if not entries:
    return rows.reshape(0, 5)
  if rows.shape != (len(entries), 5) or not np.isfinite(rows).all():
    raise Unscorable("malformed box", f"{name}: needs four finite corners and a score")
  return rows


def _without_overlaps(boxes, options):
  """Greedily drops boxes that overlap a surer one by `max_overlap` or more."""
  left, kept = list(boxes), []
  while left:
    best = left.pop(0)
    kept.append(best)
    left = [b for b in left if _overlap(best.values, b.values) < options.max_overlap]
  return kept


def _overlap(a, b):
  """Intersection over union; areas count the edge pixels, as upstream."""
  area = lambda low, high: float(np.prod(np.maximum(high - low + 1, 0)))
  shared = area(np.maximum(a[:2], b[:2]), np.minimum(a[2:4], b[2:4]))
  union = area(a[:2], a[2:4]) + area(b[:2], b[2:4]) - shared
  return shared / union if union else 0.0
