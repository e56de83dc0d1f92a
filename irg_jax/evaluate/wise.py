"""WISE: a judge's three scores for each image, and both ways in which an overall is published.

The official script weights the categories by their number of items; the script that BAGEL and
IRG ship takes the plain mean of the six. Both are reported, side by side.

  --prompts    the folder with the three files, or one of them, or `final_data.json`
  item ids     "901", the prompt_id
  images       roundN/901.png
"""

import re

from irg_jax.evaluate import answers as answers_lib
from irg_jax.evaluate import base, questions, records, score

QUESTION = "scores"  # its name in the key of an answer

_NAMES = {"consistency": "consistency", "realism": "realism",
          "aesthetic_quality": r"aesthetics?(?:[\s_-]*quality)?"}  # patterns
FIELDS = ("consistency", "realism", "aesthetic_quality")
TOP = 2  # the best grade
FIELD_WEIGHTS = (0.7, 0.2, 0.1)  # of a score from 0 to 2 each
# First and last id of each category, and its weight in the official overall.
RANGES = {"CULTURE": (1, 400), "TIME": (401, 567), "SPACE": (568, 700), "BIOLOGY": (701, 800),
          "PHYSICS": (801, 900), "CHEMISTRY": (901, 1000)}
WEIGHTS = dict(zip(RANGES, (0.4, 0.167, 0.133, 0.1, 0.1, 0.1)))
FILES = {"cultural_common_sense": (1, 400), "spatio-temporal_reasoning": (401, 700),
         "natural_science": (701, 1000)}  # and their ids
IDS = range(1, 1001)

_SCORE = re.compile(r"\*{0,2}(Consistency|Realism|Aesthetic Quality)\*{0,2}\s*:?\s*(\d)",
                    re.IGNORECASE)
_LONE_DIGIT = re.compile(r"\s*([012])\s*")
_OTHER = ("this looks like WISE_Verified of 2026, which has other prompts, ids and scores and is "
          "not supported; give the folder WISE/WISE_legacy/data")


def parse(text: str) -> dict[str, float]:
  """Scores that the official script reads in a text; one that it lacks is absent, never a number.

  The last mention of a name wins. Where no name is found, three lone digits do.
  """
  found = {name.lower().replace(" ", "_"): float(digit) for name, digit in _SCORE.findall(text)}
  if found:
    return found
  lone = [m[1] for m in map(_LONE_DIGIT.fullmatch, text.splitlines()) if m]
  return dict(zip(FIELDS, map(float, lone))) if len(lone) >= 3 else {}


def _all_scores(text):
  found = parse(text)
  if missing := [f for f in FIELDS if f not in found]:
    raise answers_lib.NoAnswer(f"no score for {' and '.join(missing)}")
  return found


FORM = questions.Form(lambda text: answers_lib.grades(text, _NAMES, TOP), _all_scores)


def item_score(scores: dict[str, float]) -> float:
  """WiScore, from 0 to 1, of the three scores."""
  return sum(w * scores[f] for w, f in zip(FIELD_WEIGHTS, FIELDS)) / 2


def category(number: int, ranges=RANGES) -> str | None:
  """The category of a prompt_id; None outside all."""
  return next((n for n, (first, last) in ranges.items() if first <= number <= last), None)


class Scorer:
  """Adds up a round's answers, three scores each; see `score`."""

  def __init__(self, ranges=RANGES, weights=WEIGHTS, strict=False):
    self.unscored, self.present = base.Unscored(), set()  # present: ids, scored or not
    self.irregular, self._strict = base.Unscored(), strict
    self._ranges, self._weights = ranges, weights
    self._means = {name: base.Mean() for name in ranges}
    self._in_file = dict.fromkeys(FILES, 0)  # items with a score

  def add(self, item, answers) -> dict:
    answer = answers.get((0, QUESTION))
    scores, why, irregular = FORM.take(answer, self._strict)
    if why:
      return score.no_score(self.unscored, item.id, answer, why)
    self.irregular.add_if(irregular, item.id, answer)
    self.count(item.extra["prompt_id"], item_score(scores))
    return score.item_line(answer, scores | {"WiScore": item_score(scores)})

  def count(self, number: int, wiscore: float) -> None:
    """Adds the WiScore of a prompt_id."""
    self.present.add(number)
    self._means[category(number, self._ranges)].add(wiscore)
    self._in_file[category(number, FILES)] += 1

  def value(self) -> dict:
    """Means by category and both overalls.

    `weighted` is given as the official script does: only when every id from 1 to 1000 is in
    some record. `unweighted` as BAGEL's: only when no record lacks a score and each file is
    full. `weighted_partial` and `unweighted_partial` are of what has a score, whatever is
    missing; None where a whole category is.
    """
    means = {name: mean.value() for name, mean in self._means.items()}
    weighted = unweighted = None
    if all(value is not None for value in means.values()):
      weighted = sum(self._weights[name] * value for name, value in means.items())
      unweighted = sum(means.values()) / len(means)
    absent = [i for i in IDS if i not in self.present]
    full = not self.unscored.total() and all(
        self._in_file[name] >= last - first + 1 for name, (first, last) in FILES.items())
    return {
        "variant": "WISE",
        "categories": {name: {"score": means[name], "count": mean.count}
                       for name, mean in self._means.items()},
        "weighted": None if absent else weighted,
        "unweighted": unweighted if full else None,
        "weighted_partial": weighted,
        "unweighted_partial": unweighted,
        "items": sum(mean.count for mean in self._means.values()),
        "absent_ids": absent[:20],  # of all, the first few
        "absent": len(absent),
        "irregular": self.irregular.summary(),
        "unscored": self.unscored.summary(),
    }


class Wise(base.Benchmark):
  """The protocol of WISE."""

  name, title = "wise", "WISE"
  published_counts = {name: last - first + 1 for name, (first, last) in RANGES.items()}
  columns = ("WISE, plain mean", "WISE, weighted")

  def read_items(self, path):
    names = [f"{name}.json" for name in FILES]
    if (path / "final_data.json").is_file() and not any((path / name).exists() for name in names):
      names = ["final_data.json"]
    verified = (path / "merge.json").is_file() and not any((path / n).is_file() for n in names)
    if (verified or "verified" in path.name.lower()
        or path.absolute().parent.name == "data_verified"):
      raise ValueError(f"--prompts {path}: {_OTHER}")
    files = dict.fromkeys(records.file_in(path, name) for name in names)
    entries = [entry for file in files for entry in records.json_records(file)]
    for entry in entries:
      for name in ("Prompt", "Explanation", "Category", "Subcategory"):
        records.field(entry, name, str)
      if records.field(entry, "prompt_id", int) not in IDS:
        raise ValueError(f"{entry.where}: prompt_id {entry.record['prompt_id']} is not from 1 to "
                         "1000")
      _check_category(entry)
    records.check_unique(entries, [f"prompt_id {e.record['prompt_id']}" for e in entries])
    return [base.Item(self.name, str(e.record["prompt_id"]), e.record["Prompt"], 1, e.record)
            for e in sorted(entries, key=lambda e: e.record["prompt_id"])]

  def tasks(self, item):
    return (category(int(item.id)),)

  def image_path(self, item, image, round):
    return base.round_root(round) / f"{item.id}.png"

  def questions(self, item, path, round, references=None, templates=None):
    fields = {"prompt": item.prompt, "explanation": item.extra["Explanation"]}
    yield self.question(item, path, round, QUESTION, templates, fields, **FORM.faults())

  def score(self, folder, options, open_judge):
    make = lambda: Scorer(strict=options.strict_official)
    return score.score_judged(folder, make, open_judge)

  def headline(self, summary):
    return dict(zip(self.columns, (summary["unweighted_partial"], summary["weighted_partial"])))

  def categories(self, summary):
    scores = {name: entry["score"] for name, entry in summary["categories"].items()}
    return scores | {"plain mean": summary["unweighted_partial"],
                     "weighted": summary["weighted_partial"]}


WISE = Wise()


def _check_category(entry):
  """Raises ValueError where a file calls a prompt by one category, and its id is of another."""
  number, said = entry.record["prompt_id"], entry.record["Category"]
  named = [n for n in RANGES if said.strip().upper().startswith(n[:6])]
  if named and named[0] != category(number):
    raise ValueError(f"{entry.where}: prompt_id {number} is of {category(number)}, but the file "
                     f"says {said!r}; {_OTHER}")
