"""Benchmarks whose prompts are clauses: objects with class, count, colour and position.

The official record of a prompt is

  {"tag": task, "prompt": str, "include": [{"class", "count", "color", "position"}, ...],
   "exclude": [...]}

where "position" is [relation, index of an earlier clause]. Four images are generated from a prompt
and each is right or wrong; the overall is the mean over tasks. `records` gets boxes for the images
from any detector and colour classifier that are given as functions:

  detect(image, classes)  ->  {class: [{"box": [x1, y1, x2, y2], "score": s, "mask": m}, ...]}
  classify(crop, name)    ->  one of COLORS

`image` is an RGB `PIL.Image`, upright; boxes are in pixels, all that the detector has, whatever
their score. `mask` is optional: a boolean array [height, width] of the object's pixels. `crop`
shows one object of class `name`: its box, grey outside the mask. A record of detections is

  {"filename": "00000/samples/00000.png", "metadata": the prompt's official record,
   "detections": {class: [{"box": [...], "score": s, "color": c where a clause asks for it}]}}

or has "error": "reason: detail" in place of "detections".
"""

import collections
import dataclasses
import hashlib
import json

import numpy as np
from PIL import Image

from irg_jax import images, storage
from irg_jax.evaluate import base, questions
from irg_jax.evaluate import records as records_lib
from irg_jax.evaluate.records import field

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}",
              "a photo of a {color} object")


class ClauseBenchmark(base.Benchmark):
  """Layout, tasks and figures: ID/samples/00000.png ... 00003.png beside ID/metadata.jsonl."""

  each_image = True

  def tasks(self, item):
    return (item.extra["tag"],)

  def image_path(self, item, image, round):
    return base.round_root(round) / item.id / "samples" / f"{image:05}.png"

  def beside(self, item, round):
    return {base.round_root(round) / item.id / "metadata.jsonl": json.dumps(item.extra).encode()}

  def categories(self, summary):
    parts = {"": summary} | {f", {name}": s for name, s in summary.get("splits", {}).items()}
    return {f"{task}{which}": value for which, part in parts.items() for task, value in (
        *((tag, task["score"]) for tag, task in part["tasks"].items()),
        ("overall", part["overall"]))}

  def scored(self, summary):
    return summary["pictures"]

  def clause_items(self, path, tags, splits=()) -> list[base.Item]:
    """Reads and checks a file of official records; with `splits`, "split" must be one of them."""
    entries = records_lib.json_lines(path)
    for entry in entries:
      _check_clauses(entry, tags)
      if splits and field(entry, "split", str) not in splits:
        raise ValueError(f"{entry.where}: unknown split {entry.record['split']!r}; it must be "
                         f"{' or '.join(splits)}")
    records_lib.check_unique(entries, [f"the prompt {e.record['prompt']!r}" for e in entries])
    return [base.Item(self.name, f"{i:05}", e.record["prompt"], 4, e.record)
            for i, e in enumerate(entries)]


class TaskSummary:
  """Shares of right images by task; `tasks` are those of a complete run."""

  def __init__(self, tasks):
    self._expected, self._tasks = tasks, collections.defaultdict(base.Mean)
    self._prompts = {}  # digest: any image right

  def add(self, correct: bool, task: str, prompt: str) -> None:
    """Adds an image; images with the same `prompt` are of one prompt."""
    self._tasks[task].add(correct)
    key = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    self._prompts[key] = self._prompts.get(key, False) or correct

  def value(self) -> dict:
    """The official figures; tasks in order of first appearance."""
    tasks = {tag: {"score": mean.value(), "correct": int(mean.sum), "count": mean.count}
             for tag, mean in self._tasks.items()}
    images, right = (sum(task[key] for task in tasks.values()) for key in ("count", "correct"))
    return {
        "overall": base.mean(task["score"] for task in tasks.values()),
        "tasks": tasks,
        "missing_tasks": [tag for tag in self._expected if tag not in tasks],
        "pictures": images,
        "prompts": len(self._prompts),
        "correct_pictures": right / images if images else None,
        "correct_prompts": base.mean(self._prompts.values()),
    }


@dataclasses.dataclass(frozen=True)
class Options:
  """Selection of boxes; the defaults are official. `max_overlap` 1 keeps overlapping boxes."""

  threshold: float = 0.3
  counting_threshold: float = 0.9
  max_objects: int = 16
  max_overlap: float = 1.0
  position_threshold: float = 0.1


class Unscorable(ValueError):
  """A record of detections without a verdict; `reason` is a short constant phrase."""

  def __init__(self, reason: str, detail: str = ""):
    super().__init__(f"{reason}: {detail}" if detail else reason)
    self.reason, self.detail = reason, detail


@dataclasses.dataclass(frozen=True)
class Box:
  """A box that counts: `values` is float32 [5], x1 y1 x2 y2 score, as the detector has it."""

  values: np.ndarray
  color: str | None


def box_rows(name: str, entries) -> np.ndarray:
  """The boxes of class `name` as float32 [N, 5], see `Box`; Unscorable for a malformed one."""
  try:
    with np.errstate(over="ignore"):  # refused below
      rows = [(*entry["box"], entry["score"]) for entry in entries]
      if any(isinstance(value, bool | str) for row in rows for value in row):
        raise TypeError("a corner or score is no number")
      rows = np.array(rows, np.float32)
  except (KeyError, TypeError, ValueError, OverflowError) as e:
    raise Unscorable("malformed box", f"{name}: {e!r}") from e
  rows = rows.reshape(len(entries), -1) if entries else np.empty((0, 5), np.float32)
  if rows.shape[1] != 5 or not np.isfinite(rows).all():
    raise Unscorable("malformed box", f"{name}: needs four finite corners and a score")
  if (rows[:, 2:4] < rows[:, :2]).any() or (abs(rows[:, 4] - 0.5) > 0.500001).any():
    raise Unscorable("malformed box", f"{name}: the form is [x1, y1, x2, y2] with x1 <= x2 and "
                     "y1 <= y2, and a score from 0 to 1")
  return rows


def kept_boxes(detections: dict, tag: str, options: Options = Options()) -> dict[str, list[Box]]:
  """The boxes that count, by class, highest score first; classes without any are absent.

  Their score is above the threshold, and they are at most `max_objects` a class. Scores are
  compared as float32, so that 0.3 is not above 0.3. Raises Unscorable for a malformed box.
  """
  limit = options.counting_threshold if tag == "counting" else options.threshold
  found = {}
  for name, entries in detections.items():
    rows = box_rows(name, entries)
    # Ascending and reversed: of equal scores the later one comes first, as upstream.
    order = np.argsort(rows[:, 4], kind="stable")[::-1]
    kept = []
    for i in order[rows[order, 4] > np.float32(limit)][: options.max_objects].tolist():
      if options.max_overlap == 1 or all(
          _overlap(better.values, rows[i]) < options.max_overlap for better in kept):
        kept.append(Box(rows[i], entries[i].get("color")))
    if kept:
      found[name] = kept
  return found


def records(images, classes, detect, classify, cache_path, names: str):
  """Yields one record of detections per image, in order; ValueError after 20 failures in a row.

  `images` are (path, filename, metadata): the file, and what its record shall hold. `classify` may
  be None where no colours are asked. The file `cache_path` keeps the finished records, by the
  images' content and by `names`, those of the two functions.
  """
  failures = 0
  with records_lib.Cache(cache_path) as cache:
    for path, filename, metadata in images:
      record = {"filename": filename, "metadata": metadata} | _detected(
          storage.path(path), metadata, tuple(classes), detect, classify, cache, names)
      failures = failures + 1 if record.get("error", "").startswith("detector") else 0
      if failures >= base.GIVE_UP_AFTER:
        raise ValueError(f"the detector failed at {failures} images in a row, lastly at {path}: "
                         f"{record['error']}")
      yield record


def clip_classifier(encode_image, encode_text):
  """A `classify` function from the two halves of a CLIP model, by the official recipe.

  `encode_image` maps an RGB `PIL.Image` to [D], its own preprocessing included; `encode_text` maps
  a list of N texts to [N, D].
  """
  weights = {}

  def classify(crop, name):
    if name not in weights:
      weights[name] = np.stack([_unit(np.mean([_unit(t) for t in np.asarray(encode_text(
          [template.format(color=color, name=name) for template in _TEMPLATES]))], axis=0))
          for color in COLORS])
    similar = weights[name] @ _unit(np.asarray(encode_image(crop)))
    return COLORS[int(np.argmax(similar))]

  return classify


def object_crop(image: Image.Image, box, mask=None) -> Image.Image:
  """An object for the colour classifier: grey outside the mask, cropped to the rounded box."""
  if mask is not None:
    pixels, mask = np.array(image), np.asarray(mask, bool)
    if mask.shape != pixels.shape[:2]:
      raise ValueError(f"a mask {mask.shape} for an image {pixels.shape[:2]} (height, width)")
    pixels[~mask] = 153  # the official grey
    image = Image.fromarray(pixels)
  crop = image.crop(tuple(float(v) for v in box))
  if not crop.width or not crop.height:
    raise ValueError(f"the box {list(box)} holds no pixel")
  return crop


def _check_clauses(entry, tags):
  field(entry, "prompt", str)
  if field(entry, "tag", str) not in tags:
    raise ValueError(f"{entry.where}: unknown tag {entry.record['tag']!r}; the tags are "
                     f"{', '.join(tags)}")
  if not field(entry, "include", list):
    raise ValueError(f"{entry.where}: 'include' is empty")
  exclude = field(entry, "exclude", list) if "exclude" in entry.record else []
  for number, clause in enumerate([*entry.record["include"], *exclude]):
    if not isinstance(clause, dict):
      raise ValueError(f"{entry.where}: {clause!r} is not an object with 'class' and 'count'")
    for name, kind in (("class", str), ("count", int), ("color", str), ("position", list)):
      if name in clause or name in ("class", "count"):
        field(entry._replace(record=clause), name, kind)
    if clause["count"] < 1:
      raise ValueError(f"{entry.where}: 'count' is {clause['count']}, but must be 1 or more")
    position = clause.get("position")
    if position is not None and not (
        len(position) == 2 and position[0] in RELATIONS and type(position[1]) is int
        and 0 <= position[1] < number):
      raise ValueError(f"{entry.where}: position {position} must be [relation, index of an earlier "
                       f"clause], the relation one of {', '.join(RELATIONS)}")


def _overlap(a, b):
  """Intersection over union; areas count the edge pixels, as upstream."""
  area = lambda low, high: float(np.prod(np.maximum(high - low + 1, 0)))
  shared = area(np.maximum(a[:2], b[:2]), np.minimum(a[2:4], b[2:4]))
  union = area(a[:2], a[2:4]) + area(b[:2], b[2:4]) - shared
  return shared / union if union else 0.0


def _detected(path, metadata, classes, detect, classify, cache, names):
  """The last field of an image's record: "detections", or "error"."""
  try:
    data = questions.read_image(path)
  except questions.Unusable as e:
    return {"error": f"picture: {e}"}
  colored = sorted({c["class"] for c in metadata.get("include", ()) if "color" in c})
  asked = repr((names, classes, metadata.get("tag"), colored)).encode()
  digest = hashlib.sha256(hashlib.sha256(data).digest() + asked).hexdigest()
  if (kept := cache.get(digest)) is not None:
    return {"detections": kept["detections"]}
  try:
    with images.open_image(data) as opened:
      images.load_whole(opened, data)
      image = images.to_rgb(opened)
  except questions.BROKEN as e:
    return {"error": f"picture: {path} cannot be read ({e})"}
  try:
    found = _boxes(image, metadata, classes, detect, colored, classify)
  except Exception as e:  # a foreign function: one image that it cannot do is not the end
    return {"error": f"detector: {type(e).__name__}: {e}"}
  cache.add({"digest": digest, "picture": str(path), "detections": found})
  return {"detections": found}


def _boxes(image, metadata, classes, detect, colored, classify):
  """Detections as plain data; boxes that count have a colour, if their class is in `colored`."""
  found = {name: [{"box": [float(v) for v in entry["box"]], "score": float(entry["score"]),
                   "mask": entry.get("mask")} for entry in entries]
           for name, entries in detect(image, classes).items()}
  if unknown := [name for name in found if name not in classes]:
    raise ValueError(f"a box of {unknown[0]!r}, which is not among the classes")
  numbered = {name: [entry | {"color": i} for i, entry in enumerate(entries)]
              for name, entries in found.items()}
  kept = kept_boxes(numbered, metadata.get("tag"))  # refuses malformed boxes
  for name in colored:
    for entry in (found[name][box.color] for box in kept.get(name, ())):
      if classify is None:
        raise ValueError("colours are asked for: name a classifier")
      entry["color"] = classify(object_crop(image, entry["box"], entry["mask"]), name)
      if entry["color"] not in COLORS:
        raise ValueError(f"the classifier says {entry['color']!r}, which is none of the colours")
  for entry in (entry for entries in found.values() for entry in entries):
    del entry["mask"]
  return found


def _unit(vector):
  vector = np.asarray(vector, np.float32)
  return vector / np.linalg.norm(vector)
