"""WISE: the judge's words to three scores, and both ways in which an overall is published.

The official script weights the categories by their number of items; the script that BAGEL and
IRG ship takes the plain mean of the six. Both are reported, side by side.
"""

import dataclasses
import re

from irg_jax.evaluate import tally

FIELDS = ("consistency", "realism", "aesthetic_quality")
FIELD_WEIGHTS = (0.7, 0.2, 0.1)  # of a score from 0 to 2 each

_NAMES = r"\*{0,2}(Consistency|Realism|Aesthetic Quality)\*{0,2}"
_OFFICIAL = re.compile(_NAMES + r"\s*:?\s*(\d)", re.IGNORECASE)
_BAGEL = re.compile(_NAMES + r"\s*[:：]?\s*(\d)", re.IGNORECASE)
_LONE_DIGIT = re.compile(r"\s*([012])\s*")
_VERIFIED = re.compile(r"\*{0,2}Score\*{0,2}\s*:?\s*([01])(?!\d)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Variant:
  """Which ids a category holds (first and last), and what it weighs in the overall."""

  name: str
  ranges: dict
  weights: dict
  groups: tuple = ((1, 400), (401, 700), (701, 1000))  # the files: as many records as ids


LEGACY = Variant(
    "WISE",
    {"CULTURE": (1, 400), "TIME": (401, 567), "SPACE": (568, 700), "BIOLOGY": (701, 800),
     "PHYSICS": (801, 900), "CHEMISTRY": (901, 1000)},
    {"CULTURE": 0.4, "TIME": 0.167, "SPACE": 0.133, "BIOLOGY": 0.1, "PHYSICS": 0.1,
     "CHEMISTRY": 0.1})
VERIFIED = Variant(
    "WISE_Verified",
    {"CULTURE": (1, 400), "TIME": (401, 520), "SPACE": (521, 640), "BIOLOGY": (641, 760),
     "PHYSICS": (761, 880), "CHEMISTRY": (881, 1000)},
    {"CULTURE": 0.4, "TIME": 0.12, "SPACE": 0.12, "BIOLOGY": 0.12, "PHYSICS": 0.12,
     "CHEMISTRY": 0.12})
IDS = range(1, 1001)


def parse(text: str, bagel: bool = False) -> dict[str, float]:
  """The scores that the judge's text holds; a name that it lacks is absent, never a number.

  The last mention of a name wins. The official parser falls back on three lone digits where no
  name is found; BAGEL's does not, but takes a full-width colon.
  """
  pattern = _BAGEL if bagel else _OFFICIAL
  scores = {name.lower().replace(" ", "_"): float(digit) for name, digit in pattern.findall(text)}
  if scores or bagel:
    return scores
  lone = [m[1] for m in map(_LONE_DIGIT.fullmatch, text.splitlines()) if m]
  return dict(zip(FIELDS, map(float, lone))) if len(lone) >= 3 else {}


def parse_verified(text: str) -> dict[str, float]:
  """The one score, 0 or 1, that the judge of the 2026 variant gives; empty without one."""
  if found := _VERIFIED.findall(text):
    return {"score": float(found[-1])}
  lone = text.strip()
  return {"score": float(lone)} if lone in ("0", "1") else {}


def item_score(record: dict) -> float:
  """WiScore, from 0 to 1, of a record with the three scores (or the variant's one)."""
  if "score" in record:
    return float(record["score"])
  return sum(w * record[f] for w, f in zip(FIELD_WEIGHTS, FIELDS)) / 2


class Summary:
  """Adds up records {"prompt_id": int, "consistency": .., "realism": .., "aesthetic_quality": ..}.

  The variant WISE_Verified has "score" in the place of the three.
  """

  def __init__(self, variant: Variant = LEGACY):
    self.variant = variant
    self.unscored = tally.Unscored()
    self._categories = {name: tally.Mean() for name in variant.ranges}
    self._groups = [0] * len(variant.groups)  # records with a score
    self._present = set()  # of at most 1000 ids

  def add(self, record: dict | None, where: str = "") -> None:
    """Counts a record, or says why not; None stands for a line that is not JSON."""
    where = where or f"prompt_id {record.get('prompt_id') if record else '?'}"
    if record is None:
      return self.unscored.add(where, "not JSON")
    number = record.get("prompt_id")
    if not isinstance(number, int):
      return self.unscored.add(where, "no integer prompt_id", str(number))
    category = self._category(number)
    if category is None:
      return self.unscored.add(where, "prompt_id outside 1 to 1000", str(number))
    self._present.add(number)
    fields = FIELDS if self.variant is LEGACY else ("score",)
    if not all(tally.is_number(record.get(f)) for f in fields):
      return self.unscored.add(where, "no score", str({f: record.get(f) for f in fields}))
    if fields == ("score",) and record["score"] not in (0, 1):
      return self.unscored.add(where, "score is not 0 or 1", str(record["score"]))
    self._categories[category].add(item_score(record))
    for i, (first, last) in enumerate(self.variant.groups):
      self._groups[i] += first <= number <= last

  def value(self) -> dict:
    """Means by category and both overalls.

    `weighted` is given as the official script does: only when every id from 1 to 1000 is in
    some record. `unweighted` as BAGEL's: only when no record lacks a score and each third is
    full. `weighted_partial` and `unweighted_partial` are of what has a score, whatever is
    missing; None where a whole category is.
    """
    means = {name: mean.value() for name, mean in self._categories.items()}
    weighted = unweighted = None
    if all(value is not None for value in means.values()):
      weighted = sum(self.variant.weights[name] * value for name, value in means.items())
      unweighted = sum(means.values()) / len(means)
    absent = [i for i in IDS if i not in self._present]
    sizes = [last - first + 1 for first, last in self.variant.groups]
    full = not self.unscored.total() and all(n >= s for n, s in zip(self._groups, sizes))
    return {
        "variant": self.variant.name,
        "categories": {name: {"score": means[name], "count": mean.count}
                       for name, mean in self._categories.items()},
        "weighted": None if absent else weighted,
        "unweighted": unweighted if full else None,
        "weighted_partial": weighted,
        "unweighted_partial": unweighted,
        "items": sum(mean.count for mean in self._categories.values()),
        "absent_ids": absent[:20],  # of all, the first few
        "absent": len(absent),
        "unscored": self.unscored.summary(),
    }

  def _category(self, number):
    for name, (first, last) in self.variant.ranges.items():
      if first <= number <= last:
        return name
    return None
