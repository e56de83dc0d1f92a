"""TIIF-Bench: yes/no answers to accuracies by type, the nine groups, and their mean.

Short and long descriptions are scored apart, and so is each round: the official summary reads
every .json of a folder, which pools the rounds that IRG's evaluator writes side by side.
Also the text metric (GNED and recall of words), which is no part of the overall.
"""

import json
import pathlib
import re

import numpy as np

from irg_jax.evaluate import tally

LENGTHS = ("short", "long")
BASIC = {
    "Attribute": ("shape+color", "color+texture", "texture+color", "shape+texture"),
    "Relation": ("2d_spatial_relation", "3d_spatial_relation", "action+2d", "action+3d"),
    "Reasoning": ("numeracy", "negation", "differentiation", "comparison"),
}
_LOGIC = ("numeracy", "comparison", "differentiation", "negation")
ADVANCED = {
    "Attribute+Relation": ("action+color", "action+texture", "color+2d", "color+3d", "shape+2d",
                           "shape+3d", "texture+2d", "texture+3d"),
    "Attribute+Reasoning": tuple(f"{a}+{b}" for a in _LOGIC for b in ("color", "texture")),
    "Relation+Reasoning": tuple(f"{a}+{b}" for a in _LOGIC for b in ("2d", "3d")),
    "Text Generation": ("text",),
    "Style Control": ("style",),
}
REAL = {"Complex": ("real_world",)}
# The nine whose mean is the overall, named as the official summary names them.
GROUPS = {
    **{f"Basic_{name} - {name}": types for name, types in BASIC.items()},
    **{f"Advanced_{name} - {name}": types for name, types in ADVANCED.items()},
    **{f"Real_{name} - {name}": types for name, types in REAL.items()},
}
# Means over types, not over groups; for reading, no part of the overall.
WHOLES = {
    "Basic_Following_Overall - Overall": sum(BASIC.values(), ()),
    "Advanced_Following_Overall - Overall": sum(ADVANCED.values(), ()),
    "Real_World_Following_Overall - Overall": sum(REAL.values(), ()),
}
OVERALL = "Overall average score of 9 sub-attributes"
TYPES = sum(WHOLES.values(), ())

_ANSWER = re.compile(r"(yes|no)\b", re.IGNORECASE)
_ROUND_FILE = re.compile(r"(?:turn(\d+)_)?(\d+)\.json")


class Unparsable(ValueError):
  """The judge's text does not answer each question once."""


def parse(text: str, questions: int) -> list[str]:
  """One "yes" or "no" a question: the lines that begin with such a word, in order.

  Raises:
    Unparsable: there are more or fewer such lines than questions. The item is asked again.
  """
  found = [_ANSWER.match(line.strip()) for line in text.strip().splitlines() if line.strip()]
  answers = [m[1].lower() for m in found if m]
  if len(answers) != questions:
    raise Unparsable(f"{len(answers)} lines begin with yes or no, for {questions} questions")
  return answers


class Summary:
  """Adds up answered items of one round."""

  def __init__(self):
    self.unscored = tally.Unscored()
    self._counts = {}  # (type, length): [questions, right answers]
    self._items = 0

  def add(self, kind: str, length: str, expected, predicted) -> None:
    """Counts one picture's questions; the longer of the two lists is cut to the other."""
    pairs = list(zip(expected, predicted))
    right = sum(e.strip().lower() == p.strip().lower() for e, p in pairs)
    self._items += 1
    self.add_counts(kind, length, len(pairs), right)

  def add_counts(self, kind: str, length: str, questions: float, right: float) -> None:
    count = self._counts.setdefault((kind, length), [0, 0])
    count[0] += questions
    count[1] += right

  def value(self, models: int = 1) -> dict:
    """Accuracies (rounded to four places, as the official sheet holds them), groups, overall.

    Args:
      models: rows of the official sheet. It decides the last digit of a figure that lies half-way
        between two: pandas adds up a single row in another order than one of several.
    """
    accuracy = {key: round(right / questions, 4)
                for key, (questions, right) in self._counts.items() if questions}
    groups = {name: _by_length(accuracy, types, models) for name, types in GROUPS.items()}
    overall = {n: _mean((g[n] for g in groups.values()), 1) for n in LENGTHS}
    return {
        "overall": overall,
        "groups": groups,
        "wholes": {name: _by_length(accuracy, types, models) for name, types in WHOLES.items()},
        "accuracy": {f"{kind}/{length}": accuracy.get((kind, length))
                     for kind, length in sorted(self._counts)},
        "counts": {f"{kind}/{length}": {"questions": q, "right": r}
                   for (kind, length), (q, r) in sorted(self._counts.items())},
        "missing_types": {n: [t for t in TYPES if (t, n) not in accuracy] for n in LENGTHS},
        "unknown_types": sorted({k for k, _ in self._counts} - set(TYPES)),
        "items": self._items,
        "unscored": self.unscored.summary(),
    }


def printed(value: float | None) -> float:
  """A figure as the official summary rounds it, to four places; NaN where there is none."""
  return float("nan") if value is None else float(np.round(value, 4))


def read_results(folder, models: int = 1) -> dict[int, dict]:
  """Scores a model's folder of an official result tree, TYPE/LENGTH/I.json, by round.

  Files named turn1_0.json, as IRG's evaluator writes them, belong to round 1, and so on;
  plain names are round 1. comparison_*.json hold no answers and are passed over. For `models`
  see `Summary.value`.

  Raises:
    ValueError: plain and turn names lie side by side, so that a round cannot be told.
  """
  rounds, styles = {}, set()
  for path in sorted(pathlib.Path(folder).glob("*/*/*.json")):
    match = _ROUND_FILE.fullmatch(path.name)
    if not match or path.parent.name not in LENGTHS:
      continue
    styles.add(match[1] is not None)
    if len(styles) > 1:
      raise ValueError(f"{path}: lies beside files of the other naming (turn1_0.json and 0.json); "
                       "which round the plain ones are is unknown: keep the rounds in folders "
                       "apart")
    summary = rounds.setdefault(int(match[1] or 1), Summary())
    _add_file(summary, path, folder)
  return {number: summary.value(models) for number, summary in sorted(rounds.items())}


def word_distance(expected: list[str], seen: list[str]) -> float:
  """GNED: cost of the best matching of words, plus the difference in number, over the larger."""
  from scipy import optimize
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
  for name, score in (("GNED", word_distance), ("Recall", word_recall)):
    for length in LENGTHS:
      scores = [score(r["text"], _ocr_texts(r[f"{length}_image_ocr_results"])) for r in records]
      result[f"{name}_score_{length}"] = tally.mean(scores) or 0.0
  return result


def edit_distance(a: str, b: str) -> int:
  """Levenshtein distance."""
  other = np.frombuffer(b.encode("utf-32-le", "surrogatepass"), np.uint32)
  places = np.arange(len(b) + 1)
  row = places
  for letter in a:
    changed = np.minimum(row[1:] + 1, row[:-1] + (other != ord(letter)))
    # An insertion costs one a place: a running minimum of what is left after that.
    row = np.minimum.accumulate(np.append(row[0] + 1, changed) - places) + places
  return int(row[-1])


def normalized_edit_distance(a: str, b: str) -> float:
  longest = max(len(a), len(b))
  return edit_distance(a, b) / longest if longest else 0.0


def _by_length(accuracy, types, models):
  return {n: _mean((accuracy.get((t, n)) for t in types), models) for n in LENGTHS}


def _mean(values, models):
  found = [v for v in values if v is not None]
  if not found or models > 1:
    return tally.mean(found)
  return float(np.sum(np.array(found)) / len(found))


def _add_file(summary, path, folder):
  name = str(path.relative_to(folder))
  try:
    record = json.loads(path.read_text(encoding="utf-8"))
    expected, predicted = record["gt_answers"], record["model_pred"]
    summary.add(path.parent.parent.name, path.parent.name, expected, predicted)
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    summary.unscored.add(name, "unreadable result file", str(e))


def _ocr_texts(lines):
  # An image without any text counts as one empty word, as upstream.
  return [line[1][0] for line in lines] if lines else [""]


def _words(expected, seen):
  """Lower-cased; what is seen is cut at single spaces."""
  return [w.lower() for w in expected], [w for s in seen for w in s.lower().split(" ")]
