"""Official forms of input and output that no command needs, for the golden cases."""

import json
import pathlib
import re

import numpy as np
from rapidfuzz.distance import Levenshtein
from scipy import optimize

from irg_jax.evaluate import base
from irg_jax.evaluate import clauses
from irg_jax.evaluate import genai_bench
from irg_jax.evaluate import geneval
from irg_jax.evaluate import tiif
from irg_jax.evaluate import wise

TAG_GROUPS = {"basic": genai_bench.BASIC, "advanced": genai_bench.ADVANCED,
              "overall": ("basic", "advanced", "all")}
_ROUND_FILE = re.compile(r"(?:turn(\d+)_)?(\d+)\.json")


# GenEval.


def score_image(record: dict, options: clauses.Options = clauses.Options()) -> dict:
  """The line of the official results.jsonl for one record of detections."""
  metadata = record["metadata"]
  metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
  reasons = geneval.verdict(metadata, record["detections"], options)
  kept = clauses.kept_boxes(record["detections"], metadata["tag"], options)
  return {
      "filename": record.get("filename", ""),
      "tag": metadata["tag"],
      "prompt": metadata["prompt"],
      "correct": not reasons,
      "reason": "\n".join(reasons),
      "metadata": json.dumps(metadata),
      "details": json.dumps({name: [b.values.tolist() for b in boxes]
                             for name, boxes in kept.items()}),
  }


def geneval_summary(results) -> dict:
  """The summary of an iterable of results, which is read once."""
  summary = clauses.TaskSummary(geneval.TASKS)
  for result in results:
    summary.add(bool(result["correct"]), result["tag"], result["metadata"])
  return summary.value()


def geneval_text(summary: dict) -> str:
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


# WISE, and its variant WISE_Verified of 2026, which has one score, 0 or 1, and other categories.


WISE_VERIFIED = {
    "ranges": {"CULTURE": (1, 400), "TIME": (401, 520), "SPACE": (521, 640), "BIOLOGY": (641, 760),
               "PHYSICS": (761, 880), "CHEMISTRY": (881, 1000)},
    "weights": {"CULTURE": 0.4} | dict.fromkeys(("TIME", "SPACE", "BIOLOGY", "PHYSICS",
                                                 "CHEMISTRY"), 0.12)}
_VERIFIED = re.compile(r"\*{0,2}Score\*{0,2}\s*:?\s*([01])(?!\d)", re.IGNORECASE)
_BAGEL = re.compile(r"\*{0,2}(Consistency|Realism|Aesthetic Quality)\*{0,2}\s*[:：]?\s*(\d)",
                    re.IGNORECASE)


def add_wise_record(summary: wise.Scorer, record: dict | None, where: str, fields=wise.FIELDS):
  """Counts a line of a result file, or says why not; None stands for a line that is not JSON."""
  add = summary.unscored.add
  if record is None:
    return add(where, "not JSON")
  number = record.get("prompt_id")
  if not isinstance(number, int):
    return add(where, "no integer prompt_id", str(number))
  if number not in wise.IDS:
    return add(where, "prompt_id outside 1 to 1000", str(number))
  summary.present.add(number)
  if not all(base.is_number(record.get(f)) for f in fields):
    return add(where, "no score", str({f: record.get(f) for f in fields}))
  if fields == ("score",) and record["score"] not in (0, 1):
    return add(where, "score is not 0 or 1", str(record["score"]))
  summary.count(number, float(record["score"]) if "score" in record else wise.item_score(record))


def parse_bagel(text: str) -> dict[str, float]:
  """As `wise.parse`, by BAGEL's script: a full-width colon will do, three lone digits will not."""
  return {name.lower().replace(" ", "_"): float(digit) for name, digit in _BAGEL.findall(text)}


def parse_verified(text: str) -> dict[str, float]:
  """The one score that the judge of the variant gives; empty without one."""
  if found := _VERIFIED.findall(text):
    return {"score": float(found[-1])}
  lone = text.strip()
  return {"score": float(lone)} if lone in ("0", "1") else {}


# TIIF.


def tiif_scorer(models: int) -> tiif.Scorer:
  """A scorer of one of `models` rows of the official sheet.

  The number decides the last digit of a figure that lies half-way between two: pandas adds up a
  single row in another order than one of several.
  """
  scorer = tiif.Scorer({})
  if models > 1:
    scorer.mean = base.mean
  return scorer


def read_tiif_results(folder, models: int = 1) -> dict[int, dict]:
  """Scores a model's folder of an official result tree, TYPE/LENGTH/I.json, by round.

  Files named turn1_0.json, as IRG's evaluator writes them, belong to round 1, and so on;
  plain names are round 1. comparison_*.json hold no answers and are passed over. For `models`
  see `tiif_scorer`.

  Raises:
    ValueError: plain and turn names lie side by side, so that a round cannot be told.
  """
  rounds, styles = {}, set()
  for path in sorted(pathlib.Path(folder).glob("*/*/*.json")):
    match = _ROUND_FILE.fullmatch(path.name)
    if not match or path.parent.name not in tiif.LENGTHS:
      continue
    styles.add(match[1] is not None)
    if len(styles) > 1:
      raise ValueError(f"{path}: lies beside files of the other naming (turn1_0.json and 0.json); "
                       "which round the plain ones are is unknown: keep the rounds in folders "
                       "apart")
    summary = rounds.setdefault(int(match[1] or 1), tiif_scorer(models))
    _add_file(summary, path, folder)
  return {number: summary.value() for number, summary in sorted(rounds.items())}


def _add_file(summary, path, folder):
  name = str(path.relative_to(folder))
  try:
    record = json.loads(path.read_text(encoding="utf-8"))
    expected, predicted = record["gt_answers"], record["model_pred"]
    pairs = list(zip(expected, predicted))  # the longer of the two is cut to the other
    right = sum(e.strip().lower() == p.strip().lower() for e, p in pairs)
    summary.count(path.parent.parent.name, path.parent.name, len(pairs), right)
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    summary.unscored.add(name, "unreadable result file", str(e))


def tiif_printed(value: float | None) -> float:
  """A figure as the official summary rounds it, to four places; NaN where there is none."""
  return float("nan") if value is None else float(np.round(value, 4))


def word_distance(expected: list[str], seen: list[str]) -> float:
  """GNED: cost of the best matching of words, plus the difference in number, over the larger."""
  expected, seen = _words(expected, seen)
  if not expected and not seen:
    return 0.0
  cost = np.array([[normalized_edit_distance(s, e) for e in expected] for s in seen])
  cost = cost.reshape(len(seen), len(expected))
  rows, columns = optimize.linear_sum_assignment(cost)
  total = cost[rows, columns].sum() + abs(len(seen) - len(expected))
  return float(total / max(len(seen), len(expected)))


def word_recall(expected: list[str], seen: list[str], threshold: float = 0.3) -> float | None:
  """Share of the expected words that are seen, matched greedily; None without expected words."""
  expected, left = _words(expected, seen)
  if not expected:
    return None
  hits = 0
  for word in expected:
    match = next((s for s in left if normalized_edit_distance(word, s) <= threshold), None)
    if match is not None:
      left.remove(match)
      hits += 1
  return hits / len(expected)


def read_words(records: list[dict]) -> dict[str, float]:
  """The four official means over OCR records.

  A record has "text" (the expected words) and "short_image_ocr_results" and
  "long_image_ocr_results", PaddleOCR lines [box, [text, confidence]].
  """
  result = {}
  for name, metric in (("GNED", word_distance), ("Recall", word_recall)):
    for length in tiif.LENGTHS:
      scores = [metric(r["text"], _ocr_texts(r[f"{length}_image_ocr_results"])) for r in records]
      result[f"{name}_score_{length}"] = base.mean(scores) or 0.0
  return result


def normalized_edit_distance(a: str, b: str) -> float:
  """Levenshtein distance over the length of the longer text."""
  longest = max(len(a), len(b))
  return Levenshtein.distance(a, b) / longest if longest else 0.0


def _ocr_texts(lines):
  # An image without any text counts as one empty word, as upstream.
  return [line[1][0] for line in lines] if lines else [""]


def _words(expected, seen):
  """Lower-cased; what is seen is cut at single spaces."""
  return [w.lower() for w in expected], [w for s in seen for w in s.lower().split(" ")]


# GenAI-Bench.


def genai_printed(tag: dict) -> tuple[str, str]:
  """Mean and deviation as the official script prints them."""
  show = lambda value: "nan" if value is None else f"{value:.2f}"
  return show(tag["score"]), show(tag["deviation"])


def genai_text(result: dict, model: str) -> str:
  """The three tables of the official script."""
  lines = []
  for group, tags in TAG_GROUPS.items():
    cells = [" +- ".join(genai_printed(result["tags"][tag])) for tag in tags]
    lines += [f"Tag Group: {group} (metric performance)",
              f"{'Model':<20}" + " ".join(f"{tag:<20}" for tag in tags),
              f"{model:<20}" + " ".join(f"{cell:<20}" for cell in cells)]
  return "\n".join(lines) + "\n"


# OneIG-Bench.


def split_grid(image: np.ndarray, columns: int = 2, rows: int = 2) -> list[np.ndarray]:
  """The cells of a grid [H, W, 3], row by row; black cells, failed images, are left out.

  Sizes are floored, so pixels that are over at the right and the bottom belong to no cell.
  """
  height, width = image.shape[0] // rows, image.shape[1] // columns
  cells = [image[r * height : (r + 1) * height, c * width : (c + 1) * width]
           for r in range(rows) for c in range(columns)]
  return [cell for cell in cells if cell.any()]


def largest_similarity(embedding, references) -> float:
  """Largest dot product of an embedding [D] with references [N, D], all of length one.

  float32, as the official models answer, added from left to right: no library decides the last
  digit.
  """
  products = np.asarray(references, np.float32) * np.asarray(embedding, np.float32)
  return float(np.cumsum(products, axis=1, dtype=np.float32)[:, -1].max())


def style_name(name: str) -> str:
  """A class of the prompt file as the reference embeddings name it."""
  return name.lower().replace(" ", "_")
