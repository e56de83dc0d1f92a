"""GenEval: from detected boxes to a verdict on each image, and the means over its six tasks.

  --prompts    evaluation_metadata.jsonl; it comes with this package (files/geneval, MIT)
  item ids     "00000", the line from 0
  images       roundN/00000/samples/00000.png ... 00003.png, and roundN/00000/metadata.jsonl

`clauses` has the form of the prompts and of records of detections. The official detector is
Mask2Former with a Swin-S backbone, of mmdetection 2
(mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco); the official classifier is CLIP ViT-L-14 of
open_clip, weights "openai", for which `clauses.clip_classifier` has the rest. Scores with others
are not comparable with published ones.
"""

import collections
import contextlib
import itertools
import json
import re

import numpy as np

from irg_jax import storage
from irg_jax.evaluate import base, clauses, records, score
from irg_jax.progress import counting

FILES = base.FILES / "geneval"
DETECTIONS_CACHE = "detections_cache.sqlite"  # the usual name
COUNTS = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100,
          "color_attr": 100}
TASKS = tuple(COUNTS)
# Names of COCO and of VOC for classes of object_names.txt.
ALIASES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard",
           "tvmonitor": "tv", "sofa": "couch", "motorbike": "motorcycle", "aeroplane": "airplane",
           "diningtable": "dining table", "pottedplant": "potted plant"}
_FILE = re.compile(r"(?:round([1-9]\d*)/)?(\d+)/samples/(\d+)\.png")


def verdict(metadata: dict, detections: dict, options: clauses.Options = clauses.Options()):
  """The faults of an image, a line each in the official words; empty: it is right.

  `metadata` is the prompt's official record, `detections` are boxes by class, see `clauses`. Raises
  `clauses.Unscorable` for a malformed box, or where a colour that a clause needs is missing.
  """
  if not isinstance(detections, dict):
    raise clauses.Unscorable("no detections")
  named = {c["class"] for key in ("include", "exclude") for c in metadata.get(key, ())}
  objects = clauses.kept_boxes({name: detections[name] for name in sorted(named & set(detections))},
                               metadata["tag"], options)
  faults, groups = [], []
  for clause in metadata.get("include", ()):
    found = objects.get(clause["class"], [])[: clause["count"]]
    fault = _include_fault(clause, found, groups, options)
    groups.append(None if fault else found)
    faults += [fault] if fault else []
  for clause in metadata.get("exclude", ()):
    count = len(objects.get(clause["class"], []))
    if count >= clause["count"]:
      faults.append(f"expected {clause['class']}<{clause['count']}, found {count}")
  return faults


def relations(a: np.ndarray, b: np.ndarray, position_threshold: float = 0.1) -> list[str]:
  """Relations of box `a` to box `b`, two at most; y grows downward.

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
  return [name for name, true in zip(clauses.RELATIONS, holds) if true]


class GenEval(clauses.ClauseBenchmark):
  """The protocol of GenEval."""

  name, title, packaged, published_counts = "geneval", "GenEval", FILES, COUNTS
  columns = ("GenEval",)

  def read_items(self, path):
    return self.clause_items(records.file_in(path, "evaluation_metadata.jsonl"), TASKS)

  def score(self, folder, options, open_judge):
    chosen = clauses.Options(**{name: getattr(options, name) for name in vars(clauses.Options())})
    if bool(options.detections) == bool(options.detector):
      raise ValueError("geneval needs either --detections or --detector")
    sources = {"detector": options.detector, "classifier": options.classifier,
               "detections": ", ".join(map(str, options.detections)) or None}
    protocol = {"protocol": vars(chosen) | sources}
    if options.detections:
      names = class_names(options.object_names or FILES / "object_names.txt")
      found = read_detections(options.detections, names, aliases := collections.Counter())
    else:
      detect = score.load_function(options.detector, "--detector")
      classify = options.classifier and score.load_function(options.classifier, "--classifier")
      found = ((record["filename"], record) for record in clauses.records(
          ((folder.path(item, i, n), str(self.image_path(item, i, n)), item.extra)
           for item, n, i in score.images_there(folder)),
          class_names(options.object_names or FILES / "object_names.txt"), detect, classify,
          folder.out / DETECTIONS_CACHE, f"{options.detector} {options.classifier}"))
    total = sum(item.images for item in folder.items) * len(folder.rounds)
    with counting("images", total) as count:
      result = score_detections(folder, count(found), chosen, protocol, options.round)
    for (name, ours), number in aliases.items() if options.detections else ():
      print(f"class {name!r} taken for {ours!r}, in {number} records")
    return result


GENEVAL = GenEval()


def class_names(path) -> tuple[str, ...]:
  """The names of an object_names.txt, one a line; ValueError unless there are 80 different ones."""
  lines = storage.path(path).read_text(encoding="utf-8").split("\n")
  names = tuple(line.strip() for line in lines if line.strip())
  if len(names) != 80 or len(set(names)) != 80:
    raise ValueError(f"{path}: holds {len(set(names))} different names, but GenEval has 80 classes")
  return names


def read_detections(paths, names=None, aliases=None):
  """Yields (where, record or None) of files of detections, a line at a time.

  A line is a record of `clauses`, or one of the official results.jsonl, whose verdict is taken as
  it is. With `names` the classes are checked: ALIASES are renamed and counted in `aliases`,
  {(theirs, ours): records}; ValueError names the line of another class, of a malformed box, or of
  a record of another kind of file.
  """
  for path in paths:
    for number, record in records.read_lines(path):
      where = f"{path}, line {number}"
      found = (record or {}).get("detections")
      if names and (record or number == 1) and not (
          isinstance(found, dict) or {"error", "correct"} & set(record or ())):
        raise ValueError(f"{where}: neither a record with \"filename\", \"metadata\" and "
                         "\"detections\" (boxes by class), nor one of the official results.jsonl")
      if names and isinstance(found, dict):
        ours = {n: n if n in names else ALIASES.get(n, n) for n in found}
        if unknown := [n for n in found if ours[n] not in names]:
          raise ValueError(f"{where}: {unknown[0]!r} is none of the {len(names)} class names, such "
                           f"as {names[0]!r} (--object-names); write them as there")
        if len(set(ours.values())) < len(ours):
          raise ValueError(f"{where}: a class and its other name are both there: "
                           f"{', '.join(n for n in found if n in ALIASES)}")
        aliases.update((n, o) for n, o in ours.items() if n != o)
        record["detections"] = {ours[n]: boxes for n, boxes in found.items()}
        try:
          for name, boxes in record["detections"].items():
            clauses.box_rows(name, boxes)
        except clauses.Unscorable as e:
          raise ValueError(f"{where}: {e}") from e
      yield where, record


def score_detections(folder, found, options: clauses.Options, extra: dict,
                     default_round: int | None = None) -> dict:
  """Scores a stream of (where, record of detections), each image once; writes both files.

  An image is known by its file name, [roundN/]00000/samples/00000.png; without roundN it is of
  `default_round`, or ValueError is raised. One that comes a second time is counted as such, and
  not again.
  """
  by_id = {item.id: item for item in folder.items}
  rounds = {number: _Round() for number in folder.rounds}
  with score.item_writer(folder) as write:
    for where, record in found:
      _add_image(rounds, by_id, record, where, options, default_round, write)
  expected = sum(item.images for item in folder.items)
  values = {n: r.summary.value() | {"unscored": r.unscored.summary()} for n, r in rounds.items()}
  missing = {n: expected - sum(map(int.bit_count, r.seen.values())) for n, r in rounds.items()}
  return score.finish(folder, values, missing, extra)


class _Round:
  """One round: its summary, its images without a verdict, and a bit for each image that came."""

  def __init__(self):
    self.summary, self.unscored = clauses.TaskSummary(TASKS), base.Unscored()
    self.seen = collections.Counter()  # by item id


def _add_image(rounds, by_id, record, where, options, default_round, write):
  name = str(record.get("filename", "")) if record else ""
  match = _FILE.search(name)
  number = int(match[1]) if match and match[1] else default_round or min(rounds)
  if match and not match[1] and default_round is None and len(rounds) > 1:
    raise ValueError(f"{where}: {name} does not say of which round it is; score one round at a "
                     "time with --round N")
  if number not in rounds:
    raise ValueError(f"{where}: {name} is of round {number}, which the run does not have")
  target = rounds[number]
  item, image = (by_id.get(match[2]), int(match[3])) if match else (None, 0)
  if item is None or image >= item.images:
    return target.unscored.add(where, "not JSON" if record is None else "no such picture", name)
  if target.seen[item.id] >> image & 1:
    return target.unscored.add(name, "came twice")
  target.seen[item.id] |= 1 << image
  try:
    faults = _faults_of(record, item, options)
  except clauses.Unscorable as e:
    return write(item, number, image, 1, score.no_score(target.unscored, name, None, str(e)))
  target.summary.add(not faults, item.extra["tag"], item.id)
  write(item, number, image, 1, {"scores": {"correct": int(not faults)}, "why": None,
                                 "words": "\n".join(faults) or "correct"})


def _faults_of(record, item, options):
  metadata = record.get("metadata", item.extra)
  if isinstance(metadata, str):
    with contextlib.suppress(ValueError, RecursionError):  # a text that is not JSON is of no prompt
      metadata = json.loads(metadata)
  if metadata != item.extra:
    raise clauses.Unscorable("detected for another prompt", str(record["metadata"])[:100])
  if error := record.get("error"):
    raise clauses.Unscorable(*str(error).partition(": ")[::2])
  if "detections" not in record and {"correct", "reason"} <= record.keys():  # of results.jsonl
    if type(record["correct"]) is not bool:
      raise clauses.Unscorable("not a verdict", str(record["correct"]))
    return [] if record["correct"] else str(record["reason"]).split("\n")
  return verdict(item.extra, record.get("detections"), options)


def _include_fault(clause, found, groups, options):
  """The fault of an include clause, or None; `groups` are the boxes of the earlier clauses."""
  name, count = clause["class"], clause["count"]
  if len(found) < count:
    return f"expected {name}>={count}, found {len(found)}"
  if "color" in clause:
    color, colors = clause["color"], [box.color for box in found]
    if unknown := [c for c in colors if c not in clauses.COLORS]:
      raise clauses.Unscorable("no colour for a box" if unknown[0] is None else "unknown colour",
                               f"{name}: {unknown[0]}")
    if colors.count(color) < count:
      seen = ", ".join(f"{colors.count(c)} {c}" for c in clauses.COLORS if c in colors)
      return f"expected {color} {name}>={count}, found {colors.count(color)} {color}; and {seen}"
  if "position" not in clause:
    return None
  relation, target = clause["position"]
  if groups[target] is None:
    return f"no target for {name} to be {relation}"
  for box, other in itertools.product(found, groups[target]):
    true = relations(box.values, other.values, options.position_threshold)
    if relation not in true:
      return f"expected {name} {relation} target, found {' and '.join(true)} target"
  return None
