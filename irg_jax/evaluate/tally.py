"""Small sums that every protocol needs: constant memory, whatever the number of images."""

import json
import math


class Mean:
  """A plain mean, added up in the order of arrival, as the official scripts do."""

  def __init__(self):
    self.sum, self.count = 0.0, 0

  def add(self, value) -> None:
    self.sum += value
    self.count += 1

  def value(self) -> float | None:
    """The mean; None where nothing was added."""
    return self.sum / self.count if self.count else None


class Unscored:
  """What has no score: counted by reason, with the first few named.

  Attributes:
    counts: {reason: number of items}.
    examples: the first `limit` of them, as {"item": str, "reason": str, "detail": str}.
  """

  def __init__(self, limit: int = 20):
    self.counts, self.examples, self._limit = {}, [], limit

  def add(self, item: str, reason: str, detail: str = "") -> None:
    """Counts one item; `reason` is a short constant phrase, `detail` what was seen."""
    self.counts[reason] = self.counts.get(reason, 0) + 1
    if len(self.examples) < self._limit:
      self.examples.append({"item": item, "reason": reason, "detail": detail[:200]})

  def total(self) -> int:
    return sum(self.counts.values())

  def summary(self) -> dict:
    return {"total": self.total(), "by_reason": dict(self.counts), "examples": self.examples}


def mean(values) -> float | None:
  """The mean of those values that are numbers; None where there is none."""
  found = [v for v in values if v is not None]
  return sum(found) / len(found) if found else None


def is_number(value) -> bool:
  """Whether `value` is a finite number: what JSON calls true, null or NaN is none."""
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_lines(path):
  """Yields (line number from 1, object or None) of a JSON-lines file; None: not an object.

  Blank lines are passed over. A last line without its end is what a killed writer leaves.
  """
  with open(path, encoding="utf-8", errors="replace") as file:
    for number, line in enumerate(file, 1):
      if not line.strip():
        continue
      try:
        value = json.loads(line)
      except ValueError:
        value = None
      yield number, value if isinstance(value, dict) else None
