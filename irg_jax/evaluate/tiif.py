"""TIIF-Bench: yes/no answers to accuracies by type, the nine groups, and their mean.

Short and long descriptions are scored apart, and so is each round: the official summary reads
every .json of a folder, which pools the rounds that IRG's evaluator writes side by side.

  --prompts    the folder `testmini_prompts` or `test_prompts`
  --questions  the folder `testmini_eval_prompts` or `test_eval_prompts`
  item ids     "color+2d/short/0": type, length, line from 0; "extra" has them as "attribute",
               "length" and "line"
  images       roundN/color+2d/irg_jax/short_description/0.png
"""

import re

import numpy as np

from irg_jax import storage
from irg_jax.evaluate import answers as answers_lib
from irg_jax.evaluate import base, questions, records, score

QUESTION = "answers"  # its name in the key of an answer
_FACTS = base.facts("tiif")
LENGTHS = ("short", "long")
# The nine whose mean is the overall, named as the official summary names them.
GROUPS = {name: tuple(types) for name, types in _FACTS["groups"].items()}
# Means over types, not over groups; for reading, no part of the overall.
WHOLES = {f"{whole}_Following_Overall - Overall": sum(
    (types for name, types in GROUPS.items() if name.startswith(whole.split("_")[0])), ())
          for whole in ("Basic", "Advanced", "Real_World")}
OVERALL = "Overall average score of 9 sub-attributes"
TYPES = sum(WHOLES.values(), ())
# Prompts of a type in testmini and in the whole test set.
COUNTS = {kind: tuple(size["prompts"]) for size in _FACTS["sizes"] for kind in size["types"]}

_ANSWER = re.compile(r"(yes|no)\b", re.IGNORECASE)


class Unparsable(answers_lib.NoAnswer):
  """The judge's text does not answer each question once."""


def parse(text: str, questions: int) -> list[str]:
  """One "yes" or "no" for each question, from the lines that begin so, as the official script does.

  Raises Unparsable where they are more or fewer than the questions; the item is then asked again.
  """
  found = [_ANSWER.match(line.strip()) for line in text.strip().splitlines() if line.strip()]
  answers = [m[1].lower() for m in found if m]
  if len(answers) != questions:
    raise Unparsable(f"{len(answers)} lines begin with yes or no, for {questions} questions")
  return answers


def form(count: int) -> questions.Form:
  """The form of an answer to `count` questions."""
  return questions.Form(lambda text: answers_lib.yes_nos(text, count),
                        lambda text: parse(text, count))


def read_questions(folder, items) -> dict[tuple[str, int], tuple[list[str], list[str]]]:
  """{(type, line): (questions, right answers)} for the items, from the official question files.

  ValueError names the file or line that is missing or malformed.
  """
  found = {}
  for kind in dict.fromkeys(item.extra["attribute"] for item in items):
    path = storage.path(folder) / f"{kind}_eval_prompts.jsonl"
    if not path.is_file():
      raise ValueError(f"--questions {folder}: no file {path.name} in there; give the folder "
                       "testmini_eval_prompts (or the one that belongs to your prompts)")
    for line, entry in enumerate(records.json_lines(path)):
      asked = records.field(entry, "yn_question_list", list)
      answers = records.field(entry, "yn_answer_list", list)
      if not asked or len(asked) != len(answers):
        raise ValueError(f"{entry.where}: {len(asked)} questions and {len(answers)} answers")
      if bad := [v for v in asked + answers if not isinstance(v, str) or not v.strip()]:
        raise ValueError(f"{entry.where}: {bad[0]!r} is not a text")
      if bad := [a for a in answers if a.strip().lower() not in ("yes", "no")]:
        raise ValueError(f"{entry.where}: the answer {bad[0]!r} is neither yes nor no")
      found[kind, line] = asked, answers
  for item in items:
    if _line(item) not in found:
      kind, line = _line(item)
      raise ValueError(f"{folder}: {kind}_eval_prompts.jsonl has no line {line + 1}, for the "
                       f"prompt {item.id}; do prompts and questions belong together?")
  return found


def mean(values) -> float | None:
  """The mean, added up as pandas does for the one row of an official sheet."""
  found = [v for v in values if v is not None]
  return float(np.mean(found)) if found else None


class Scorer:
  """Adds up a round's answers; see `score`, and `read_questions` for `references`."""

  mean = staticmethod(mean)  # of the accuracies of types

  def __init__(self, references: dict, strict: bool = False):
    self.unscored, self._references = base.Unscored(), references
    self.irregular, self._strict = base.Unscored(), strict
    self._counts, self._items = {}, 0  # {(type, length): [questions, right answers]}

  def add(self, item, answers) -> dict:
    answer, (asked, expected) = answers.get((0, QUESTION)), self._references[_line(item)]
    predicted, why, irregular = form(len(asked)).take(answer, self._strict)
    if why:
      return score.no_score(self.unscored, item.id, answer, why)
    self.irregular.add_if(irregular, item.id, answer)
    right = sum(e.strip().lower() == p for e, p in zip(expected, predicted))
    self.count(item.extra["attribute"], item.extra["length"], len(asked), right)
    return score.item_line(answer, {"accuracy": right / len(asked)}) | {
        "questions": [list(row) for row in zip(asked, expected, predicted)]}

  def count(self, kind: str, length: str, questions: float, right: float) -> None:
    """Adds the answers to an item's questions, and how many of them are right."""
    count = self._counts.setdefault((kind, length), [0, 0])
    count[0] += questions
    count[1] += right
    self._items += 1

  def value(self) -> dict:
    """Accuracies (rounded to four places, as the official sheet holds them), groups, overall."""
    counts = {f"{kind}/{length}": {"questions": asked, "right": right}
              for (kind, length), (asked, right) in sorted(self._counts.items())}
    accuracy = {key: round(count["right"] / count["questions"], 4) if count["questions"] else None
                for key, count in counts.items()}
    means = lambda groups: {
        name: {n: self.mean([accuracy.get(f"{kind}/{n}") for kind in kinds]) for n in LENGTHS}
        for name, kinds in groups.items()}
    groups = means(GROUPS)
    return {
        "overall": {n: mean([group[n] for group in groups.values()]) for n in LENGTHS},
        "groups": groups,
        "wholes": means(WHOLES),
        "accuracy": accuracy,
        "counts": counts,
        "missing_types": {n: [kind for kind in TYPES if accuracy.get(f"{kind}/{n}") is None]
                          for n in LENGTHS},
        "unknown_types": sorted({kind for kind, _ in self._counts} - set(TYPES)),
        "items": self._items,
        "irregular": self.irregular.summary(),
        "unscored": self.unscored.summary(),
    }


class Tiif(base.Benchmark):
  """The protocol of TIIF-Bench."""

  name, title = "tiif", "TIIF-Bench"
  columns, places = ("TIIF short", "TIIF long"), 2

  def read_items(self, path):
    suffix = "_prompts.jsonl"
    files = sorted(path.glob(f"*{suffix}"))
    if not files:
      raise ValueError(f"--prompts {path}: no files TYPE{suffix} in there; give the folder "
                       "testmini_prompts (or test_prompts)")
    items = []
    for file in files:
      attribute = file.name.removesuffix(suffix)
      if attribute not in COUNTS:
        raise ValueError(f"{file}: {attribute!r} is not one of TIIF's {len(COUNTS)} types; the "
                         "prompts are in testmini_prompts, the questions elsewhere")
      for line, entry in enumerate(records.json_lines(file)):
        records.field(entry, "type", str)
        for length in LENGTHS:
          prompt = records.field(entry, f"{length}_description", str)
          added = {"attribute": attribute, "length": length, "line": line}
          items.append(base.Item(self.name, f"{attribute}/{length}/{line}", prompt, 1,
                                 entry.record | added))
    return items

  def counts(self, size):
    mini, full = (sum(c[which] for c in COUNTS.values()) for which in (0, 1))
    which = size > mini + full  # two items a prompt: whichever is nearer
    return {name: 2 * counts[which] for name, counts in COUNTS.items()}

  def image_path(self, item, image, round):
    attribute, length, line = item.id.split("/")
    return base.round_root(round) / attribute / base.MODEL / f"{length}_description" / f"{line}.png"

  def questions(self, item, path, round, references=None, templates=None):
    asked = [q.strip() for q in references[_line(item)][0]]
    fields = {"questions": "\n".join(asked), "count": len(asked)}
    yield self.question(item, path, round, QUESTION, templates, fields,
                        **form(len(asked)).faults())

  def score(self, folder, options, open_judge):
    if not options.questions:
      raise ValueError("--questions: give the folder testmini_eval_prompts (or the one that "
                       "belongs to your prompts)")
    references = read_questions(options.questions, folder.items)
    make = lambda: Scorer(references, options.strict_official)
    return score.score_judged(folder, make, open_judge, references)

  def headline(self, summary):
    return {f"TIIF {n}": _percent(summary["overall"][n]) for n in LENGTHS}

  def categories(self, summary):
    named = {name.split(" - ")[0].replace("_", ": ", 1): row
             for name, row in summary["groups"].items()} | {"overall": summary["overall"]}
    return {f"{name}, {n}": _percent(row[n]) for n in LENGTHS for name, row in named.items()}


TIIF = Tiif()


def _line(item):
  return item.extra["attribute"], item.extra["line"]


def _percent(value):
  return None if value is None else 100 * value
