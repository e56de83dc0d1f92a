"""Scoring: the images of a run in, a streamed line for each, and a summary of each round.

  OUT/scores.json   summaries by round, with the run's settings and the judge's
  OUT/items.jsonl   a line for each prompt and round (each image, where a benchmark scores images
                    one by one): scores, or why there is none, and the judge's words

Both files are written atomically. A missing score is a reason, never a number. A scorer adds up one
round: `add(item, answers)` returns the end of a prompt's line (see `item_line`), `value()` the
summary. `answers` maps (cell, name of the question) to a `questions.Answer`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import itertools
import json
import os
import pathlib
import re
import sys

from irg_jax import runs, storage
from irg_jax.evaluate import base, questions, records
from irg_jax.progress import counting

RUN, SCORES, ITEMS = "run.json", "scores.json", "items.jsonl"
_ROUND = re.compile(r"round([1-9]\d*)")


@dataclasses.dataclass(frozen=True)
class ImageFolder:
  """A folder of images to score."""

  out: pathlib.Path  # folder of `irg eval generate`, or one in its layout
  benchmark: base.Benchmark
  items: tuple  # prompts to score; those with an image, unless images are scored one by one
  rounds: tuple[int, ...]  # numbers of the rounds that are there, from 1
  record: dict  # the content of run.json, or {}
  absent: int = 0  # prompts of the file without any image; they are counted, not asked about
  whole: bool = True  # the file has as many prompts as published

  def path(self, item, image: int, round: int) -> pathlib.Path:
    """The file of an image."""
    return self.out / self.benchmark.image_path(item, image, round)


def open_folder(benchmark: base.Benchmark, out, prompts_path=None) -> ImageFolder:
  """Finds the rounds of a folder and reads its prompts; ValueError for an unfit folder."""
  out, there = storage.path(out), base.listing(out)
  if not out.is_dir():
    raise ValueError(f"--out {out}: no such folder; it is what irg eval generate wrote")
  record = runs.read(out / RUN, ("settings", "notes")) if (out / RUN).is_file() else {}
  settings = record.get("settings", {})
  if (found := settings.get("benchmark", benchmark.name)) != benchmark.name:
    raise ValueError(f"--out {out}: holds images of {found}, not of {benchmark.name}")
  rounds = sorted(int(m[1]) for p in out.iterdir() if (m := _ROUND.fullmatch(p.name)))
  if not rounds:
    raise ValueError(f"--out {out}: has no round1, round2, ...; it is what irg eval generate wrote")
  every = benchmark.read(prompts_path)
  # Images of other prompts would be scored without complaint.
  if (count := settings.get("prompts", {}).get("count", len(every))) != len(every):
    raise ValueError(f"--prompts: has {len(every)} prompts, but {out} was generated from {count}; "
                     "give the same path as to irg eval generate")
  has_image = lambda item: any(there(benchmark.image_path(item, image, r))
                               for r in rounds for image in range(item.images))
  items = [item for item in every if benchmark.each_image or has_image(item)]
  whole = False
  with contextlib.suppress(ValueError):
    benchmark.check_counts(every)
    whole = True
  return ImageFolder(out, benchmark, tuple(items), tuple(rounds), record, len(every) - len(items),
                     whole)


def score_answers(folder: ImageFolder, make_scorer, groups, extra: dict,
                  label: str = "scoring") -> dict:
  """Scores a stream of answers, writes both files, and returns the content of scores.json.

  Args:
    make_scorer: () -> a scorer; a round gets one of its own, so that no rounds are pooled.
    groups: iterable of (item, round, answers); ValueError where a prompt and round comes twice.
    extra: more entries for scores.json.
    label: of the progress bar.
  """
  found = ((item, number, 0, item.images, answers) for item, number, answers in groups)
  expected = len(folder.items) + folder.absent
  return _score(folder, make_scorer, found, expected, extra, label)


def score_images(folder: ImageFolder, make_scorer, extra: dict) -> dict:
  """`score_answers` for images that are scored one by one, by `scorer.add(item, path)`."""
  found = ((item, number, image, 1, folder.path(item, image, number))
           for item, number, image in images_there(folder))
  expected = sum(item.images for item in folder.items)
  return _score(folder, make_scorer, found, expected, extra, "scoring")


def _score(folder, make_scorer, found, expected, extra, label):
  """Scores (item, round, image, images in the file, what the scorer adds)."""
  scorers = {number: make_scorer() for number in folder.rounds}
  done = {number: set() for number in folder.rounds}
  total = (expected - folder.absent) * len(scorers)
  with item_writer(folder) as write, counting(label, total) as count:
    for item, number, image, in_file, evidence in count(found):
      if (item.id, image) in done[number]:
        raise ValueError(f"{item.id}, round {number}: answers came twice")
      done[number].add((item.id, image))
      write(item, number, image, in_file, scorers[number].add(item, evidence))
  missing = {number: expected - len(images) for number, images in done.items()}
  return finish(folder, {n: scorer.value() for n, scorer in scorers.items()}, missing, extra)


def score_judged(folder: ImageFolder, make_scorer, open_judge, references=None, extra=None,
                 measured=None) -> dict:
  """`score_answers` for the answers of a judge.

  Args:
    open_judge: () -> context manager of a `questions.OpenJudge`; None: measurements alone count.
    references: for the benchmark's `questions`.
    measured: figures to add to the answers, from `read_measurements`.
  """
  table = measured or {}
  with open_judge() if open_judge else contextlib.nullcontext() as judge:
    groups = (judged(folder, judge.ask, references, judge.templates) if judge else
              ((item, number, {}) for number in folder.rounds for item in folder.items))
    found = ((item, number, answers | table.get((number, item.id), {}))
             for item, number, answers in groups)
    record, label = ({"judge": judge.record}, "asking the judge") if judge else ({}, "scoring")
    return score_answers(folder, make_scorer, found, record | (extra or {}), label)


def judged(folder: ImageFolder, ask, references=None, templates=None):
  """Yields (item, round, answers) of a judge, every item of every round once."""
  return questions.answers(
      folder.items, folder.rounds, ask, lambda item, round: folder.benchmark.questions(
          item, folder.path(item, 0, round), round, references, templates))


def measured_by(folder: ImageFolder, function, name: str, cache_path, question: str):
  """Yields (item, round, answers) of a function of the user's: (path, prompt) -> 0 to 1.

  Scores are cached by the image's content and by `name`, that of the function. `question` is the
  name under which an answer is handed on. ValueError after 20 failures in a row.
  """
  failures = 0
  with records.Cache(cache_path) as cache:
    for round, item in itertools.product(folder.rounds, folder.items):
      answer = _measure(item, folder.path(item, 0, round), function, name, cache)
      failed = answer.error and not answer.error.startswith("picture")
      failures = failures + 1 if failed else 0
      if failures >= base.GIVE_UP_AFTER:
        raise ValueError(f"{name} failed at {failures} images in a row: {answer.error}")
      yield item, round, {(0, question): answer}


def read_measurements(path, parts: dict) -> dict[tuple[int, str], dict]:
  """{(round, prompt id): {(part, "values"): numbers}} of figures of other models than a judge.

  A line is {"round": 1, "part": PART, "id": prompt id, "values": [...]}, and `parts` maps a part
  to a function from an entry of "values" to a number. ValueError names the line at fault.
  """
  found = {}
  for number, record in records.read_lines(path):
    where = f"{path}, line {number}"
    try:
      entry = found.setdefault((record["round"], record["id"]), {})
      part = record["part"]
      read = parts[part]
      values = [read(value) for value in record["values"]]
    except ValueError as e:
      raise ValueError(f"{where}: {e}") from e
    except (KeyError, TypeError) as e:
      raise ValueError(f"{where}: must be an object with round, part ({' or '.join(parts)}), id "
                       "and values, which are numbers, or pairs where the part needs them "
                       f"({e!r})") from e
    if bad := [v for v in values if not base.is_number(v)]:
      raise ValueError(f"{where}: {bad[0]!r} is not a number")
    if (part, "values") in entry:
      raise ValueError(f"{where}: {record['id']} of round {record['round']} is there already")
    entry[part, "values"] = values
  return found


def images_there(folder: ImageFolder):
  """Yields (item, round, image) of every image that is there."""
  there = base.listing(folder.out)
  for number, item in itertools.product(folder.rounds, folder.items):
    for image in range(item.images):
      if there(folder.benchmark.image_path(item, image, number)):
        yield item, number, image


def item_line(answer, scores: dict, why: str | None = None) -> dict:
  """Last fields of a line of items.jsonl: scores, or why there are none, and the judge's words."""
  return {"scores": scores, "why": why, "words": getattr(answer, "text", None)}


def no_score(unscored: base.Unscored, item: str, answer, why: str) -> dict:
  """Counts an item without a score; returns its `item_line`. `why`: "reason: detail"."""
  unscored.add(item, *why.partition(": ")[::2])
  return item_line(answer, {}, why)


@contextlib.contextmanager
def item_writer(folder: ImageFolder):
  """Yields write(item, round, image, images in the file, line); items.jsonl appears at the end."""
  def write(item, number, image, in_file, line):
    benchmark = folder.benchmark
    place = {"id": item.id, "round": number, "picture": image, "in_file": in_file,
             "prompt": item.prompt, "tasks": list(benchmark.tasks(item)),
             "file": str(benchmark.image_path(item, image, number))}
    file.write(json.dumps(place | line, ensure_ascii=False) + "\n")

  with new_text(folder.out / ITEMS) as file:
    yield write


def finish(folder: ImageFolder, summaries: dict, missing: dict, extra: dict) -> dict:
  """Writes scores.json from summaries and counts of missing images by round; returns it."""
  rounds = {}
  for number, summary in summaries.items():
    unscored = summary["unscored"]["total"]
    rounds[str(number)] = summary | {
        "missing": missing[number], "complete": folder.whole and not (missing[number] or unscored)}
  result = {"benchmark": folder.benchmark.name, "prompts": len(folder.items) + folder.absent,
            "rounds": rounds, "run": folder.record, **extra}
  storage.write_json(folder.out / SCORES, result, indent=1, ensure_ascii=False)
  return result


@contextlib.contextmanager
def new_text(path):
  """Yields a text file that appears at `path` on success; removes those of killed writers."""
  path = storage.path(path)
  storage.remove_partials(path.parent)
  with storage.atomic_file(path) as aside:
    with open(aside, "w", encoding="utf-8", errors="replace") as file:
      yield file


def load_function(spec: str, flag: str):
  """The function that MODULE:FUNCTION names, in the working directory as well.

  ValueError names the flag and the part of `spec` at fault.
  """
  module_name, _, name = spec.partition(":")
  if not module_name or not name:
    raise ValueError(f"{flag} {spec!r}: write MODULE:FUNCTION")
  if os.getcwd() not in sys.path and "" not in sys.path:
    sys.path.insert(0, os.getcwd())
  try:
    function = getattr(importlib.import_module(module_name), name, None)
  except ImportError as e:
    raise ValueError(f"{flag} {spec!r}: cannot import {module_name} ({e})") from e
  if not callable(function):
    raise ValueError(f"{flag} {spec!r}: {module_name} has no function {name}")
  return function


def _measure(item, path, function, name, cache):
  answer = functools.partial(questions.Answer, item.id, model=name)
  try:
    image = hashlib.sha256(questions.read_image(path)).hexdigest()
  except questions.Unusable as e:
    return answer(error=f"picture: {e}")
  digest = hashlib.sha256(repr((name, item.prompt, image)).encode()).hexdigest()
  if (kept := cache.get(digest)) is not None:
    return answer(probability=kept["score"], cached=True)
  try:
    score = float(function(path, item.prompt))
  except Exception as e:  # a foreign function: one image that it cannot do is not the end
    return answer(error=f"scorer: {type(e).__name__}: {e}")
  if not 0 <= score <= 1:  # or not a number
    return answer(error=f"scorer: {score} is not from 0 to 1")
  cache.add({"digest": digest, "picture": str(path), "model": name, "score": score})
  return answer(probability=score)
