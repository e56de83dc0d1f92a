"""GenAI-Bench: VQAScores of the prompts, and their means by skill and over all skills together.

A VQAScore is the probability, from 0 to 1, that a model answers "Yes" to whether the image shows
the prompt. It comes from a function (--scorer), from a file of what another model measured

  {"round": 1, "part": "vqascore", "id": "00001", "values": [0.83]}

(--measurements; officially clip-flant5-xxl), or from the judge's log-probabilities.

  --prompts    genai_image.json, or its folder; genai_skills.json beside it names the skills
  item ids     "00001", the key; "extra" has the skills as "tags"
  images       roundN/irg_jax/00001.jpeg
"""

import collections
import re

import numpy as np

from irg_jax import storage
from irg_jax.evaluate import base, questions, records, score

QUESTION = "vqascore"  # its name in the key of an answer, and the part of a measurement
SCORE_CACHE = "vqascore_cache.sqlite"  # the usual name

BASIC = ("attribute", "scene", "spatial relation", "action relation", "part relation", "basic")
ADVANCED = ("counting", "comparison", "differentiation", "negation", "universal", "advanced")


def aggregate(scores: dict[str, float | None], skills: dict[str, list[int]]) -> dict:
  """Mean and unbiased deviation of each tag, and of the union of all tags' prompts ("all").

  Args:
    scores: {prompt id of five digits: score from 0 to 1, or None where there is none}.
    skills: as `read_skills` reads them. Prompts are found by their id, not by their place, so
      that files that count from 1 work as well.

  Returns:
    {"overall": of "all", "tags": {tag: {"score", "deviation", "count": prompts with a score,
     "absent": those without}}, "items": prompts with a score, "untagged": of those the ones
     without a tag, which "all" leaves out}.
  """
  ids = {tag: list(dict.fromkeys(map(prompt_id, numbers))) for tag, numbers in skills.items()}
  union = list(dict.fromkeys(i for members in ids.values() for i in members))
  tags = {tag: _statistics(scores, members) for tag, members in (ids | {"all": union}).items()}
  scored = {i for i, value in scores.items() if value is not None}
  return {"overall": tags["all"]["score"], "tags": tags, "items": len(scored),
          "untagged": len(scored - set(union))}


def prompt_id(number) -> str:
  """The id of a prompt number, or the id itself: five digits."""
  return f"{int(number):05d}"


def read_skills(path) -> dict[str, list[int]]:
  """{tag: [number of a prompt, ...]} of an official genai_skills.json."""
  try:
    skills = storage.read_json(path)
    if wrong := [n for numbers in skills.values() for n in numbers
                 if isinstance(n, bool) or not re.fullmatch("[0-9]{1,9}", str(n))]:
      raise ValueError(f"{str(wrong[0])[:80]!r} is no number of a prompt")
  except (OSError, ValueError, TypeError) as e:
    raise ValueError(f"{path}: must be a JSON object of lists of prompt numbers ({e})") from e
  return skills


def check_skills(skills: dict, known_ids, path="genai_skills.json") -> None:
  """Raises ValueError if a tag is no list, a prompt is unknown, or a published tag is absent."""
  known = set(known_ids)
  for tag, numbers in skills.items():
    if not isinstance(numbers, list):
      raise ValueError(f"{path}: tag {tag!r} is not a list of prompt numbers")
    if unknown := [n for n in numbers if prompt_id(n) not in known]:
      raise ValueError(f"{path}: tag {tag!r} names prompt {unknown[0]}, which the prompt file "
                       "does not have; do the two files belong together?")
  if absent := [t for t in (*BASIC, *ADVANCED) if t not in skills]:
    raise ValueError(f"{path}: has no tag {absent[0]!r}")


class Scorer:
  """Adds up a round's VQAScores, one for each prompt; see `score`. `skills`: {tag: [number]}."""

  def __init__(self, skills: dict):
    self._skills, self._scores, self._unscored = skills, {}, base.Unscored()

  def add(self, item, answers) -> dict:
    answer = answers.get((0, QUESTION))
    if measured := answers.get((QUESTION, "values")):
      answer = questions.Answer(item.id, probability=measured[0])
    why, value = questions.failure(answer), getattr(answer, "probability", None)
    if not why and not (base.is_number(value) and 0 <= value <= 1):
      why = "unparsable: no probability of yes" if value is None else f"out of range: {value}"
    if why:
      return score.no_score(self._unscored, item.id, answer, why)
    self._scores[item.id] = value
    return score.item_line(answer, {"VQAScore": value})

  def value(self) -> dict:
    return aggregate(self._scores, self._skills) | {"unscored": self._unscored.summary()}


class GenAIBench(base.Benchmark):
  """The protocol of GenAI-Bench."""

  name, title = "genai_bench", "GenAI-Bench"
  columns = ("GenAI-Bench",)

  def read_items(self, path):
    file = records.file_in(path, "genai_image.json")
    entries = records.json_records(file)
    for entry in entries:
      if entry.key is None or not re.fullmatch("[0-9]{1,9}", entry.key):
        raise ValueError(f"{entry.where}: the records must stand under keys like \"00001\"")
      if records.field(entry, "id", str) != entry.key:
        raise ValueError(f"{entry.where}: id {entry.record['id']!r} under the key {entry.key!r}")
      records.field(entry, "prompt", str)
    records.check_unique(entries, [f"prompt {int(e.key)}" for e in entries])
    skills, tags = file.with_name("genai_skills.json"), collections.defaultdict(list)
    for tag, numbers in read_skills(skills).items() if skills.is_file() else ():
      for number in numbers:
        tags[int(number)].append(tag)
    return [base.Item(self.name, e.key, e.record["prompt"], 1,
                      e.record | ({"tags": tags[int(e.key)]} if tags else {})) for e in entries]

  def tasks(self, item):
    return tuple(item.extra.get("tags", ()))

  def check_counts(self, items):
    if len(items) not in (1600, 527):
      raise ValueError(f"--prompts: {len(items)} prompts, but GenAI-Bench has 1600 (or 527); with "
                       "--subset they are taken as they are")

  def image_path(self, item, image, round):
    return base.round_root(round) / base.MODEL / f"{item.id}.jpeg"

  def questions(self, item, path, round, references=None, templates=None):
    yield self.question(item, path, round, QUESTION, templates, {"prompt": item.prompt},
                        probability=True)

  def score(self, folder, options, open_judge):
    skills = self._skills(options)
    make = lambda: Scorer(skills)
    if sum(map(bool, (options.measurements, options.scorer, options.judge_url))) > 1:
      raise ValueError("--measurements, --scorer, --judge-url: genai_bench is scored by one of "
                       "them")
    if options.measurements:
      table = score.read_measurements(options.measurements, {QUESTION: lambda value: value})
      extra = {"protocol": {"measurements": str(options.measurements)}}
      return score.score_judged(folder, make, None, extra=extra, measured=table)
    if options.scorer:
      function = score.load_function(options.scorer, "--scorer")
      groups = score.measured_by(folder, function, options.scorer, folder.out / SCORE_CACHE,
                                 QUESTION)
      return score.score_answers(folder, make, groups, {"protocol": {"scorer": options.scorer}})
    return score.score_judged(folder, make, open_judge)

  def categories(self, summary):
    return {tag: entry["score"] for tag, entry in summary["tags"].items()}

  def _skills(self, options):
    beside = options.prompts.parent if options.prompts.is_file() else options.prompts
    path = options.skills or beside / "genai_skills.json"
    if not path.is_file():
      raise ValueError(f"--skills {path}: no such file; genai_bench needs its genai_skills.json")
    skills = read_skills(path)
    check_skills(skills, [item.id for item in self.read(options.prompts)], path)
    return skills


GENAI_BENCH = GenAIBench()


def _statistics(scores, ids):
  # VQAScores are float32 upstream: the same rounding here makes the same means.
  found = np.array([scores[i] for i in ids if scores.get(i) is not None], np.float32)
  values = found.astype(np.float64)
  return {"score": float(values.mean()) if len(values) else None,
          "deviation": float(values.std(ddof=1)) if len(values) > 1 else None,
          "count": len(values), "absent": len(ids) - len(values)}
